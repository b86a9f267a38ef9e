"""Readers of tool calls, on texts that models write and texts that they should not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from mergeroute.serving.formats.tool_parsers import (
    SYNTAXES,
    CallReader,
    CallSyntax,
    detect_syntax,
)
from mergeroute.serving.formats.tools import Function

NAMES = ("f", "get.weather")
HERMES, LLAMA = SYNTAXES["hermes"], SYNTAXES["llama3"]
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>'
TWO = '<tool_call>{"name":"get.weather","arguments":{}}</tool_call>'
LLAMA_ONE = '{"name": "f", "parameters": {"a": [1, {"b": "]"}]}}'

Said = tuple[str, list[tuple[str, str]]]


def read(syntax: CallSyntax, *parts: str) -> Said:
    reader = CallReader(syntax, NAMES)
    content, calls = "", list[dict[str, Any]]()
    for piece in [*map(reader.push, parts), reader.flush()]:
        content += piece.content
        for part in piece.calls:
            if part.index == len(calls):
                assert part.id is not None
                assert part.id.startswith("call_")
                calls.append({"name": part.name, "arguments": ""})
            calls[part.index]["arguments"] += part.arguments
    assert reader.calls_seen == len(calls)
    return content, [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE, ("", [("f", '{"a": "}\\"{"}')])),
        (f"Well.\n{ONE}", ("Well.", [("f", '{"a": "}\\"{"}')])),
        (f"{ONE}\n{TWO}\n", ("", [("f", '{"a": "}\\"{"}'), ("get.weather", "{}")])),
        (f"{ONE} and more", (" and more", [("f", '{"a": "}\\"{"}')])),
        (
            '<tool_call>{"type": "function", "name": "f", "arguments": {}}</tool_call>',
            ("", [("f", "{}")]),
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', ("", [("f", '{"a": 1')])),
        ('<tool_call>{"name": "f", "arguments": {}}</tool', ("", [("f", "{}")])),
        ("a <b> <tool_cal", ("a <b> <tool_cal", [])),
        ("<tool_call> nothing", ("<tool_call> nothing", [])),
        ('<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',) * 2,
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>',) * 2,
        ("<tool_call><tool_call>\n", ("<tool_call><tool_call>\n", [])),
        (" \n", (" \n", [])),
        ("", ("", [])),
    ],
)
def test_hermes(text: str, said: Said | str) -> None:
    assert read(HERMES, text) == (said if isinstance(said, tuple) else (said, []))
    assert read(HERMES, *text) == read(HERMES, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LLAMA_ONE, ("", [("f", '{"a": [1, {"b": "]"}]}')])),
        (f"\n{LLAMA_ONE}\n", ("", [("f", '{"a": [1, {"b": "]"}]}')])),
        ('{"type": "function", "name": "f", "parameters": {}}', ("", [("f", "{}")])),
        (f"Well: {LLAMA_ONE}", (f"Well: {LLAMA_ONE}", [])),
        ('{"name": "f", "parameters": []}', ('{"name": "f", "parameters": []}', [])),
        ('{"answer": 3}', ('{"answer": 3}', [])),
        ('{"name": "f"', ('{"name": "f"', [])),
    ],
)
def test_llama3(text: str, said: Said) -> None:
    assert read(LLAMA, text) == said
    assert read(LLAMA, *text) == said


fragments = st.sampled_from(
    [
        ONE,
        TWO,
        LLAMA_ONE,
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", ',
        '"arguments": {',
        "}",
        "\n",
        " x",
        '"',
    ]
)


@given(
    st.lists(fragments | st.text(max_size=3), max_size=6).map("".join),
    st.lists(st.integers(1, 9), max_size=40),
    st.sampled_from([HERMES, LLAMA]),
)
def test_any_pieces_of_a_text_say_what_it_says(
    text: str, sizes: list[int], syntax: CallSyntax
) -> None:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    assert read(syntax, *parts, text[at:]) == read(syntax, text)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists),
        max_size=4,
    ),
    st.sampled_from([HERMES, LLAMA]),
)
def test_any_arguments_come_back_as_they_were_written(
    arguments: dict[str, Any], syntax: CallSyntax
) -> None:
    written = json.dumps(arguments)
    text = f'{syntax.opening}{{"name": "f", "{syntax.arguments_key}": {written}}}{syntax.closing}'
    assert read(syntax, text) == ("", [("f", written)])


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("{{- '{\"name\": \"' + c.name + '\", ' }}{{- '\"parameters\": ' }}", LLAMA),
        ("<tool_call><function=", None),
        ("{{ messages }}", None),
    ],
)
def test_the_template_shows_how_calls_are_spelled(template: str, syntax: CallSyntax | None) -> None:
    assert detect_syntax(template) is syntax


@pytest.mark.parametrize("syntax", [HERMES, LLAMA])
@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("other", ["", '%json {"type": "object"}'])
def test_all_grammars_of_calls_are_sound(
    syntax: CallSyntax, must: bool, once: bool, other: str
) -> None:
    functions = [
        Function(
            name="f",
            strict=True,
            parameters={"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}},
        ),
        Function(name="get.weather"),
    ]
    text = syntax.grammar(functions, must=must, once=once, other=other)
    assert LLMatcher.validate_grammar(text) == ""
