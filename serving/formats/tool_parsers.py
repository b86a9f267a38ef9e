"""How models spell tool calls: the grammar of a call, and a reader of what they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from .grammars import ANY_OBJECT, json_rule, text_rule
from .tools import Function

ParserName = Literal["auto", "hermes", "llama3", "none"]
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class CallSyntax:
    """A model family's spelling of a call: opening, {"name": NAME, arguments_key: {...}}, closing.

    opening: before a call, wherever it stands; "": an answer that begins with a call is one.
    separator: between two calls; None: a model of this family makes one at a time.
    """

    arguments_key: str
    opening: str = ""
    closing: str = ""
    separator: str | None = None

    def grammar(self, functions: Sequence[Function], *, must: bool, once: bool, other: str) -> str:
        """A grammar of answers that call these functions.

        must: call at least one, each by its schema; else those that are strict by theirs.
        other: rule of an answer that calls nothing; "" is any text.
        """
        rules = [
            f"call_{k}: {text_rule(self._head(f))} {_arguments(f, must)} {text_rule(self._tail)}"
            for k, f in enumerate(functions)
        ]
        one_of = " | ".join(f"call_{k}" for k in range(len(functions)))
        repeats = not once and self.separator is not None
        if must or other or not self.opening:
            separated = f"({text_rule(self.separator or '')} call)*" if repeats else ""
            answers = "" if must else f" | {other or 'TEXT'}"
            rules += [f"start: call {separated}{answers}", f"call: {self._begin}({one_of})"]
            rules += [] if must or other else [r"TEXT: /\s*([^\s{](.|\n)*)?/"]
        else:
            rules += ["start: call* TEXT" if repeats else "start: call | TEXT"]
            rules += [f"call: begin {text_rule(self._gap)} ({one_of})"]
            rules += [f"begin[lazy]: TEXT {text_rule(self.opening)}", r"TEXT: /(.|\n)*/"]
        return "\n".join(["%llguidance {}", *rules])

    @property
    def _gap(self) -> str:
        return "\n" if self.opening else ""

    @property
    def _begin(self) -> str:
        return f"{text_rule(self.opening + self._gap)} " if self.opening else ""

    @property
    def _tail(self) -> str:
        return "}" + self._gap + self.closing

    def _head(self, function: Function) -> str:
        return f'{{"name": "{function.name}", "{self.arguments_key}": '


SYNTAXES = {
    "hermes": CallSyntax("arguments", "<tool_call>", "</tool_call>", separator="\n"),
    "llama3": CallSyntax("parameters"),
}


def detect_syntax(template: str) -> CallSyntax | None:
    """The spelling that a chat template shows; None: none that is known."""
    if "<tool_call>" in template and "<function=" not in template:
        return SYNTAXES["hermes"]
    if '"parameters": ' in template and '"name": ' in template:
        return SYNTAXES["llama3"]
    return None


@dataclass
class CallPiece:
    """A part of a call. id, name: in its first part alone."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Piece:
    """What some text adds to an answer; at most one part per call."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class TextReader:
    """Reads an answer that calls nothing."""

    calls_seen = 0

    def push(self, text: str) -> Piece:
        """Read on."""
        return Piece(text)

    def flush(self) -> Piece:
        """Nothing follows."""
        return Piece()


class CallReader:
    """Reads an answer as it comes, in pieces of any size, which add up to the same.

    What looks like a call and is none stays content. names: of the functions there are.
    """

    def __init__(self, syntax: CallSyntax, names: Collection[str]) -> None:
        self._syntax = syntax
        self._names = names
        self._held = ""  # not told yet
        self._said = ""  # blanks after content, which count if more content follows
        self._state = "text" if syntax.opening else "begin"
        self._arguments = _ObjectEnd()
        self._piece = Piece()
        self._steps: dict[str, Callable[[bool], bool]] = {
            "begin": self._in_begin,
            "text": self._in_text,
            "head": self._in_head,
            "arguments": self._in_arguments,
            "tail": self._in_tail,
        }
        self.calls_seen = 0

    def push(self, text: str) -> Piece:
        """Read on."""
        self._held += text
        return self._read(is_last=False)

    def flush(self) -> Piece:
        """Nothing follows: what is held back is content."""
        return self._read(is_last=True)

    def _read(self, *, is_last: bool) -> Piece:
        self._piece = Piece()
        while self._steps[self._state](is_last):
            pass
        if is_last:
            self._say(self._held)
            if not self.calls_seen:
                self._piece.content += self._said
            self._held = self._said = ""
        return self._piece

    # Each returns whether there is more to do now.

    def _in_text(self, is_last: bool) -> bool:
        before, found, after = self._held.partition(self._syntax.opening or "\0")
        if found and self._syntax.opening:
            self._say(before)
            self._held, self._state = after, "head"
            return True
        keep = 0 if is_last else _open_length(self._held, self._syntax.opening)
        self._say(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _in_begin(self, is_last: bool) -> bool:
        """Before anything is said, where a call has no opening."""
        stripped = self._held.lstrip()
        if stripped:
            self._state = "head" if stripped[0] == "{" else "text"
        return bool(stripped)

    def _in_head(self, is_last: bool) -> bool:
        name, length = _head(self._held, self._syntax.arguments_key)
        if length > 0 and name in self._names:
            index, self.calls_seen = self.calls_seen, self.calls_seen + 1
            self._piece.calls.append(CallPiece(index, f"call_{uuid4().hex[:24]}", name))
            self._held, self._state = self._held[length:], "arguments"
            self._arguments = _ObjectEnd()
            self._said = ""
            return True
        if length == 0 and not is_last:
            return False
        self._say(self._syntax.opening)
        self._state = "text"
        return True

    def _in_arguments(self, is_last: bool) -> bool:
        end = self._arguments.find(self._held)
        told = self._held if end is None else self._held[:end]
        if told:
            if not self._piece.calls or self._piece.calls[-1].index != self.calls_seen - 1:
                self._piece.calls.append(CallPiece(self.calls_seen - 1))
            self._piece.calls[-1].arguments += told
        self._held = self._held[len(told) :]
        if end is None:
            return False
        self._state = "tail"
        return True

    def _in_tail(self, is_last: bool) -> bool:
        """After the arguments: the brace and the closing, which say nothing."""
        length, is_open = _literals(self._held, ("}", self._syntax.closing))
        if is_open and not is_last:
            return False
        self._held, self._state = "" if is_open else self._held[length:], "text"
        return True

    def _say(self, text: str) -> None:
        """Blanks at the end wait: before a call they are not content."""
        text = self._said + text
        content = text.rstrip()
        self._piece.content += content
        self._said = text[len(content) :]


Reader = TextReader | CallReader


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces, each looked at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False

    def find(self, text: str) -> int | None:
        """The index after the object's last brace; None: it is not here yet."""
        for index, character in enumerate(text):
            if self._in_string:
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
                continue
            self._in_string = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0:
                return index + 1
        return None


def _head(text: str, arguments_key: str) -> tuple[str, int]:
    """The name in a call's beginning, and its length up to the arguments' brace; 0: there may
    more of it come, -1: it is none.
    """
    at, name = 0, ""
    steps = ["{", '"name"', ":", "", ",", f'"{arguments_key}"', ":", "{"]
    if re.match(r'\s*\{\s*"type"', text):
        steps = ["{", '"type"', ":", '"function"', ",", *steps[1:]]
    for step in steps:
        at = len(text) - len(text[at:].lstrip())
        rest = text[at:]
        found = _STRING.match(rest) if not step else None
        if found:
            name, at = found[1], at + found.end()
        elif step and rest.startswith(step):
            at += len(step)
        else:
            return "", 0 if _is_open(rest, step) else -1
    return name, at - 1


def _is_open(text: str, step: str) -> bool:
    """Whether a text may go on to be a step; "" is a string, short as names are."""
    if not step:
        return text[:1] in ("", '"') and len(text) < 128
    return step.startswith(text) or (step == '"name"' and '"type"'.startswith(text))


def _literals(text: str, literals: Sequence[str]) -> tuple[int, bool]:
    """How much of these, with blanks before each, the text begins with; and whether more of them
    may come.
    """
    at = 0
    for literal in filter(None, literals):
        rest = text[at:].lstrip()
        if not rest.startswith(literal):
            return at, literal.startswith(rest)
        at = len(text) - len(rest) + len(literal)
    return at, False


def _open_length(text: str, opening: str) -> int:
    """Length of the longest end of the text that begins the opening."""
    lengths = range(min(len(opening) - 1, len(text)), 0, -1)
    return next((n for n in lengths if opening.startswith(text[-n:])), 0)


def _arguments(function: Function, must: bool) -> str:
    return json_rule(function.schema_of_arguments if must or function.strict else ANY_OBJECT)


def template_of(tokenizer: Any) -> str:  # noqa: ANN401 - transformers is untyped
    """The chat template that is used with tools; "" where there is none."""
    return str(tokenizer.get_chat_template(tools=[{}])) if tokenizer.chat_template else ""
