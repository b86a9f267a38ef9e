"""Errors of servers, in every form that they were seen in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergeroute.adapters.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    MergerouteError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
)
from mergeroute.runtime.vllm.refusals import Refusal

NESTED = {"error": {"message": "bad top_p", "type": "BadRequestError", "param": "top_p"}}


@pytest.mark.parametrize(
    ("content", "message", "parameter"),
    [
        (NESTED, "bad top_p", "top_p"),
        (NESTED["error"], "bad top_p", "top_p"),
        ({"detail": "Not Found"}, "Not Found", None),
        ({"error": "plain"}, "plain", None),
        ({"error": {"message": None, "param": 7}}, "HTTP 400", None),
        ([1], "[1]", None),
    ],
)
def test_every_form_is_read(content: Any, message: str, parameter: str | None) -> None:
    refusal = Refusal.read(400, json.dumps(content).encode())
    assert (refusal.status, refusal.message, refusal.parameter) == (400, message, parameter)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xfe"])
def test_what_is_no_json_is_read_too(content: bytes) -> None:
    assert Refusal.read(502, content).message


@pytest.mark.parametrize(
    ("status", "message", "parameter", "kind"),
    [
        (400, "bad", "top_p", RequestError),
        (422, "bad", None, RequestError),
        (400, "This model's maximum context length is 8 tokens", None, ContextLengthError),
        (404, "no such model", "model", ModuleUnavailableError),
        (400, "cannot load", "model", ModuleUnavailableError),
        (404, "Not Found", None, EngineError),
        (401, "Unauthorized", None, EngineError),
        (429, "full", None, QueueFullError),
        (503, "starting", None, EngineStoppedError),
        (500, "boom", None, EngineError),
        (502, "bad gateway", None, EngineError),
    ],
)
def test_what_it_means(
    status: int, message: str, parameter: str | None, kind: type[MergerouteError]
) -> None:
    refusal = Refusal(status, message, parameter)
    assert type(refusal.error) is kind
    assert message in str(refusal.error)
    assert refusal.is_of_the_request == (kind in (RequestError, ContextLengthError)) or (
        refusal.is_of_a_module
    )


def test_an_event_may_say_its_status() -> None:
    event = {"error": {"message": "bad", "code": 400, "param": "stop"}}
    assert isinstance(Refusal.of(event).error, RequestError)
    assert Refusal.of({"error": {"message": "x", "code": "y"}}).status == 500
