"""What clients may rely on, whatever runs the models: float32, so that texts are exact."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from .conftest import LATE, Conforming

PROMPT = "abc def"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}


def complete(served: Conforming, model: str = "loud", **more: Any) -> Any:
    options = {**GREEDY, "prompt": PROMPT, **more}
    options["extra_body"] = {**GREEDY["extra_body"], **more.get("extra_body", {})}
    return served.client.completions.create(model=model, **options)


def chat(served: Conforming, model: str = "loud", **more: Any) -> Any:
    options = {**GREEDY, "messages": MESSAGES, **more}
    return served.client.chat.completions.create(model=model, **options)


def shown(text: str) -> str:
    """Without what stands for half a character at the end: only one of the engines shows it."""
    return text.rstrip("\ufffd")


BLENDS = {
    "tiny": {},
    "loud": {"loud": 1.0},
    "pair:terse": {"terse": 1.0},
    "blend:loud=0.5,terse=-0.25": {"loud": 0.5, "terse": -0.25},
    "blend:loud=2,terse=0.75": {"loud": 2.0, "terse": 0.75},
}


@pytest.mark.parametrize("model", BLENDS)
def test_blends_are_those_of_the_merged_model(conforming: Conforming, model: str) -> None:
    answer = complete(conforming, model)
    assert shown(answer.choices[0].text) == shown(conforming.expected(PROMPT, BLENDS[model], 10))
    assert answer.model == model
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_blends_do_not_mix_in_a_batch(conforming: Conforming) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [model for _ in range(3) for model in BLENDS]
        found = list(pool.map(lambda model: complete(conforming, model).choices[0].text, asked))
    expected = {model: conforming.expected(PROMPT, BLENDS[model], 10) for model in BLENDS}
    assert list(map(shown, found)) == [shown(expected[model]) for model in asked]


def test_a_blend_in_the_body_is_the_same(conforming: Conforming) -> None:
    body = {"blend": {"loud": 0.503, "terse": -0.25}}
    response = conforming.http.post(
        "/v1/completions",
        json={"model": "auto", "prompt": PROMPT, "temperature": 0, "max_tokens": 10, **body},
    )
    assert response.headers["x-mergeroute-blend"] == "loud=0.5,terse=-0.25"
    same = complete(conforming, "blend:loud=0.5,terse=-0.25", extra_body={"ignore_eos": False})
    assert response.json()["choices"][0]["text"] == same.choices[0].text


def test_a_chat_tells_who_answered(conforming: Conforming) -> None:
    raw = conforming.client.chat.completions.with_raw_response.create(
        model="loud", messages=MESSAGES, **GREEDY
    )
    answer = raw.parse()
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.model == "loud"
    assert raw.headers["x-mergeroute-target"] == "loud"
    assert raw.headers["x-mergeroute-blend"] == "loud=1"
    assert raw.headers["x-mergeroute-bank"].startswith("sha256:")
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("mr-")


def test_a_chat_streams_the_same(conforming: Conforming) -> None:
    whole = chat(conforming).choices[0].message.content
    chunks = list(chat(conforming, stream=True, stream_options={"include_usage": True}))
    *said, last = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in said) == whole
    assert said[-1].choices[0].finish_reason == "length"
    assert {c.model for c in chunks} == {"loud"}
    assert len({c.id for c in chunks}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens == 10
    assert last.usage.total_tokens == 10 + last.usage.prompt_tokens


def test_a_text_streams_the_same(conforming: Conforming) -> None:
    whole = complete(conforming).choices[0].text
    chunks = list(complete(conforming, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert all(c.usage is None for c in chunks)


def test_a_stop_text_ends_it_and_is_left_out(conforming: Conforming) -> None:
    prompts = (f"{PROMPT} {number}" for number in range(20))  # some answers repeat themselves
    answers = ((prompt, complete(conforming, prompt=prompt).choices[0].text) for prompt in prompts)
    prompt, whole, place = next(
        (prompt, text, place)
        for prompt, text in answers
        for place in range(2, len(text))
        if text[place] not in text[:place] + "\ufffd"
    )
    answer = complete(conforming, prompt=prompt, stop=whole[place])
    assert answer.choices[0].text == whole[:place]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_again(conforming: Conforming) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    first, again, other = (
        complete(conforming, seed=seed, **drawn).choices[0].text for seed in (7, 7, 8)
    )
    assert first == again != other


def test_n_choices_differ_and_are_counted(conforming: Conforming) -> None:
    answer = complete(conforming, n=3, seed=5, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 30
    assert answer.usage.prompt_tokens == len(PROMPT)
    chunks = list(complete(conforming, n=3, seed=5, temperature=1.5, stream=True))
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_several_prompts_are_several_choices(conforming: Conforming) -> None:
    prompts = ["abc", "hello there"]
    answer = complete(conforming, prompt=prompts)
    expected = [conforming.expected(prompt, {"loud": 1}, 10) for prompt in prompts]
    assert [shown(choice.text) for choice in answer.choices] == list(map(shown, expected))
    ids = [[ord(letter) for letter in "abc"]]
    by_ids = complete(conforming, prompt=ids)
    assert by_ids.usage.prompt_tokens == 3


def test_logprobs_are_of_the_blend(conforming: Conforming) -> None:
    answer = chat(conforming, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 10
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0
    other = chat(conforming, "terse", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [e.logprob for e in other] != [e.logprob for e in content]
    text = complete(conforming, logprobs=2).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == 10


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "model_not_found"),
        ({"model": "blend:nobody=1", "prompt": "x"}, 404, "model_not_found"),
        ({"model": "loud", "prompt": "x", "temprature": 1}, 400, "unsupported_parameter"),
        ({"model": "loud", "prompt": "x" * 300}, 400, "context_length_exceeded"),
        ({"model": "loud", "prompt": "x" * 250, "max_tokens": 20}, 400, "context_length_exceeded"),
        ({"model": "loud", "prompt": "x", "temperature": -1}, 400, None),
        ({"model": "loud", "prompt": "x", "n": 0}, 400, None),
        ({"model": "loud"}, 400, None),
        ({"model": "loud", "prompt": "x", "blend": {"loud": 1}}, 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_same(
    conforming: Conforming, body: dict[str, Any], status: int, code: str | None, stream: bool
) -> None:
    response = conforming.http.post("/v1/completions", json={**body, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_the_models_are_ours(conforming: Conforming) -> None:
    listed = [model.id for model in conforming.client.models.list()]
    assert set(listed) == {"auto", "tiny", "pair", "loud", "terse"}
    assert conforming.client.models.retrieve("loud").id == "loud"
    for path in ("/adapters", "/invocations", "/sleep", "/v1/load_lora_adapter/x"):
        assert conforming.http.post(path, json={}).status_code in (404, 405)


_HALVES = {LATE: 0.5, "loud": 0.5}


def test_a_module_comes_and_goes(conforming: Conforming) -> None:
    load = {"lora_name": LATE, "lora_path": str(conforming.folder / "loras" / LATE)}
    with pytest.raises(openai.NotFoundError):
        complete(conforming, LATE)
    response = conforming.http.post("/v1/load_lora_adapter", json=load)
    assert response.status_code == 200, response.text
    try:
        for model, blend in ((LATE, {LATE: 1.0}), ("blend:late=0.5,loud=0.5", _HALVES)):
            text = complete(conforming, model).choices[0].text
            assert shown(text) == shown(conforming.expected(PROMPT, blend, 10))
    finally:
        unload = conforming.http.post("/v1/unload_lora_adapter", json={"lora_name": LATE})
    assert unload.status_code == 200
    with pytest.raises(openai.NotFoundError):
        complete(conforming, LATE)


def test_clients_that_leave_free_their_places(conforming: Conforming) -> None:
    """Several at once and again: an answer may be there before anybody sees its client leave."""
    body = {"model": "loud", "prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True}
    url, count = conforming.url + "/v1/completions", 8

    def leave(_: int) -> None:
        with httpx.stream("POST", url, json=body, timeout=60) as got:
            next(got.iter_bytes())

    def computed() -> float:
        _, before = conforming.work()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(leave, range(count)))
        deadline = time.monotonic() + 20
        while conforming.service.hosted[0].engine.stats().running or conforming.work()[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return conforming.work()[1] - before

    assert any(count <= computed() < 240 * count for _ in range(5))
    assert complete(conforming).usage.completion_tokens == 10


def test_many_at_once_are_all_answered(conforming: Conforming) -> None:
    """More than run at once."""

    def ask(number: int) -> str:
        prompt = f"number {number}"
        text: str = complete(conforming, prompt=prompt).choices[0].text
        return text

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    expected = [conforming.expected(f"number {k}", {"loud": 1}, 10) for k in range(20)]
    assert list(map(shown, found)) == list(map(shown, expected))


def test_json_that_is_asked_for_is_json(conforming: Conforming) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = chat(
        conforming,
        response_format=form,
        max_tokens=40,
        extra_body={},
    )
    text = answer.choices[0].message.content
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text)["a"], bool)
    else:  # a weak model may fill it with white space
        assert text.strip().startswith("{")


def test_a_preview_is_what_is_served(conforming: Conforming) -> None:
    for model in BLENDS:
        body = {"model": model, "prompt": PROMPT}
        shown = conforming.http.post("/v1/route", json=body).json()
        served = conforming.http.post("/v1/completions", json={**body, "max_tokens": 1})
        told = served.headers["x-mergeroute-blend"]
        weights = [] if told == "none" else [part.split("=") for part in told.split(",")]
        assert shown["blend"] == {name: float(weight) for name, weight in weights}
