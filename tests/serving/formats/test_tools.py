"""Tools through the unmodified `openai` client: a random model calls what it has to."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from ..conftest import Served
from .test_response_format import BLANKS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/City"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Bonn", "Köln"]}},
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA},
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "strict": None}}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "shout the word 7"}]
NAMED = {"type": "function", "function": {"name": "weather"}}


def chat_of(served: Served) -> Any:
    return served.client().chat


def options(**more: Any) -> dict[str, Any]:
    return {
        "model": "auto",
        "messages": MESSAGES,
        "tools": [WEATHER, CLOCK],
        "tool_choice": NAMED,
        "temperature": 0,
        "max_tokens": 200,
        "extra_body": {"logit_bias": BLANKS},
        **more,
    }


def post(served: Served, path: str = "chat/completions", **body: Any) -> httpx.Response:
    extra = {k: v for k, v in options(**body).items() if k != "extra_body"}
    return httpx.post(f"{served.url}/v1/{path}", json=extra, timeout=60)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_tool_is_called_by_its_schema(calling: Served, seed: int) -> None:
    answer = chat_of(calling).completions.create(**options(temperature=1, seed=seed))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name) == ("function", "weather")
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(call.function.arguments))


def test_a_stream_adds_up_to_the_same_call(calling: Served) -> None:
    chat = chat_of(calling)
    whole = chat.completions.create(**options()).choices[0].message.tool_calls[0]
    with chat.completions.stream(**options()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    assert final.message.content is None
    (call,) = final.message.tool_calls
    assert (call.function.name, call.function.arguments) == (
        whole.function.name,
        whole.function.arguments,
    )
    chunks = [c.choices[0] for c in chat.completions.create(**options(stream=True))]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert (parts[0].index, parts[0].type, parts[0].function.name) == (0, "function", "weather")
    assert len(parts) > 5
    assert all(part.id is None and part.function.name is None for part in parts[1:])
    assert "".join(part.function.arguments for part in parts) == whole.function.arguments
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_required_calls_one_of_the_tools_or_several(calling: Served) -> None:
    called = set()
    for seed in range(6):
        answer = chat_of(calling).completions.create(
            **options(tool_choice="required", temperature=1, seed=seed)
        )
        for call in answer.choices[0].message.tool_calls:
            called.add(call.function.name)
            json.loads(call.function.arguments)
    assert called == {"weather", "clock"}
    once = options(tool_choice="required", parallel_tool_calls=False, n=3, seed=1)
    for choice in chat_of(calling).completions.create(**once).choices:
        assert len(choice.message.tool_calls) == 1


def test_allowed_tools_narrow_the_choice(calling: Served) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = chat_of(calling).completions.create(**options(tool_choice=choice))
    (call, *_) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tool_choice": "none"},
        {"parallel_tool_calls": False},
        {"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]},
    ],
)
def test_a_model_that_calls_nothing_answers(calling: Served, more: dict[str, Any]) -> None:
    answer = chat_of(calling).completions.create(**options(tool_choice="auto", max_tokens=9) | more)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "parameters", [{}, {"maxItems": 0, "maxProperties": 0}, {"anyOf": [{"type": "array"}, SCHEMA]}]
)
def test_untyped_parameters_are_of_an_object(calling: Served, parameters: dict[str, Any]) -> None:
    more = parameters | ({"$defs": SCHEMA["$defs"]} if "anyOf" in parameters else {})
    tool = {"type": "function", "function": {"name": "f", "parameters": more}}
    asked = options(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    choice = chat_of(calling).completions.create(**asked).choices[0]
    assert choice.message.tool_calls, choice
    if choice.finish_reason == "tool_calls":
        assert isinstance(json.loads(choice.message.tool_calls[0].function.arguments), dict)


def test_a_call_that_is_cut_says_so(calling: Served) -> None:
    answer = chat_of(calling).completions.create(**options(max_tokens=45)).choices[0]
    assert answer.finish_reason == "length"
    assert SCHEMA["required"][0] not in (answer.message.content or "")


def test_calls_and_their_results_go_through_the_template(calling: Served) -> None:
    answer = chat_of(calling).completions.create(**options())
    message = answer.choices[0].message
    said = [
        *MESSAGES,
        message.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
    ]
    again = chat_of(calling).completions.create(
        **options(messages=said, tool_choice="auto", max_tokens=5)
    )
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens + len("tool:rain")
    without = [said[0], {**said[1], "tool_calls": []}]
    less = chat_of(calling).completions.create(
        **options(messages=without, tool_choice="auto", max_tokens=5)
    )
    assert less.usage.prompt_tokens < again.usage.prompt_tokens - len(
        message.tool_calls[0].function.arguments
    )


def test_tools_do_not_move_the_router(calling: Served) -> None:
    plain = post(calling, "route", tools=[], tool_choice="none").json()
    preview = post(calling, "route").json()
    served = post(calling)
    assert preview["blend"] == plain["blend"] == {"upper": 1.0}
    assert preview["scores"] == plain["scores"]
    assert served.headers["x-mergeroute-blend"] == "upper=1"


def test_calls_beside_other_requests_are_the_same(calling: Served) -> None:
    asked = [
        options(),
        options(tool_choice="none", max_tokens=20),
        options(tool_choice="required", seed=3, temperature=1),
    ]

    def ask(more: dict[str, Any]) -> tuple[str | None, list[str]]:
        message = chat_of(calling).completions.create(**more).choices[0].message
        return message.content, [c.function.arguments for c in message.tool_calls or ()]

    alone = [ask(more) for more in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, asked * 2)) == alone * 2


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"tools": [WEATHER] * 2}, "tools", "two tools are called 'weather'"),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
            "pattern",
        ),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "function"),
        ({"tools": []}, "tool_choice", "names 'weather'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "'function'"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": "auto"}, "function_call", "use tool_choice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "weather", "parameters": {"not": {}}}}
                ]
            },
            "tools",
            "Unimplemented",
        ),
        *(
            (
                {"tools": [WEATHER, {"type": "function", "function": {"name": "f", **wrong}}]},
                "tools.1.function.parameters",
                "'object'",
            )
            for wrong in (
                {"parameters": {"type": "array", "maxItems": 0}},
                {"parameters": {"type": ["object", "null"]}},
                {"parameters": {"type": None}, "strict": True},
            )
        ),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "cannot go with tools"),
        ({"min_tokens": 9}, "min_tokens", "leave it out"),
        ({"ignore_eos": True}, "ignore_eos", "leave it out"),
        (
            {"messages": [*MESSAGES, {"role": "tool", "tool_call_id": "x", "content": ""}]},
            "messages.1.tool_call_id",
            "'x'",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "["}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function",
            "JSON object",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_refused_by_name(
    calling: Served, more: dict[str, Any], param: str, words: str
) -> None:
    response = post(calling, **more)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_a_template_without_tools_is_refused_not_ignored(served: Served) -> None:
    for body, param in (
        ({"tool_choice": "auto"}, "tools"),
        (
            {
                "tools": [],
                "tool_choice": "none",
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"id": "x", "function": {"name": "f"}}],
                    }
                ],
            },
            "messages",
        ),
    ):
        error = post(served, **body).json()["error"]
        assert (error["param"], "chat template has no tool" in error["message"]) == (param, True)
    assert post(served, tool_choice="none", max_tokens=2).status_code == 200


def test_the_client_refuses_nothing_of_this(calling: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="two tools"):
        chat_of(calling).completions.create(**options(tools=[WEATHER, WEATHER]))
