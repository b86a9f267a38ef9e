from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.bank import Bank
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service
from mergeroute.serving.telemetry.options import Telemetry
from mergeroute.serving.telemetry.request_log import JsonLines, RequestLine, TextLines, escaped

from ..conftest import running
from .conftest import SECRET, Watched, eventually

_LOGGER = logging.getLogger("mergeroute.requests")


@contextmanager
def lines(formatter: logging.Formatter) -> Iterator[list[str]]:
    """What the log gets to hold, line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    found: list[str] = []
    _LOGGER.addHandler(handler)
    level = _LOGGER.level
    _LOGGER.setLevel(logging.INFO)
    try:
        yield found
    finally:
        eventually(lambda: stream.getvalue())
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        found += stream.getvalue().splitlines()


def told(text: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(text)
    return entry


def test_one_json_line_tells_of_a_request(watched: Watched) -> None:
    with lines(JsonLines()) as found:
        response = watched.chat({"x-request-id": "r-1"}, n=2)
    [line] = found
    entry = told(line)
    usage = response.json()["usage"]
    milliseconds = {name: entry.pop(name) for name in list(entry) if name.endswith("_ms")}
    assert milliseconds.keys() == {"queue_ms", "route_ms", "first_token_ms", "total_ms"}
    assert all(value >= 0 for value in milliseconds.values())
    assert milliseconds["total_ms"] >= milliseconds["first_token_ms"]
    assert len(entry.pop("trace_id")) == 32
    assert entry.pop("time").endswith("Z")
    assert 0 < entry.pop("confidence") <= 1
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert entry == {
        "level": "INFO",
        "logger": "mergeroute.requests",
        "request_id": "r-1",
        "key": "anybody",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "auto",
        "stream": False,
        "target": "auto",
        "bank": "zoo",
        "blend": "upper=1",
        "router": "prototype",
        "abstained": 0.0,
        "finish_reasons": [c["finish_reason"] for c in response.json()["choices"]],
        "cold": [],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": cached,
    }


def test_an_error_has_its_code_and_the_same_id(watched: Watched) -> None:
    with lines(JsonLines()) as found:
        response = watched.chat(model="nothing")
    [line] = found
    entry = told(line)
    assert entry["request_id"] == response.headers["x-request-id"]
    assert (entry["status"], entry["error"], entry["model"]) == (404, "model_not_found", "nothing")


def test_a_stream_that_its_reader_leaves_is_499(watched: Watched) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 230,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        lines(JsonLines()) as found,
        watched.client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        next(response.iter_lines())
    [line] = found
    entry = told(line)
    assert (entry["status"], entry["error"]) == (499, "client_closed")
    assert entry["completion_tokens"] < 230


def test_no_line_holds_a_text_or_a_header(watched: Watched) -> None:
    headers = {"Authorization": "Bearer s3cret", "x-session-id": "conv-77", "x-team": "secretive"}
    for formatter in (JsonLines(), TextLines()):
        with lines(formatter) as found:
            said = watched.chat(headers).json()["choices"][0]["message"]["content"]
        assert len(found) == 1
        for secret in (SECRET, said, "s3cret", "conv-77", "secretive"):
            assert secret not in found[0]


def test_texts_are_logged_where_that_is_asked_for(bank: Bank) -> None:
    service = Service(host_banks([bank], Placement(dtype="float32")))
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, "temperature": 0}
    with (
        running(service, telemetry=Telemetry(logs_prompts=True)) as url,
        lines(JsonLines()) as found,
    ):
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    [line] = found
    assert told(line)["prompts"] == [SECRET]
    assert told(line)["completions"] == [response.json()["choices"][0]["text"]]


def test_probes_that_go_well_are_not_told_of(watched: Watched) -> None:
    with lines(JsonLines()) as found:
        watched.get("/health")
        watched.get("/metrics")
        watched.get("/version")
    assert [told(line)["route"] for line in found] == ["/version"]


def test_a_text_line_is_compact(watched: Watched) -> None:
    with lines(TextLines()) as found:
        watched.chat({"x-request-id": "r-2"})
    [line] = found
    assert "INFO mergeroute.requests: POST /v1/chat/completions 200 request_id=r-2" in line
    assert 'blend="upper=1"' in line


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()], ids=["text", "json"])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_nothing_written_by_a_client_breaks_a_line(formatter: logging.Formatter, text: str) -> None:
    hostile = f"a\n2026-01-01 INFO fake: {text}\r\x1b[2J\u2028\u202e\x85\ud800"
    fields = {"method": "POST", "route": "/x", "status": 200, "model": hostile}
    for message in (("%s", RequestLine(fields)), ("a request failed: %s", hostile)):
        record = logging.LogRecord("x", logging.INFO, "f", 1, message[0], (message[1],), None)
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert line == escaped(line)
        if isinstance(formatter, JsonLines) and isinstance(message[1], RequestLine):
            assert json.loads(line)["model"] == hostile
