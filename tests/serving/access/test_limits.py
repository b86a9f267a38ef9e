"""Limits over HTTP: bodies, headers, prompts, and modules told by their files' headers."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.module_files import CONFIG_FILE, WEIGHTS_FILE
from mergeroute.serving.access.limits import DEFAULT_LIMITS, Limits
from mergeroute.serving.errors import ApiError
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.sizes import check_sizes
from mergeroute.serving.service import Service, ServiceOptions

from ...tiny import make_model, make_module
from ..conftest import running

LIMITS = Limits(
    body_bytes=20_000,
    body_seconds=0.5,
    header_bytes=2048,
    header_seconds=0.5,
    prompts=3,
    choices=4,
    stops=2,
    messages=5,
    prompt_characters=300,
    samples=2,
    module_rank=3,
)


@pytest.fixture(scope="module")
def limited(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("limited")
    make_module(make_model(), "sql", rank=4).save(folder / "sql")
    options = ServiceOptions(module_roots=(folder,), limits=LIMITS)
    with running(Service(host_banks([bank], Placement(dtype="float32")), options)) as url:
        yield url


def post(url: str, path: str = "/v1/completions", **body: object) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30, trust_env=False)


@pytest.mark.parametrize(
    ("body", "param", "setting"),
    [
        ({"prompt": ["a"] * 4}, "prompt", "prompts"),
        ({"prompt": ["a"] * 3, "n": 2}, "n", "choices"),
        ({"prompt": "a", "stop": ["a", "b", "c"]}, "stop", "stops"),
        ({"prompt": "a" * 301}, "prompt", "prompt_characters"),
        ({"prompt": ["a", "b" * 301]}, "prompt", "prompt_characters"),
        ({"messages": [{"role": "user", "content": "a"}] * 6}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": "a" * 151}] * 2}, "messages", "characters"),
    ],
)
def test_what_asks_for_too_much_is_refused_by_name(
    limited: str, body: dict[str, object], param: str, setting: str
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    for where in (path, "/v1/route"):
        answer = post(limited, where, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert setting in answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_413(limited: str) -> None:
    answer = post(limited, prompt="a" * 20_000)
    assert answer.status_code == 413
    assert "limits.body_bytes" in answer.json()["error"]["message"]
    assert post(limited, prompt="a", max_tokens=1).status_code == 200


def connected(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=10)


def test_a_body_that_does_not_arrive_is_given_up(limited: str) -> None:
    with connected(limited) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: slow.recv(65536), b""))  # until it is closed
        assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * 301}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 151}] * 2}, "messages"),
        ("/tokenize", {"messages": [0] * 6}, "messages"),
        ("/v1/chat/completions", {"messages": [0] * 6}, "messages"),
        ("/v1/embeddings", {"input": ["a", "b" * 301]}, "input"),
    ],
)
def test_texts_and_messages_are_counted_before_they_are_looked_at(
    limited: str, path: str, body: dict[str, object], param: str
) -> None:
    answer = post(limited, path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "limits." in answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n"])
def test_headers_that_do_not_arrive_are_given_up(limited: str, sent: bytes) -> None:
    with connected(limited) as slow:
        slow.sendall(sent)
        started = time.monotonic()
        assert slow.recv(65536) == b""
        assert 0.3 < time.monotonic() - started < 5


def test_a_second_requests_headers_are_given_up_too(limited: str) -> None:
    with connected(limited) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /heal")
        started = time.monotonic()
        while slow.recv(65536):
            pass
        assert time.monotonic() - started < 3  # before uvicorn's own 5 s for idle ones


def test_headers_over_the_limit_are_refused(limited: str) -> None:
    with connected(limited) as large:
        large.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nx-a: " + b"a" * 4096)
        assert large.recv(65536).startswith(b"HTTP/1.1 400")


def test_a_module_over_the_limits_is_refused_before_it_is_read(limited: str) -> None:
    body = {"lora_name": "sql", "lora_path": "sql"}
    answer = post(limited, "/v1/load_lora_adapter", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "lora_rank_limit_exceeded"
    answer = post(limited, "/v1/load_lora_adapter", **body, samples=["a", "b", "c"])
    assert answer.json()["error"]["param"] == "samples"


def test_limits_beyond_what_the_engine_takes_are_refused() -> None:
    for values in ({"stops": 17}, {"choices": 129}, {"samples": 1001}, {"prompt": 1}):
        with pytest.raises(ValidationError):
            Limits.model_validate(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_module(make_model(), "sql").save(tmp_path / "sql")
    return tmp_path / "sql"


def header(entries: object, *, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def test_a_module_as_it_is_saved_passes(folder: Path) -> None:
    check_sizes(folder, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a pickle in a zip",
        header({}, length=1 << 62),
        header({}, length=0),
        header([]),
        struct.pack("<Q", 5) + b"{{{{{",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header({"a": F32}),
        header({"a": F32}, data=b"\0" * 17),
        header({"a": 5}),
        header({"a": {**F32, "dtype": "F4_SECRET"}}, data=b"\0" * 16),
        header({"a": {**F32, "shape": [-2, -2]}}, data=b"\0" * 16),
        header({"a": {**F32, "shape": [1 << 60, 1 << 60]}}, data=b"\0" * 16),
        header({"a": {**F32, "shape": [True, 4]}}, data=b"\0" * 16),
        header({"a": {**F32, "shape": [9] * 1_000_000}}, data=b"\0" * 16),  # no product ends
        header({"a" * 513: F32}, data=b"\0" * 16),
        header({"a": {**F32, "data_offsets": [16, 0]}}, data=b"\0" * 16),
        header({f"t{n}": {**F32, "shape": [0], "data_offsets": [0, 0]} for n in range(20_001)}),
    ],
)
def test_complaint_17_a_file_that_is_not_what_it_says_is_refused(
    folder: Path, content: bytes
) -> None:
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ApiError) as caught:
        check_sizes(folder, DEFAULT_LIMITS)
    assert (caught.value.status, caught.value.code) == (400, "invalid_lora_adapter")
    assert WEIGHTS_FILE in str(caught.value)


def test_a_huge_file_is_refused_without_being_read(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # holes: it takes no room
    started = time.monotonic()
    with pytest.raises(ApiError, match="module_bytes"):
        check_sizes(folder, DEFAULT_LIMITS)
    assert time.monotonic() - started < 1


def test_a_pipe_that_came_after_the_paths_check_is_not_waited_for(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    with pytest.raises(ApiError, match="no regular file"):
        check_sizes(folder, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "a?a?a?aaa",
        "(.*)*",
        "(a{1,9}){1,9}",
        r"(.|\w)+!",
        r"(.|\w)" * 30 + "!",
        "(ab|.b|..)" * 9 + "!",
        "a|" * 1000,
    ],
)
def test_patterns_that_never_end_are_refused(folder: Path, pattern: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "rank_pattern": {pattern: 4}}))
    with pytest.raises(ApiError, match="rank_pattern"):
        check_sizes(folder, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "pattern",
    [
        ".*q_proj",
        r"layers\.(1|2)\.(q|k)_proj",
        "^model.up_proj",
        r".*\.(0|1|2)\.(self_attn|mlp)\.(q|k|v|o|up)_proj",
    ],
)
def test_patterns_that_are_in_use_pass(folder: Path, pattern: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "rank_pattern": {pattern: 4}}))
    check_sizes(folder, DEFAULT_LIMITS)


def test_prompts_and_keys_are_not_in_the_log(
    limited: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "xyzzy-prompt"
    with caplog.at_level(logging.DEBUG):
        post(limited, prompt=secret, max_tokens=2)
        post(limited, prompt=secret, max_tokens=-2)
        post(limited, prompt={secret: 1})
        post(limited, prompt=[secret, 1])
        post(limited, "/v1/chat/completions", messages=[{"role": secret, "content": secret}])
        post(limited, "/v1/chat/completions", messages=[{"role": "user", "content": [secret]}])
        post(limited, "/v1/route", prompt=secret)
        post(limited, "/tokenize", prompt=secret)
    shown = [r.getMessage() for r in caplog.records if r.name.startswith(("mergeroute", "uvicorn"))]
    assert shown
    assert not any(secret in line for line in shown)
