"""What the answer must look like: `response_format`, and vLLM's names for more of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ...adapters.errors import RequestError
from ...runtime.types import Grammar
from .grammars import ANY_OBJECT, choice_grammar, json_grammar, regex_grammar

MAX_GRAMMAR_CHOICES = 1000


class _Field(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JsonSchema(_Field):
    """A JSON Schema with a name. strict: kept to either way."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    definition: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Field):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError(
                "json_schema and type 'json_schema' go together: give both, or neither",
                parameter="response_format",
            )
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer follows; None: it is free text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return dict(ANY_OBJECT) if self.type == "json_object" else None


_Choices = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1)], ...],
    Field(min_length=1, max_length=MAX_GRAMMAR_CHOICES),
]


class StructuredOutputs(_Field):
    """vLLM's `structured_outputs`: one of these. json: a schema, or its text."""

    json_definition: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs holds {len(given)} forms: give one of json, regex, choice, "
                "grammar, json_object",
                parameter="structured_outputs",
            )
        return self

    def output_grammar(self, parameter: str) -> Grammar:
        """The form as a grammar. parameter: what the client called it."""
        return Grammar(self._lark(parameter), parameter)

    def _lark(self, parameter: str) -> str:
        if self.json_definition is not None:
            return json_grammar(_schema(self.json_definition, parameter))
        if self.regex is not None:
            return regex_grammar(self.regex)
        if self.choice is not None:
            return choice_grammar(self.choice)
        return json_grammar(ANY_OBJECT) if self.grammar is None else self.grammar


class StructuredFields(_Field):
    """The parameters of a body that state the form of its answer, at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _states_one_form(self) -> StructuredFields:
        if len(self._stated) > 1:
            raise RequestError(
                f"{' and '.join(self._stated)} each state the answer's form: give one of them",
                parameter=self._stated[1],
            )
        return self

    @property
    def _stated(self) -> list[str]:
        names = [name for name in StructuredFields.model_fields if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.schema_of_answer is None:
            names.remove("response_format")
        return names

    @property
    def output_grammar(self) -> Grammar | None:
        """The grammar of the answer; None: free text.

        Raises:
            RequestError: a schema is no JSON object.
        """
        if not self._stated:
            return None
        (name,) = self._stated
        if self.response_format is not None and name == "response_format":
            return Grammar(json_grammar(self.response_format.schema_of_answer or {}), name)
        if self.structured_outputs is not None:
            return self.structured_outputs.output_grammar(name)
        form = {name.removeprefix("guided_"): getattr(self, name)}
        return StructuredOutputs.model_validate(form).output_grammar(name)


def _schema(given: dict[str, Any] | str, parameter: str) -> dict[str, Any]:
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{parameter} is no JSON: {error}", parameter=parameter) from error
    if not isinstance(schema, dict):
        raise RequestError(f"{parameter} must be a JSON object", parameter=parameter)
    return schema
