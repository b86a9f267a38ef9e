"""Floods, deadlines, stalled readers, stops and stalls: the server goes on, and says so."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.pressure import Pressure
from mergeroute.serving.service import Service, ServiceOptions

from .conftest import running, torch_engine
from .process import serving

LONG = {"prompt": "abc", "model": "tiny", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
BRIEF = Pressure(stalled_reader_seconds=0.5, watchdog_seconds=0.6, drain_seconds=1)


@pytest.fixture(scope="module")
def service(bank: Bank) -> Iterator[Service]:
    options = EngineOptions(max_concurrency=2, max_waiting=8)
    made = Service(
        host_banks([bank], Placement(dtype="float32", options=options)),
        ServiceOptions(pressure=BRIEF),
    )
    yield made
    made.stop()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    server = running(service)
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    with server as address:
        yield address


@pytest.fixture
def engine(service: Service) -> TorchEngine:
    return torch_engine(service)


@pytest.fixture
def slow(engine: TorchEngine) -> Iterator[None]:
    """Every step takes a hundredth of a second more."""
    handle = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    yield
    handle.remove()


def post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/v1/completions", json=body, headers=named, timeout=30)


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} seconds"
        time.sleep(0.01)


def is_idle(engine: TorchEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0


def connect(url: str, *, buffer_bytes: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def raw(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


# Deadlines.


@pytest.mark.parametrize("choices", [1, 5])
@pytest.mark.usefixtures("slow")
def test_a_request_that_takes_too_long_is_504(url: str, engine: TorchEngine, choices: int) -> None:
    response = post(url, {**LONG, "n": choices}, x_mergeroute_timeout="0.3")
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("timeout", "timeout_error")
    wait_until(lambda: is_idle(engine))


@pytest.mark.usefixtures("slow")
def test_a_stream_that_takes_too_long_ends_with_an_error(url: str, engine: TorchEngine) -> None:
    response = post(url, {**LONG, "stream": True}, x_mergeroute_timeout="0.3")
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "timeout"
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_no_time_is_400(url: str, given: str) -> None:
    response = post(url, LONG, x_mergeroute_timeout=given)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-mergeroute-timeout"


def test_the_server_grants_no_more_than_its_own_time(bank: Bank) -> None:
    pressure = Pressure(request_timeout_seconds=0.2)
    hosted = host_banks([bank], Placement(dtype="float32"))
    made = Service(hosted, ServiceOptions(pressure=pressure))
    handle = torch_engine(made).model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with running(made) as address:
        assert post(address, LONG).status_code == 504
        assert post(address, LONG, x_mergeroute_timeout="60").status_code == 504
    handle.remove()


# Clients that leave or do not read.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_while_it_is_queued_leaves_the_queue(
    url: str, engine: TorchEngine, stream: bool
) -> None:
    holders = [connect(url) for _ in range(2)]
    for holder in holders:
        holder.sendall(raw(LONG))
    wait_until(lambda: engine.stats().running == 2)
    with connect(url) as queued:
        queued.sendall(raw({**LONG, "stream": stream}))
        wait_until(lambda: engine.stats().waiting == 1)
    wait_until(lambda: engine.stats().waiting == 0)
    assert engine.stats().running == 2
    for holder in holders:
        holder.close()
    wait_until(lambda: is_idle(engine))


def test_a_client_that_leaves_while_it_is_routed_starts_nothing(
    url: str, engine: TorchEngine
) -> None:
    before = engine.stats().prompt_tokens
    with engine._encoding:  # nothing is routed for as long
        with connect(url) as leaving:
            leaving.sendall(raw({**LONG, "model": "auto"}))
            time.sleep(0.2)
        time.sleep(0.2)
    time.sleep(0.2)
    assert is_idle(engine)
    assert engine.stats().prompt_tokens == before


def test_a_client_that_leaves_amid_its_body_is_forgotten(url: str, engine: TorchEngine) -> None:
    with connect(url) as leaving:
        leaving.sendall(raw(LONG)[:-5])
        time.sleep(0.1)
    assert httpx.get(f"{url}/health").status_code == 200
    assert is_idle(engine)


@pytest.mark.usefixtures("slow")
def test_a_reader_that_stalls_is_let_go_and_holds_nobody_up(url: str, engine: TorchEngine) -> None:
    before = engine.stats().generated_tokens
    many = {**LONG, "n": 8, "stream": True, "logprobs": 5}
    with connect(url, buffer_bytes=2048) as stalled:
        stalled.sendall(raw(many))
        wait_until(lambda: engine.stats().running == 2)
        answer = post(url, {**LONG, "max_tokens": 3})
        assert answer.status_code == 200  # the engine goes on meanwhile
        wait_until(lambda: is_idle(engine))
        assert engine.stats().generated_tokens - before < 4 * 200
        assert b"[DONE]" not in b"".join(iter(lambda: stalled.recv(1 << 16), b""))


# Health.


def test_health_follows_the_watchdog_and_recovers(url: str, engine: TorchEngine) -> None:
    assert httpx.get(f"{url}/ready").status_code == 200
    held = threading.Event()
    handle = engine.model.register_forward_pre_hook(lambda *_: held.wait(10) and None)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, url, {**LONG, "max_tokens": 2})
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        error = httpx.get(f"{url}/ready").json()["error"]
        assert "in one step for" in error["message"]
        assert httpx.get(f"{url}/live").json() == {"status": "ok"}
        held.set()
        assert answer.result().status_code == 200
    handle.remove()
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
def test_a_probe_by_a_wrong_method_is_told_of_both(url: str, path: str) -> None:
    refused = httpx.post(f"{url}{path}")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}
    head = httpx.head(f"{url}{path}")
    assert (head.status_code, head.content) == (200, b"")


def test_a_dead_engine_is_not_ready_and_the_process_alive(bank: Bank) -> None:
    made = Service(host_banks([bank], Placement(dtype="float32")))
    with running(made) as address:
        made.stop()
        assert "engine has stopped" in httpx.get(f"{address}/health").text
        assert httpx.get(f"{address}/health").status_code == 503
        assert httpx.head(f"{address}/live").status_code == 200


# Stops.


def spawn(bank: Bank, tmp_path: Path, drain_s: float) -> serving:
    config = tmp_path / "serve.yaml"
    folder = bank.backbone.path.parent
    config.write_text(
        f"banks: [{folder}]\ndtype: float32\nstate: none\nmax_concurrency: 1\n"
        f"pressure: {{drain_seconds: {drain_s}}}\n"
    )
    return serving("serve", "--config", config)


def follow(address: str, ended: list[str], started: threading.Event) -> None:
    """A stream to its end, which takes seconds: many choices, one at a time."""
    body = {**LONG, "stream": True, "n": 12}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            started.set()
            ended[:] = [line] if line else ended


@pytest.mark.parametrize("drain_s", [25, 1])
def test_told_to_stop_it_drains_and_says_so(bank: Bank, tmp_path: Path, drain_s: float) -> None:
    server = spawn(bank, tmp_path, drain_s)
    with server as address:
        ended: list[str] = []
        started = threading.Event()
        running_stream = threading.Thread(target=follow, args=(address, ended, started))
        running_stream.start()
        assert started.wait(20)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        health = httpx.get(f"{address}/health")
        refused = post(address, LONG)
        assert (health.status_code, refused.status_code) == (503, 503)
        assert "shutting down" in health.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{address}/live").status_code == 200
        running_stream.join()
        assert server.process.wait(timeout=20) == 0
    is_whole = ended == ["data: [DONE]"]
    assert is_whole if drain_s > 1 else '"code":"not_ready"' in ended[0]


def test_told_twice_it_quits_at_once(bank: Bank, tmp_path: Path) -> None:
    server = spawn(bank, tmp_path, 60)
    with server as address, connect(address) as holding:
        holding.sendall(raw({**LONG, "n": 100, "stream": True}))
        holding.recv(10)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=2) == 128 + signal.SIGINT


# Many.


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_and_drop(url: str, count: int) -> None:
    """Some say nothing, some begin a request, some make one; none waits for an answer."""
    words = [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", raw(LONG)[:-3], raw(LONG)]
    for number in range(count):
        with connect(url) as dropped:
            dropped.sendall(words[number % 4])


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_connections_that_are_dropped_leave_nothing(
    url: str, engine: TorchEngine, count: int
) -> None:
    assert post(url, {**LONG, "max_tokens": 1}).status_code == 200
    before = open_files()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_and_drop(url, count // 8), range(8)))
    wait_until(lambda: is_idle(engine) and open_files() <= before + 2, seconds=90)
    assert post(url, {**LONG, "max_tokens": 1}).status_code == 200


# What users of such servers complain about.


def test_complaint_06_the_backbones_requests_take_the_untouched_path(
    url: str, engine: TorchEngine
) -> None:
    plans = []
    make: Callable[..., Any] = engine._forward._blend_plan

    def spy(*arguments: Any) -> Any:
        plans.append(make(*arguments))
        return plans[-1]

    vars(engine._forward)["_blend_plan"] = spy
    try:
        assert engine.stats().modules == 2
        assert post(url, {**LONG, "max_tokens": 3}).status_code == 200
        assert plans == [None] * len(plans)
        assert len(plans) >= 3
        assert post(url, {**LONG, "model": "upper", "max_tokens": 1}).status_code == 200
        assert plans[-1] is not None
    finally:
        del vars(engine._forward)["_blend_plan"]


def test_complaint_19_nobodys_choice_of_module_affects_another(url: str) -> None:
    models = ("tiny", "upper", "digit", "blend:upper=0.5,digit=-0.25")
    bodies = [{**LONG, "max_tokens": 12, "model": model} for model in models]

    def text(body: dict[str, Any]) -> str:
        answer = post(url, body)
        assert answer.status_code == 200, answer.text
        found: str = answer.json()["choices"][0]["text"]
        return found

    alone = [text(body) for body in bodies]
    assert len(set(alone)) == len(alone)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(text, bodies * 5))
    assert together == alone * 5


def test_what_is_said_of_a_full_queue(url: str, engine: TorchEngine) -> None:
    response = post(url, {**LONG, "n": 20})
    assert response.status_code == 429
    assert re.fullmatch(r"\d+", response.headers["retry-after"])
    assert 1 <= int(response.headers["retry-after"]) <= 60
    wait_until(lambda: is_idle(engine))
