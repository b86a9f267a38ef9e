"""Grammars of answers, in Lark as llguidance reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,20}", "lenient": False}
"""Bounded, so that no answer goes on in blanks for ever; unknown keywords are refused."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule: JSON that follows a schema, which is the root of its references."""
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


def json_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that follows a schema."""
    return f"start: {json_rule(schema)}"


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression, in Rust's syntax, matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """One of several texts."""
    return "start: " + " | ".join(map(text_rule, choices))


def text_rule(text: str) -> str:
    """The right side of a rule: this text."""
    return json.dumps(text, ensure_ascii=False)
