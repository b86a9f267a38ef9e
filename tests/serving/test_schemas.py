"""Every parameter that is honoured arrives at the engine, and what asks for nothing does not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from mergeroute.adapters.errors import RequestError
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.types import SamplingParams
from mergeroute.serving.errors import ApiError
from mergeroute.serving.schemas.completions import ChatRequest, CompletionRequest
from mergeroute.serving.validation import validate

MESSAGES = [{"role": "user", "content": "x"}]
GIVEN: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 11,
    "min_p": 0.1,
    "seed": 3,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {5: -3.0},
    "stop": ("a", "b"),
    "stop_token_ids": (9,),
    "ignore_eos": True,
}


@pytest.mark.parametrize("name", GIVEN)
def test_each_parameter_arrives_alone(name: str) -> None:
    value = GIVEN[name]
    raw = {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
    chat = {"messages": MESSAGES}
    text = {"prompt": "x"}
    for body, plain in (
        (validate({**chat, name: raw}, ChatRequest), validate(chat, ChatRequest)),
        (validate({**text, name: raw}, CompletionRequest), validate(text, CompletionRequest)),
    ):
        expected = replace(plain.sampling(SamplingParams(), 0), **{name: value})
        assert body.sampling(SamplingParams(), 0) == expected


def test_max_completion_tokens_and_logprobs_arrive() -> None:
    body = validate(
        {"messages": MESSAGES, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 4},
        ChatRequest,
    )
    sampling = body.sampling(SamplingParams(), 0)
    assert (sampling.max_tokens, sampling.top_logprobs) == (9, 4)
    assert validate({"messages": MESSAGES}, ChatRequest).sampling(SamplingParams(), 0) == (
        SamplingParams()
    )
    completion = validate({"prompt": "x", "logprobs": 2}, CompletionRequest)
    assert completion.sampling(SamplingParams(), 0).top_logprobs == 2
    assert completion.sampling(SamplingParams(), 0).max_tokens == 16


def test_choices_get_seeds_of_their_own_and_defaults_fill_in() -> None:
    body = validate({"messages": MESSAGES, "seed": 5, "top_p": 0.3}, ChatRequest)
    defaults = SamplingParams(temperature=0.6, top_p=0.8, top_k=20)
    assert [body.sampling(defaults, k).seed for k in range(3)] == [5, 6, 7]
    filled = asdict(body.sampling(defaults, 0))
    assert (filled["temperature"], filled["top_p"], filled["top_k"]) == (0.6, 0.3, 20)


def test_keys_of_the_callers_own_are_no_parameters() -> None:
    own = {
        "metadata": {"suffix": "", "tool_choice": "auto"},
        "blend": {"length_penalty": 1.0, "priority": 0},
    }
    body = validate({"messages": MESSAGES, **own}, ChatRequest)
    assert (body.metadata, body.blend) == (own["metadata"], own["blend"])
    with pytest.raises(ApiError, match="metadata"):
        validate({"messages": MESSAGES, "metadata": {"a": None}}, ChatRequest)


@pytest.mark.parametrize("routing", ["arrow", {"method": "arrow", "top_k": None}])
def test_routing_is_read_in_both_forms(routing: object) -> None:
    body = validate({"messages": MESSAGES, "routing": routing}, ChatRequest)
    assert body.routing == TokenRouting("arrow")
    assert validate({"messages": MESSAGES, "routing": None}, ChatRequest).routing is None


@pytest.mark.parametrize(
    "value", [{"n": True}, {"max_tokens": 1.0}, {"stream": "yes"}, {"blend": {"a": True}}]
)
def test_types_are_taken_at_their_word(value: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        validate({"messages": MESSAGES, **value}, ChatRequest)


def test_prompts_times_n_is_limited() -> None:
    with pytest.raises(ApiError, match="64 prompts with n=3 make 192 choices"):
        validate({"prompt": ["x"] * 64, "n": 3}, CompletionRequest)


def test_ranges_are_checked_where_sampling_is_made() -> None:
    body = validate({"messages": MESSAGES, "min_p": 2}, ChatRequest)
    with pytest.raises(RequestError, match="min_p is 2"):
        body.sampling(SamplingParams(), 0)
