"""Every dialect's request is answered as our own words for it are, or refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from mergeroute.serving.schemas.completions import ChatRequest, CompletionRequest
from mergeroute.serving.validation import validate

from .conftest import Served

PROMPT = "shout the word 7"
MESSAGES = [{"role": "user", "content": PROMPT}]
MERGED: dict[str, Any] = {"ids": ["upper", "digit"], "weights": [0.5, -0.25]}
BLEND = {"upper": 0.5, "digit": -0.25}


def post(served: Served, body: object, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=30)


def ask(served: Served, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    asked = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    return post(served, {"temperature": 0, "max_tokens": 12, **asked, **body}, path)


SPOKEN: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"adapter_id": "upper"}, {"upper": 1}),
    ({"adapter_id": "zoo:digit", "adapter_source": "local"}, {"digit": 1}),
    ({"adapter_id": "__base_model__"}, {}),
    ({"adapter_id": ""}, {}),
    ({"adapter": "digit", "model": "tiny"}, {"digit": 1}),
    ({"merged_adapters": MERGED}, BLEND),
    ({"merged_adapters": {**MERGED, "merge_strategy": "linear", "density": 0.0}}, BLEND),
    ({"merged_adapters": {"ids": ["upper", "digit"]}}, {"upper": 1, "digit": 1}),
    ({"model": "tiny:upper"}, {"upper": 1}),
    ({"lora": [{"id": 0, "scale": 0.5}]}, {"upper": 0.5}),
    ({"lora": [{"id": 1, "scale": -0.25}, {"id": 0, "scale": 0.5}], "model": "zoo"}, BLEND),
    ({"lora": []}, {}),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("spoken", "blend"), SPOKEN)
def test_each_dialect_is_answered_as_our_own_words(
    served: Served, path: str, spoken: dict[str, Any], blend: dict[str, Any]
) -> None:
    theirs, ours = ask(served, path, **spoken), ask(served, path, blend=blend)
    assert theirs.status_code == ours.status_code == 200
    assert theirs.json()["choices"] == ours.json()["choices"]
    assert theirs.headers["x-mergeroute-blend"] == ours.headers["x-mergeroute-blend"]
    assert theirs.json()["model"] == spoken.get("model", "auto")
    told = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}
    preview = post(served, {**told, **spoken}, "/v1/route").json()
    assert preview["blend"] == {name: weight for name, weight in blend.items() if weight}


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"blend": {"upper": 1}, "merged_adapters": MERGED}, 400, "merged_adapters", "blend and"),
        ({"adapter_id": "upper", "merged_adapters": MERGED}, 400, "merged_adapters", "one of them"),
        ({"adapter": "upper", "lora": []}, 400, "lora", "adapter and lora"),
        ({"adapter_id": "upper", "model": "digit"}, 400, "adapter_id", "adapter_id goes with"),
        ({"adapter_id": "upper", "routing": "arrow"}, 400, "routing", "not with adapter_id"),
        ({"adapter_id": "nobody"}, 404, "adapter_id", "nobody"),
        ({"adapter_id": "upper", "adapter_source": "hub"}, 400, "adapter_source", "local"),
        ({"adapter_id": "upper", "api_token": "t"}, 400, "api_token", "api_token"),
        ({"adapter": {"generation": "g"}}, 400, "adapter", "adapter"),
        ({"lora_path": "upper"}, 400, "lora_path", "lora_path"),
        ({"merged_adapters": {**MERGED, "ids": ["upper", "x"]}}, 404, "merged_adapters", "'x'"),
        ({"merged_adapters": {**MERGED, "weights": [1]}}, 400, "merged_adapters.weights", "2 ids"),
        ({"merged_adapters": {"ids": []}}, 400, "merged_adapters.ids", "at least 1"),
        ({"merged_adapters": {"ids": ["upper"] * 2}}, 400, "merged_adapters", "twice"),
        (
            {"merged_adapters": {"ids": ["upper"], "weights": [9]}},
            400,
            "merged_adapters",
            "between -8 and 8",
        ),
        (
            {"merged_adapters": {**MERGED, "density": 2}},
            400,
            "merged_adapters.density",
            "at most 1",
        ),
        ({"lora": [{"id": 2, "scale": 1}]}, 404, "lora", "number 2"),
        ({"lora": [{"id": -1, "scale": 1}]}, 400, "lora.0.id", "at least 0"),
        ({"lora": [{"id": 0, "scale": 1}] * 2}, 400, "lora", "twice"),
        ({"lora": [{"id": 0, "scale": 99}]}, 400, "lora", "between -8 and 8"),
        ({"lora": [{"id": 0}]}, 400, "lora.0.scale", "is required"),
        ({"model": "tiny:nobody"}, 404, "model", "tiny:nobody"),
    ],
)
def test_what_a_dialect_cannot_have_is_refused_by_name(
    served: Served, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = ask(served, **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_merges_that_need_time_point_to_the_build(served: Served, strategy: str) -> None:
    merged = {**MERGED, "merge_strategy": strategy, "density": 0.2}
    error = ask(served, merged_adapters=merged).json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert "mergeroute build" in error["message"]


def test_complaint_04_two_scales_in_one_batch_differ(served: Served) -> None:
    answers = [ask(served, adapter_id="upper"), ask(served, lora=[{"id": 0, "scale": -2.0}])]
    first, second = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert first != second


def test_complaint_19_state_is_never_global(served: Served) -> None:
    listed = httpx.get(f"{served.url}/lora-adapters").json()
    assert listed == [
        {"id": 0, "path": "zoo:upper", "scale": 0.0},
        {"id": 1, "path": "zoo:digit", "scale": 0.0},
    ]
    before = ask(served, model="tiny").json()["choices"]
    assert ask(served, lora=[{"id": 0, "scale": 1.0}]).status_code == 200
    refused = post(served, [{"id": 0, "scale": 1.0}], "/lora-adapters")
    assert refused.status_code == 405
    assert "give each request its own" in refused.json()["error"]["message"]
    assert ask(served, model="tiny").json()["choices"] == before
    assert httpx.get(f"{served.url}/lora-adapters").json() == listed


TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
HONOURED_OR_REFUSED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0.5,),
    "presence_penalty": (0.5,),
    "logit_bias": ({"5": 1},),
    "logprobs": (True,),
    "max_completion_tokens": (3,),
    "max_tokens": (3,),
    "metadata": ({"a": "b"}, {"a": "b" * 600}, {str(k): "v" for k in range(17)}),
    "n": (2,),
    "parallel_tool_calls": (True, False),
    "prediction": ({"type": "content", "content": "x"},),
    "reasoning_effort": ("high", "none"),
    "response_format": ({"type": "text"}, {"type": "json_object"}, SCHEMA),
    "seed": (1,),
    "service_tier": ("auto", "default", "flex", "priority"),
    "stop": ("x", ["a", "b"]),
    "store": (False, True),
    "stream": (True,),
    "temperature": (0.5,),
    "tool_choice": ("auto", "required"),
    "tools": ([], [TOOL]),
    "top_p": (0.5,),
    "user": ("me",),
    "prompt_cache_key": ("k",),
    "safety_identifier": ("s",),
    "verbosity": ("medium", "low"),
    "modalities": (["text"], ["audio"]),
    "audio": ({"voice": "alloy", "format": "wav"},),
    "web_search_options": ({},),
    "prompt_cache_retention": ("24h",),
    "functions": ([], [{"name": "f"}]),
    "function_call": ("auto", {"name": "f"}),
    "suffix": ("", "x"),
    "best_of": (1, 2),
    "skip_special_tokens": (True, False),
    "include_stop_str_in_output": (False, True),
    "truncate_prompt_tokens": (5,),
    "min_tokens": (1,),
    "length_penalty": (1.0, 2.0),
    "use_beam_search": (False, True),
    "chat_template": ("x",),
    "guided_json": ({},),
    "no_such_parameter": (1,),
}


@pytest.mark.parametrize("name", HONOURED_OR_REFUSED)
def test_every_parameter_is_honoured_or_refused_by_name(served: Served, name: str) -> None:
    for value in HONOURED_OR_REFUSED[name]:
        asked = {"messages": MESSAGES, "max_tokens": 2, name: value}
        if name == "max_completion_tokens":
            del asked["max_tokens"]
        answer = post(served, asked)
        if answer.status_code == 200:
            continue
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"] or "").partition(".")[0] in {name, "tools"}
        assert name in error["message"] or error["param"].startswith(name) or name == "tool_choice"


REFUSED: tuple[tuple[str, Any], ...] = (
    ("prediction", {"type": "content", "content": "x"}),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("store", True),
    ("service_tier", "flex"),
    ("best_of", 2),
    ("suffix", "x"),
    ("skip_special_tokens", False),
    ("include_stop_str_in_output", True),
    ("truncate_prompt_tokens", 5),
)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_is_not_done_is_never_ignored(served: Served, name: str, value: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        error = ask(served, path, **{name: value}).json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_chat_templates_are_told_what_they_may_look_at(served: Served) -> None:
    def count(**more: Any) -> int:
        told = ask(served, model="tiny", **more)
        assert told.status_code == 200, told.text
        tokens: int = told.json()["usage"]["prompt_tokens"]
        return tokens

    plain = count()
    assert count(add_generation_prompt=False) == plain - 1
    assert count(chat_template_kwargs={"enable_thinking": False}) == plain
    begun = [*MESSAGES, {"role": "assistant", "content": "SHOUT"}]
    assert count(messages=begun, continue_final_message=True) == plain + len("assistant:SHOUT")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "chat_template_kwargs"),
        *(
            ({"chat_template_kwargs": {name: 1}}, "chat_template_kwargs")
            for name in (
                "messages",
                "self",
                "tools",
                "continue_final_message",
                "foo",
                "conversation",
            )
        ),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ],
)
def test_template_arguments_reach_the_template_alone(
    served: Served, body: dict[str, Any], param: str
) -> None:
    answer = ask(served, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "jinja" not in answer.text.lower()


def test_responses_say_what_openais_say(served: Served) -> None:
    answer = ask(served, model="tiny").json()
    assert answer["service_tier"] == "default"
    assert answer["system_fingerprint"].startswith("mr-")
    usage = answer["usage"]
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens", "audio_tokens"}
    assert set(usage["completion_tokens_details"].values()) == {0}


def test_the_models_hold_every_field_of_the_table() -> None:
    fields = ("adapter_id", "adapter", "merged_adapters", "lora", "blend")
    for kind in (ChatRequest, CompletionRequest):
        assert set(fields) <= set(kind.model_fields)
    body = validate({"prompt": "x", "lora": None, "adapter_id": None}, CompletionRequest)
    assert (body.lora, body.adapter_id) == (None, None)
