"""Greetings: what looks at a server tell of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.greetings import Health, greet, look

MODELS = {"data": [{"id": "tiny", "max_model_len": 64}]}


def client(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(base_url="http://vllm", transport=httpx.MockTransport(answer))


def failing(error: type[httpx.HTTPError]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error("told to fail")

    return answer


@pytest.mark.parametrize(("status", "health"), [(200, "well"), (503, "ill"), (500, "ill")])
def test_what_a_server_says_counts(status: int, health: Health) -> None:
    assert look(client(lambda _: httpx.Response(status))) == health


@pytest.mark.parametrize(
    ("error", "health"),
    [
        (httpx.ConnectError, "ill"),
        (httpx.ConnectTimeout, "silent"),
        (httpx.ReadTimeout, "silent"),
        (httpx.ReadError, "silent"),
        (httpx.RemoteProtocolError, "silent"),
    ],
)
def test_an_answer_that_breaks_off_is_none_and_no_sign_of_illness(
    error: type[httpx.HTTPError], health: Health
) -> None:
    assert look(client(failing(error))) == health


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"paths": []},
        {"paths": {"/v1/completions": []}},
        {"paths": {"/v1/completions": {"post": {"requestBody": None}}}},
        {"components": {"schemas": [1]}, "paths": {"/x": {"post": {}}}},
    ],
)
def test_a_strange_description_is_as_good_as_none(document: Any) -> None:
    answers = {"/v1/models": MODELS, "/openapi.json": document}
    served = greet(client(lambda request: httpx.Response(200, json=answers[request.url.path])))
    assert (served.model, served.max_length, served.fields) == ("tiny", 64, {})


@pytest.mark.parametrize("document", [[], {}, {"data": []}, {"data": [{"id": "tiny"}]}])
def test_what_is_no_list_of_models_is_no_vllm(document: Any) -> None:
    with pytest.raises(EngineError, match="not answered as by vLLM"):
        greet(client(lambda _: httpx.Response(200, json=document)))
