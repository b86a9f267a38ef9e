"""Bodies passed on: what the servers see, and what clients get, through the real client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.digest import short

from ...runtime.vllm.fleet import wait_for
from ..conftest import chat_ids
from .conftest import Gateway

CHAT = "/v1/chat/completions"
UPPER, DIGIT = "shout the word 7", "0 1 2 3 4 9"


def message(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


def events_of(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


@pytest.mark.parametrize(("prompt", "module"), [(UPPER, "upper"), (DIGIT, "digit")])
def test_auto_goes_to_the_blend_that_the_router_picks(
    gateway: Gateway, prompt: str, module: str
) -> None:
    raw = gateway.openai_client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=4
    )
    answer = raw.parse()
    assert [body["model"] for body in gateway.seen] == [f"blend:{gateway.key(module)}=1"]
    assert raw.headers["x-mergeroute-blend"] == f"{module}=1"
    assert raw.headers["x-mergeroute-target"] == "auto"
    assert raw.headers["x-mergeroute-router"] == "prototype"
    assert answer.model == "auto"
    assert short(gateway.bank.digest) in str(answer.system_fingerprint)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_the_preview_is_what_is_served(gateway: Gateway) -> None:
    for body in (
        {"model": "auto", "messages": message(UPPER)},
        {"model": "blend:upper=0.5,digit=-0.25", "prompt": "x"},
        {"model": "auto", "messages": message("hm"), "blend": {"digit": 0.503}},
    ):
        shown = gateway.post("/v1/route", **body, tools=[], response_format={"type": "text"})
        path = CHAT if "messages" in body else "/v1/completions"
        answered = gateway.post(path, **body, max_tokens=1)
        told = dict(part.split("=") for part in answered.headers["x-mergeroute-blend"].split(","))
        assert shown.json()["blend"] == {name: float(weight) for name, weight in told.items()}
        (seen,) = gateway.seen  # the preview asked no server
        sent = str(seen["model"])
        assert all(f"{gateway.key(name)}={weight}" in sent for name, weight in told.items())
        gateway.reset()


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        ("upper", "blend:{upper}=1"),
        ("zoo:digit", "blend:{digit}=1"),
        ("tiny", "backbone"),
        ("blend:upper=0.75", "blend:{upper}=0.75"),
    ],
)
def test_every_kind_of_target_is_sent_by_content_and_comes_back_by_name(
    gateway: Gateway, model: str, sent: str
) -> None:
    answer = gateway.post("/v1/completions", model=model, prompt="x", max_tokens=2)
    expected = sent.format(upper=gateway.key("upper"), digit=gateway.key("digit"))
    assert [body["model"] for body in gateway.seen] == [expected]
    assert answer.json()["model"] == model
    assert "blend:" + gateway.key("upper") not in answer.text


def test_what_we_do_not_know_goes_through_and_what_is_ours_does_not(gateway: Gateway) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    passed = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": UPPER},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "anything": 1}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ],
        "tools": tools,
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        "structured_outputs": {"regex": "a+"},
        "cache_salt": "salt",
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0.5,
        "seed": 7,
        "n": 2,
        "max_tokens": 3,
        "user": "somebody",
    }
    ours = {"model": "auto", "blend": {"upper": 1}, "conversation": "c-1", "metadata": {"a": "b"}}
    response = gateway.post(CHAT, **passed, **ours)
    assert response.status_code == 200, response.text
    (seen,) = gateway.seen
    assert seen == {**passed, "metadata": {"a": "b"}, "model": f"blend:{gateway.key('upper')}=1"}
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]
    assert response.json()["kv_transfer_params"] is None


def test_a_field_that_nobody_knows_is_refused_by_name(gateway: Gateway) -> None:
    response = gateway.post(CHAT, messages=message("x"), temprature=1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temprature"
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert "kv_transfer" in gateway.post(CHAT, messages=message("x"), kv_transfer_params={}).text
    both: list[dict[str, Any]] = [
        {"ec_transfer_params": {}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
    ]
    for passed in both:
        refused = gateway.post(CHAT, messages=message("x"), **passed).json()["error"]
        assert refused["param"].endswith("_transfer_params")
        assert refused["code"] == "unsupported_parameter"
    assert gateway.seen == []
    accepted = gateway.post(CHAT, messages=message("x"), store=False, suffix="", max_tokens=2)
    assert accepted.status_code == 200


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_no_number_of_json_is_refused(gateway: Gateway, number: str) -> None:
    body = f'{{"model": "upper", "prompt": "x", "temperature": {number}}}'
    response = gateway.http.post("/v1/completions", content=body)
    assert (response.status_code, gateway.seen) == (400, [])
    assert "NaN or Infinity" in response.text


def test_of_a_field_that_is_there_twice_the_last_one_counts(gateway: Gateway) -> None:
    body = '{"model": "digit", "prompt": "x", "max_tokens": 2, "model": "upper"}'
    response = gateway.http.post("/v1/completions", content=body)
    assert response.json()["model"] == "upper"
    assert [seen["model"] for seen in gateway.seen] == [f"blend:{gateway.key('upper')}=1"]


def test_a_stream_names_the_target_in_every_chunk(gateway: Gateway) -> None:
    body = {"model": "auto", "messages": message(UPPER), "max_tokens": 5}
    whole = gateway.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    response = gateway.post(CHAT, **body, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-mergeroute-blend"] == "upper=1"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"auto"}
    assert len({chunk["system_fingerprint"] for chunk in chunks}) == 1
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole
    assert "\u2028" in whole


def test_a_stream_ends_with_its_usage_where_asked(gateway: Gateway) -> None:
    stream = gateway.openai_client.chat.completions.create(
        model="digit",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.model == "digit"
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_with_different_blends_are_several_calls_and_one_answer(
    gateway: Gateway, stream: bool
) -> None:
    backbone = gateway.bank.backbone
    prompts = [list(chat_ids(backbone, text)) for text in (UPPER, DIGIT, f"{UPPER}7", f"{DIGIT}1")]
    routed = [gateway.post("/v1/route", prompt=p).json()["blend"] for p in prompts]
    gateway.reset()
    body = {"prompt": prompts, "n": 2, "max_tokens": 3, "stream_options": {"include_usage": True}}
    if not stream:
        del body["stream_options"]
    response = gateway.post("/v1/completions", **body, stream=stream)
    assert response.status_code == 200, response.text
    distinct = {json.dumps(blend) for blend in routed}
    assert len(gateway.seen) == len(distinct) > 1
    expected = {}
    for number, (prompt, blend) in enumerate(zip(prompts, routed, strict=True)):
        model = {"model": "auto", "blend": blend}
        alone = gateway.post("/v1/completions", **model, prompt=[prompt], n=2, max_tokens=3)
        for choice in alone.json()["choices"]:
            expected[2 * number + choice["index"]] = choice["text"]
    texts = dict.fromkeys(range(8), "")
    documents = events_of(response.text)[:-1] if stream else [response.json()]
    for document in documents:
        for choice in document["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert documents[-1]["usage"]["completion_tokens"] == 24
    assert documents[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * len(distinct)
    assert "; " in response.headers["x-mergeroute-blend"]


def test_an_unknown_module_is_404_and_reaches_no_server(gateway: Gateway) -> None:
    for model in ("nobody", "blend:nobody=1"):
        response = gateway.post("/v1/completions", model=model, prompt="x")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.seen == []


def test_what_is_too_long_is_refused_here(gateway: Gateway) -> None:
    response = gateway.post("/v1/completions", model="upper", prompt="x" * 300)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert gateway.seen == []


def test_what_vllm_cannot_do_is_refused_by_name(gateway: Gateway) -> None:
    routed = gateway.post(CHAT, messages=message("x"), routing="arrow")
    assert routed.json()["error"]["param"] == "routing"
    assert "torch engine" in routed.text
    embedded = gateway.post("/v1/embeddings", model="tiny", input="x")
    assert embedded.status_code == 400
    assert "torch engine" in embedded.text


def test_routes_of_servers_are_not_those_of_the_gateway(gateway: Gateway) -> None:
    listed = gateway.get("/v1/models").json()["data"]
    assert {entry["id"] for entry in listed} == {"auto", "tiny", "zoo", "upper", "digit"}
    for path in ("/adapters", "/invocations", "/fake", "/pause", "/collective_rpc", "/sleep"):
        assert gateway.post(path).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_server(gateway: Gateway, stream: bool) -> None:
    for fake in gateway.fakes:
        fake.token_s = 0.02
    body = {"model": "upper", "prompt": "x", "max_tokens": 40, "stream": stream}
    if stream:
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body) as got:
            next(got.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(gateway.url + "/v1/completions", json=body, timeout=0.2)
    engine = gateway.service.hosted[0].upstream
    assert engine is not None
    wait_for(lambda: engine.replicas.in_flight == 0)
    wait_for(lambda: not engine.replicas.in_use)
    if stream:
        wait_for(lambda: sum(fake.aborted for fake in gateway.fakes) == 1)


def test_a_deadline_ends_a_stream(gateway: Gateway) -> None:
    for fake in gateway.fakes:
        fake.token_s = 0.05
    body = {"model": "upper", "prompt": "x", "max_tokens": 100, "stream": True}
    headers = {"x-mergeroute-timeout": "0.3"}
    response = httpx.post(gateway.url + "/v1/completions", json=body, headers=headers)
    *_, event = response.text.strip().split("\n\n")
    assert json.loads(event.split("data: ")[1])["error"]["code"] == "timeout"


def test_metrics_and_log_tell_what_servers_told(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    def total(name: str) -> float:
        lines = gateway.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = total("mergeroute_completion_tokens_total")
    with caplog.at_level("INFO", logger="mergeroute.requests"):
        gateway.post(CHAT, model="auto", messages=message(UPPER), max_tokens=7)
        gateway.post(CHAT, model="auto", messages=message(UPPER), max_tokens=7, stream=True)
        wait_for(lambda: sum("completion_tokens=7" in line for line in caplog.messages) == 2)
    wait_for(lambda: total("mergeroute_completion_tokens_total") == before + 14)


def test_modules_come_and_go_while_requests_run(gateway: Gateway, loras: Path) -> None:
    load = {"lora_name": "late", "lora_path": str(loras / "upper")}
    assert gateway.post("/v1/completions", model="late", prompt="x").status_code == 404
    assert gateway.post("/v1/load_lora_adapter", **load).status_code == 200
    assert gateway.post("/v1/completions", model="late", prompt="x").json()["model"] == "late"
    listed = gateway.get("/v1/modules/late").json()
    assert (listed["state"], listed["rank"]) == ("resident", 4)
    assert gateway.post("/v1/unload_lora_adapter", lora_name="late").status_code == 200
    assert gateway.post("/v1/completions", model="late", prompt="x").status_code == 404
    assert gateway.post("/v1/completions", model="upper", prompt="x").status_code == 200


def test_metrics_tell_of_each_server(gateway: Gateway) -> None:
    lines = gateway.get("/metrics").text.splitlines()
    for name in ("ready", "requests", "restarts_total", "modules"):
        found = [line for line in lines if line.startswith(f"mergeroute_replica_{name}{{")]
        assert len(found) == 2
        assert all('backbone="tiny"' in line for line in found)
    assert "vllm:num_requests_running" not in gateway.get("/metrics").text
