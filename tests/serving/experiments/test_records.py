"""Records as lines."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.records import KINDS, LARGEST_VALUE, Record, from_line, to_line

from .recorded import feedback, one_of_each, outcome

NUMBERS = st.floats(-LARGEST_VALUE, LARGEST_VALUE)


def records() -> st.SearchStrategy[Record]:
    """Of all kinds."""
    return st.one_of([st.builds(kind, **numbers(kind)) for kind in KINDS.values()])


def numbers(kind: type[Record]) -> dict[str, st.SearchStrategy[float | None]]:
    """Strategies of the fields that hold numbers: finite ones."""
    types = {field.name: field.type for field in fields(kind)}
    optional = {name: st.none() | NUMBERS for name, type in types.items() if type == "float | None"}
    return {**{name: NUMBERS for name, type in types.items() if type == "float"}, **optional}


@settings(deadline=None)
@given(records())
def test_a_line_holds_a_record(record: Record) -> None:
    line = to_line(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert from_line(line) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e16])
def test_feedback_is_a_number_that_can_be_summed(value: float) -> None:
    with pytest.raises(ApiError, match="must be a finite number") as caught:
        feedback("a", value)
    assert (caught.value.status, caught.value.param) == (400, "value")


def test_a_number_that_is_not_finite_is_no_record() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(outcome("a", latency_ms=math.nan))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[",
        b"3",
        b"[3]",
        b'["nothing", {}]',
        b'["feedback", {}]',
        b'["feedback", 3]',
        b'[["feedback"], {}]',
        b"\xff",
        to_line(feedback("a", 1.0)).replace(b"1.0", b'"high"'),
        to_line(feedback("a", 1.0)).replace(b"1.0", b"NaN"),
        to_line(feedback("a", 1.0)).replace(b'"a"', b'["a"]'),
    ],
)
def test_lines_that_hold_none(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        from_line(line)


def test_a_line_says_what_it_is() -> None:
    assert [json.loads(to_line(record))[0] for record in one_of_each("a")] == list(KINDS)
