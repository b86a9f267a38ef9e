"""Examples: the lines of a data file that routers are fitted on and banks are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from ..adapters.errors import DataError

Need = Literal["task", "answer"]
_SHOWN = 60


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Example(BaseModel):
    """A prompt with the module that serves it and the right answer, where they are known.

    task: name of a module; None: the prompt is no module's, or it is not said.
    messages: the conversation up to the answer, at least one of them a user's. A line may give
    `prompt`, one user message, instead; one that ends with the assistant's message and has no
    `answer` ends with the answer.
    options: the answers to choose from, where there is a choice; the answer is one of them.
    Other keys of a line are kept apart, as `unused`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    task: str | None = Field(None, min_length=1)
    messages: tuple[Message, ...]
    answer: str | None = None
    options: tuple[str, ...] | None = Field(None, min_length=2)
    _where: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _with_messages(cls, line: Any) -> Any:  # noqa: ANN401 - whatever the line holds
        if not isinstance(line, dict):
            return line
        if ("prompt" in line) == ("messages" in line):
            raise ValueError("give either prompt or messages")
        if "messages" in line:
            return line
        rest = {key: value for key, value in line.items() if key != "prompt"}
        if not (isinstance(line["prompt"], str) and line["prompt"]):
            raise ValueError(f"prompt is {line['prompt']!r}: give a text that is not empty")
        return {**rest, "messages": [{"role": "user", "content": line["prompt"]}]}

    @model_validator(mode="before")
    @classmethod
    def _with_answer(cls, line: Any) -> Any:  # noqa: ANN401
        messages = line.get("messages") if isinstance(line, dict) else None
        if not isinstance(messages, list) or len(messages) < 2:
            return line
        last = messages[-1]
        if not (isinstance(last, dict) and last.get("role") == "assistant"):
            return line
        if line.get("answer") is not None:
            raise ValueError("the answer is given twice: as answer and as the last message")
        return {**line, "messages": messages[:-1], "answer": last.get("content")}

    @model_validator(mode="after")
    def _a_user_speaks(self) -> Example:
        if not self.user_turns:
            raise ValueError("messages hold none of a user's: give at least one")
        return self

    @model_validator(mode="after")
    def _options_hold_the_answer(self) -> Example:
        options = self.options or ()
        if options and self.answer not in options:
            raise ValueError(f"answer is {self.answer!r}: make it one of the options {options}")
        if len({option.casefold().strip() for option in options}) < len(options):
            raise ValueError(f"options {options} hold one twice; case and white space do not count")
        return self

    @property
    def prompt(self) -> str:
        """What the user wrote last: what a router looks at."""
        return self.user_turns[-1]

    @property
    def user_turns(self) -> tuple[str, ...]:
        """What the user wrote, in order."""
        return tuple(message.content for message in self.messages if message.role == "user")

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates take."""
        return [message.model_dump() for message in self.messages]

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of the line that mean nothing here."""
        return tuple(self.model_extra or ())

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return self._where

    @classmethod
    def parse(cls, line: bytes, *, where: str) -> Example:
        """The example of one line.

        Raises:
            DataError: it is none; the message begins with `where`.
        """
        try:
            example = cls.model_validate_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: the file is not UTF-8: convert it") from error
        except ValidationError as error:
            raise DataError(f"{where}: {_explained(error)}") from error
        example._where = where
        return example


def read_examples(path: Path, *, needs: Sequence[Need] = ()) -> list[Example]:
    """The examples of a file of JSON lines, in UTF-8; empty lines are skipped.

    needs: keys that every line must have, with more than white space in them.

    Raises:
        DataError: the file is missing or empty, or a line is no example; it names the line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} holds no examples: give JSON lines, {_form(needs)}")
    examples = [Example.parse(line, where=f"{path}, line {number}") for number, line in numbered]
    for example in examples:
        _check_needs(example, needs)
    return examples


def _form(needs: Sequence[Need]) -> str:
    """What a line looks like."""
    keys = [key for key in ("task", "prompt", "answer") if key == "prompt" or key in needs]
    return "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"


def _check_needs(example: Example, needs: Sequence[Need]) -> None:
    for key in needs:
        if not (getattr(example, key) or "").strip():
            every = " and ".join(needs)
            raise DataError(f"{example.where}: {key} is missing or blank: every line needs {every}")


def _explained(error: ValidationError) -> str:
    """Key, value, rule and remedy of the first fault."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    if not first["loc"]:
        return f'{message}: write one JSON object a line, {{"task": ..., "prompt": ...}}'
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "too_short":
        message = f"give at least {first['ctx']['min_length']}"
    value = repr(first["input"])
    value = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
    return f"{where} is {value}: {message}"
