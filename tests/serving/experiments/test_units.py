"""Whom a request comes from."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.datastructures import Headers

from mergeroute.serving.access.callers import ANYBODY
from mergeroute.serving.context import Context
from mergeroute.serving.experiments.units import Facts, Unit, facts_of, unit_of
from mergeroute.serving.schemas.completions import CompletionRequest

from .shapes import KEYED, SECRET, experiment, facts

CHAIN = experiment().unit
HEADER = "x-mergeroute-assignment-key"


@pytest.mark.parametrize(
    ("asked", "unit"),
    [
        (facts(headers={HEADER: "h"}, user="u", session="s", caller=KEYED), Unit(CHAIN[0], "h")),
        (facts(user="u", session="s", caller=KEYED), Unit("user", "u")),
        (facts(session="s", caller=KEYED), Unit("session", "s")),
        (facts(caller=KEYED), Unit("api_key", "app")),
        (facts(), Unit("request", "r-1")),
        (facts(headers={HEADER: ""}, user="", session=""), Unit("request", "r-1")),
    ],
)
def test_the_first_that_the_request_has(asked: Facts, unit: Unit) -> None:
    assert unit_of(CHAIN, asked) == unit


def test_a_chain_may_end_with_nobody() -> None:
    assert unit_of(("user", "api_key"), facts(session="s")) is None


@pytest.mark.parametrize(
    ("body", "headers", "user", "session"),
    [
        ({}, {}, None, None),
        ({"user": "u"}, {}, "u", None),
        ({"safety_identifier": "n"}, {}, "n", None),
        ({"user": "u", "safety_identifier": "n"}, {}, "u", None),
        ({"user": ""}, {}, None, None),
        ({"conversation": "c"}, {"X-Session-Id": "s"}, None, "c"),
        ({"conversation": {"id": "c"}}, {}, None, "c"),
        ({}, {"X-Session-Id": "s"}, None, "s"),
    ],
)
def test_what_a_request_says(
    body: dict[str, Any], headers: dict[str, str], user: str | None, session: str | None
) -> None:
    request = CompletionRequest.model_validate({"prompt": "p", **body})
    found = facts_of(request, Context(Headers(headers), ANYBODY, "r-9"))
    assert (found.user, found.session, found.request_id) == (user, session, "r-9")


def test_a_header_is_read_in_any_letter_case_and_as_utf_8() -> None:
    raw = [(b"X-Mergeroute-Assignment-Key", "José".encode())]
    asked = facts(headers=Headers(raw=[(name.lower(), value) for name, value in raw]))
    assert unit_of(CHAIN, asked) == Unit(CHAIN[0], "José")
    latin = facts(headers={HEADER: "Jos\xe9"})
    assert unit_of(CHAIN, latin) == Unit(CHAIN[0], "José")


def test_a_digest_hides_the_key_and_needs_the_secret() -> None:
    digest = Unit("user", "alice").digest(SECRET)
    assert digest == Unit("session", "alice").digest(SECRET)
    assert len(digest) == 32
    assert int(digest, 16) >= 0
    assert digest != Unit("user", "alice").digest("another")
    assert digest != Unit("user", "Alice").digest(SECRET)
