"""Servers that fail: what clients are told, and that the rest goes on."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from mergeroute.runtime.vllm.blends import module_key

from ...runtime.vllm.fleet import wait_for
from ...tiny import make_model, make_module
from .conftest import Gateway


def states(gateway: Gateway) -> list[str]:
    engine = gateway.service.hosted[0].upstream
    assert engine is not None
    return sorted(state.state for state in engine.states())


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("500", 500, "engine_failed"),
        ("503", 503, "not_ready"),
        ("429", 429, "queue_full"),
        ("html", 500, "engine_failed"),
        ("hang", 504, "timeout"),
        ("too long", 400, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_faults_of_servers_in_our_words(
    gateway: Gateway, fault: str, status: int, code: str, stream: bool
) -> None:
    for fake in gateway.fakes:
        fake.fault, fake.count = fault, 99
    response = gateway.post("/v1/completions", model="upper", prompt="x", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    gateway.reset()
    assert gateway.post("/v1/completions", model="upper", prompt="x").status_code == 200


def test_an_answer_that_lacks_choices_is_none(gateway: Gateway) -> None:
    body = {"model": "upper", "prompt": "x", "n": 2}
    for fake in gateway.fakes:
        fake.fault, fake.count = "fewer", 1
    response = gateway.post("/v1/completions", **body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert "left out 1 of 2 choices" in response.text
    gateway.reset()
    for fake in gateway.fakes:
        fake.fault, fake.count = "empty", 1
        response = gateway.post("/v1/completions", **body)
        assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]
        fake.count = 0


@pytest.mark.parametrize(
    "fault", ["break", "garbage", "error event", "end early", "choices", "usage", "stranger"]
)
def test_what_goes_wrong_amid_a_stream_is_an_error_event(gateway: Gateway, fault: str) -> None:
    for fake in gateway.fakes:
        fake.fault, fake.count = fault, 1
    response = gateway.post("/v1/completions", model="upper", prompt="x", stream=True)
    assert response.status_code == 200
    *_, event = response.text.strip().split("\n\n")
    assert event.startswith("event: error\ndata: ")
    assert json.loads(event.split("data: ")[1])["error"]["code"] == "engine_failed"
    assert "[DONE]" not in response.text
    for fake in gateway.fakes:
        fake.count = 1
    with pytest.raises(openai.APIError):
        list(gateway.openai_client.completions.create(model="upper", prompt="x", stream=True))


def test_no_error_shows_what_servers_call_a_blend(gateway: Gateway) -> None:
    for fake in gateway.fakes:
        fake.lacks.add(gateway.key("upper"))
    response = gateway.post("/v1/completions", model="upper", prompt="x")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "module_unavailable"
    assert gateway.post("/v1/completions", model="digit", prompt="x").status_code == 200
    gateway.reset()
    wait_for(lambda: gateway.post("/v1/completions", model="upper", prompt="x").status_code == 200)


def test_no_error_shows_where_servers_are(gateway: Gateway) -> None:
    for fake in gateway.fakes:
        fake.fault, fake.count = "hang", 99
    texts = [gateway.post("/v1/completions", model="upper", prompt="x").text]
    for fake in gateway.fakes:
        fake.is_ill = True
    wait_for(lambda: states(gateway) == ["lost", "lost"])
    texts += [gateway.post("/v1/completions", model="upper", prompt="x").text]
    texts += [gateway.get(path).text for path in ("/ready", "/metrics")]
    assert "the server vllm-" in texts[0]
    assert "vllm-0 is lost" in texts[2]
    assert not any("127.0.0.1" in text for text in texts)


def test_a_module_that_a_server_cannot_load_is_refused(gateway: Gateway, loras: Path) -> None:
    engine = gateway.service.hosted[0].upstream
    assert engine is not None
    module = make_module(make_model(), "own", seed=90)
    module.save(loras / "own")
    gateway.fakes[1].lacks.add(module_key(module.digest))
    load = {"lora_name": "own", "lora_path": str(loras / "own")}
    response = gateway.post("/v1/load_lora_adapter", **load)
    assert response.status_code == 400, response.text
    told = response.json()["error"]["message"]
    assert "'own' cannot be served by vllm-1" in told
    assert "modules that are not registered" in told  # the server's own reason
    assert gateway.get("/v1/modules/own").status_code == 404
    assert "own" not in {entry["id"] for entry in gateway.get("/v1/models").json()["data"]}
    assert module.digest not in engine.modules.wanted
    assert not any(module.digest in replica.modules for replica in engine.replicas)
    folder = gateway.fakes[0].folder
    assert folder is not None
    assert not (folder / module_key(module.digest)).exists()
    gateway.fakes[1].lacks.clear()
    assert gateway.post("/v1/load_lora_adapter", **load).status_code == 200
    assert gateway.post("/v1/completions", model="own", prompt="x").status_code == 200
    assert gateway.post("/v1/unload_lora_adapter", lora_name="own").status_code == 200
    shutil.rmtree(loras / "own")


def test_many_at_once_while_a_server_goes_ill(gateway: Gateway) -> None:
    """No request is lost: those on the ill server are asked of the other."""
    for fake in gateway.fakes:
        fake.token_s = 0.01
    stop = threading.Event()

    def ask(number: int) -> list[int]:
        codes = []
        while not stop.is_set():
            body = {"model": "upper", "prompt": f"x{number}", "max_tokens": 5}
            codes.append(gateway.post("/v1/completions", **body).status_code)
        return codes

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(6)]
        for _ in range(2):
            gateway.fakes[0].is_ill = True
            wait_for(lambda: states(gateway) == ["lost", "ready"])
            gateway.fakes[0].is_ill = False
            wait_for(lambda: states(gateway) == ["ready", "ready"])
        stop.set()
        codes = [code for one in asking for code in one.result()]
    assert set(codes) == {200}
    assert len(codes) > 12


def test_readiness_follows_the_servers(gateway: Gateway) -> None:
    for fake in gateway.fakes:
        fake.is_ill = True
    wait_for(lambda: gateway.get("/ready").status_code == 503)
    response = gateway.post("/v1/completions", model="upper", prompt="x")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert gateway.get("/live").status_code == 200
    for fake in gateway.fakes:
        fake.is_ill = False
    wait_for(lambda: gateway.get("/ready").status_code == 200)
