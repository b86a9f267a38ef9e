"""TokenRouting: what it reads, what it refuses, and that equal settings are one setting."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.token_routing import METHODS, TokenRouting

SETTINGS = st.fixed_dictionaries(
    {"method": st.sampled_from(["arrow", "spectr"])},
    optional={
        "top_k": st.integers(0, 64),
        "temperature": st.floats(0.01, 100),
        "norm": st.sampled_from(["unit", "raw"]),
        "none": st.none() | st.floats(-100, 100),
        "smoothing": st.floats(0, 0.99),
    },
)


@pytest.mark.parametrize(("method", "top_k"), METHODS.items())
def test_a_name_takes_the_methods_defaults(method: str, top_k: int) -> None:
    routing = TokenRouting.parse(method)
    assert routing == TokenRouting(method, top_k=top_k) == TokenRouting.parse({"method": method})
    assert routing.settings == {"method": method}
    assert str(routing) == method


@given(SETTINGS)
def test_settings_are_read_back_through_json(settings: dict[str, Any]) -> None:
    routing = TokenRouting.parse(settings)
    again = TokenRouting.parse(json.loads(json.dumps(routing.settings)))
    assert again == routing
    assert (again.digest, hash(again)) == (routing.digest, hash(routing))


def test_what_routes_alike_has_one_digest_and_nothing_else_has() -> None:
    one = TokenRouting("arrow")
    assert TokenRouting("arrow", top_k=3, temperature=1, smoothing=0).digest == one.digest
    others = [
        TokenRouting("spectr"),
        TokenRouting("spectr", directions=1),
        TokenRouting("arrow", none=0),
        TokenRouting("arrow", top_k=0),
        TokenRouting("arrow", norm="raw"),
        TokenRouting("arrow", smoothing=0.5),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_it_says_what_differs_from_the_defaults() -> None:
    assert str(TokenRouting("arrow", top_k=1, none=2)) == "arrow(top_k=1, none=2.0)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("arow", r"method is 'arow', allowed is one of arrow, spectr, phatgoose"),
        (3, r"routing is 3, allowed is one of arrow"),
        (["arrow"], r"routing is \['arrow'\], allowed"),
        ({}, "has no method"),
        ({"method": ["arrow"]}, r"method is \['arrow'\]"),
        ({"method": "arrow", "topk": 1}, "has the key 'topk', allowed are method, top_k"),
        ({"method": "arrow", "top_k": -1}, "top_k is -1, allowed is a whole number"),
        ({"method": "arrow", "top_k": 1.5}, "top_k is 1.5"),
        ({"method": "arrow", "top_k": True}, "top_k is True"),
        ({"method": "arrow", "temperature": 0}, "temperature is 0, allowed is between"),
        ({"method": "arrow", "temperature": float("nan")}, "temperature is nan"),
        ({"method": "arrow", "temperature": 10**400}, "temperature is 1000"),
        ({"method": "arrow", "temperature": "1"}, "temperature is '1'"),
        ({"method": "arrow", "norm": "l2"}, "norm is 'l2', allowed is one of unit, raw"),
        ({"method": "arrow", "none": float("inf")}, "none is inf, allowed is null"),
        ({"method": "arrow", "smoothing": 1}, "smoothing is 1, allowed is at least 0 and below 1"),
        ({"method": "arrow", "directions": 2}, "directions is 2, allowed is 0 with arrow"),
        ({"method": "spectr", "directions": None}, "directions is None"),
        ({"method": "phatgoose", "norm": "raw"}, "norm is 'raw', allowed is unit with phatgoose"),
    ],
)
def test_what_cannot_be_read_is_refused_by_key_value_and_rule(value: object, message: str) -> None:
    with pytest.raises(RouterError, match=message):
        TokenRouting.parse(value)
