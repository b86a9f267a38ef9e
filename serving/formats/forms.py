"""From a body to the form of its answer: the grammar that it keeps to, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...adapters.errors import RequestError
from ...runtime.types import Grammar
from .response_format import StructuredFields
from .tool_parsers import (
    SYNTAXES,
    CallReader,
    CallSyntax,
    ParserName,
    Reader,
    TextReader,
    detect_syntax,
    template_of,
)
from .tools import ToolFields


@dataclass(frozen=True)
class Form:
    """grammar: what the answer keeps to; None: nothing. syntax: how it spells calls of the
    functions named; None: it calls nothing.
    """

    grammar: Grammar | None = None
    syntax: CallSyntax | None = None
    names: tuple[str, ...] = ()

    def reader(self) -> Reader:
        """A reader of one answer."""
        return CallReader(self.syntax, self.names) if self.syntax else TextReader()


def form_of(
    body: StructuredFields,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    parser: ParserName,
) -> Form:
    """The form that a body asks for.

    Raises:
        RequestError: its parts contradict each other, or the backbone does not spell calls in a
            known way.
    """
    grammar = body.output_grammar
    form = Form(grammar)
    if isinstance(body, ToolFields) and body.offered:
        form = _calling(body, grammar, _syntax(tokenizer, parser))
    if form.grammar:
        _check_end(body, form.grammar)
    return form


def _check_end(body: StructuredFields, grammar: Grammar) -> None:
    """Refuse what would have the answer go on where its form is complete."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name, None):
            raise RequestError(
                f"{name} cannot go with {grammar.parameter}: the answer ends when its form is "
                "complete; leave it out",
                parameter=name,
            )


def _calling(body: ToolFields, grammar: Grammar | None, syntax: CallSyntax) -> Form:
    functions = body.callable_functions
    names = tuple(f.name for f in functions)
    is_free = len(names) == len(body.offered) and body.parallel_tool_calls
    is_free = is_free and not any(f.strict for f in functions)
    if is_free and grammar is None and not body.must_call:
        return Form(None, syntax, names)
    if grammar is not None and grammar.parameter != "response_format":
        raise RequestError(
            f"{grammar.parameter} cannot go with tools: leave one out, or set tool_choice to "
            "'none'",
            parameter=grammar.parameter,
        )
    other = grammar.text.removeprefix("start: ") if grammar else ""
    text = syntax.grammar(functions, must=body.must_call, once=body.calls_once, other=other)
    return Form(Grammar(text, "tools"), syntax, names)


def _syntax(tokenizer: Any, parser: ParserName) -> CallSyntax:  # noqa: ANN401
    if parser == "none":
        raise RequestError(
            "tools are switched off here (tool_parser: none): leave them out", parameter="tools"
        )
    found = detect_syntax(template_of(tokenizer)) if parser == "auto" else SYNTAXES[parser]
    if found is None:
        raise RequestError(
            "the backbone's chat template does not show how its model calls tools: use one that "
            f"does, in the form of {' or '.join(SYNTAXES)}, or name the form (tool_parser)",
            parameter="tools",
        )
    return found
