"""Who takes part."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from mergeroute.serving.access.callers import ANYBODY, Caller
from mergeroute.serving.experiments.audience import Audience

APP = Caller("app", frozenset(("inference",)))
ADMIN = Caller("ops", frozenset(("inference", "admin")))


@pytest.mark.parametrize(
    ("stated", "headers", "caller", "is_in"),
    [
        ({}, {}, ANYBODY, True),
        ({"keys": ["app", "web"]}, {}, APP, True),
        ({"keys": ["web"]}, {}, APP, False),
        ({"scopes": ["admin"]}, {}, APP, False),
        ({"scopes": ["admin", "inference"]}, {}, ADMIN, True),
        ({"headers": {"X-Plan": "pro"}}, {"x-plan": "pro"}, APP, True),
        ({"headers": {"X-Plan": "pro"}}, {"x-plan": "Pro"}, APP, False),
        ({"headers": {"X-Plan": "pro"}}, {"x-plan": "prosumer"}, APP, False),
        ({"headers": {"X-Plan": "pro"}}, {}, APP, False),
        ({"headers": {"x-plan": "/^(?i)pro/"}}, {"x-plan": "PROsumer"}, APP, True),
        ({"headers": {"x-plan": "/sum/"}}, {"x-plan": "prosumer"}, APP, True),
        ({"headers": {"x-plan": "/^sum/"}}, {"x-plan": "prosumer"}, APP, False),
        ({"headers": {"x-plan": "/"}}, {"x-plan": "/"}, APP, True),
        ({"headers": {"x-city": "Málaga"}}, {"x-city": "MÃ¡laga"}, APP, True),
        ({"headers": {"a": "1", "b": "2"}}, {"a": "1"}, APP, False),
        ({"headers": {"a": "1"}, "keys": ["ops"]}, {"a": "1"}, APP, False),
    ],
)
def test_all_that_is_stated_must_hold(
    stated: dict[str, Any], headers: dict[str, str], caller: Caller, is_in: bool
) -> None:
    assert Audience.model_validate(stated).admits(Headers(headers), caller) is is_in


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Authorization": "Bearer x"}, "'authorization' holds a secret"),
        ({"x plan": "pro"}, "'x plan' is no name of a header"),
        ({"": "pro"}, "'' is no name of a header"),
        ({"x-plan": "/(/"}, "is not in RE2's syntax"),
        ({"x-plan": r"/(?=pro)/"}, "no look-around"),
        ({"X-Plan": "a", "x-plan": "b"}, "named twice"),
    ],
)
def test_headers_that_cannot_be_matched(headers: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Audience(headers=headers)


def test_a_stored_audience_is_the_same() -> None:
    audience = Audience(keys=("app",), scopes=("admin",), headers={"X-Plan": "/^pro/"})
    assert Audience.model_validate_json(audience.model_dump_json()) == audience
