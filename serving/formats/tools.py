"""Tools: what a chat may call, what it must call, and what was called before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...adapters.errors import RequestError

MAX_TOOLS = 128
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class _Field(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Function(_Field):
    """A function. strict: where the model calls it on its own, the schema is kept to as well."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _are_of_an_object(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        stated = (given or {}).get("type", "object")
        if stated != "object":
            raise ValueError(
                f"a function's parameters have type 'object', not {stated!r}: arguments go by "
                "their names, so make this a property of an object"
            )
        return given

    @property
    def schema_as_told(self) -> dict[str, Any]:
        """What the model is told of the arguments."""
        return _NO_PARAMETERS if self.parameters is None else self.parameters

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """What the arguments follow: an object even where the schema does not say so."""
        return {**self.schema_as_told, "type": "object"}


class Tool(_Field):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        described = {"description": self.function.description} if self.function.description else {}
        parameters = self.function.schema_as_told
        function = {"name": self.function.name, **described, "parameters": parameters}
        return {"type": self.type, "function": function}


class FunctionName(_Field):
    """A function by its name."""

    name: str


class ToolName(_Field):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Field):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: tuple[ToolName, ...] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoice(_Field):
    """A choice that names tools: one that must be called, or some that may or must be."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _says_what_its_type_says(self) -> ToolChoice:
        said = {"function": self.function, "allowed_tools": self.allowed_tools}
        if [name for name, value in said.items() if value] != [self.type]:
            raise RequestError(
                f"a tool_choice of type {self.type!r} holds {self.type!r} and nothing else",
                parameter="tool_choice",
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The functions that are named."""
        named = self.allowed_tools.tools if self.allowed_tools else ()
        return (self.function.name,) if self.function else tuple(t.function.name for t in named)


class ToolFields(_Field):
    """The parameters of a chat that are about tools."""

    tools: tuple[Tool, ...] = Field((), max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _names_its_tools(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RequestError(f"two tools are called {min(twice)!r}", parameter="tools")
        choice = self.tool_choice
        if choice == "required" and not names:
            raise RequestError("tool_choice 'required' needs tools", parameter="tool_choice")
        missing = set(choice.names) - set(names) if isinstance(choice, ToolChoice) else set()
        if missing:
            raise RequestError(
                f"tool_choice names {min(missing)!r}, which is none of the tools",
                parameter="tool_choice",
            )
        return self

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def callable_functions(self) -> tuple[Function, ...]:
        """Those of them that it may call."""
        functions = tuple(tool.function for tool in self.offered)
        if not isinstance(self.tool_choice, ToolChoice):
            return functions
        return tuple(f for f in functions if f.name in self.tool_choice.names)

    @property
    def must_call(self) -> bool:
        """Whether it has to call one."""
        choice = self.tool_choice
        if isinstance(choice, ToolChoice):
            return choice.allowed_tools is None or choice.allowed_tools.mode == "required"
        return choice == "required"

    @property
    def calls_once(self) -> bool:
        """Whether it may call at most once."""
        is_named = isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function
        return bool(is_named) or not self.parallel_tool_calls


class CalledFunction(_Field):
    """A function that was called. arguments: the text of a JSON object."""

    name: str
    arguments: str = "{}"

    @model_validator(mode="after")
    def _has_an_object(self) -> CalledFunction:
        if not isinstance(_read(self.arguments), dict):
            raise ValueError("the arguments of a tool call must be a JSON object, as text")
        return self


class ToolCall(_Field):
    """A call in an earlier answer. index: as streams number them; changes nothing."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    @property
    def for_template(self) -> Mapping[str, Any]:
        """As chat templates expect it: arguments are an object."""
        called = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": called}


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
