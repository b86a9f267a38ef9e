"""The form of answers through the unmodified `openai` client and a real server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema_rs
import pytest
from pydantic import BaseModel, Field

from ...tiny import make_tokenizer
from ..conftest import Served

BLANKS = {str(make_tokenizer()(blank)["input_ids"][0]): -100 for blank in " \n\t"}
"""A random model likes them, and its context is short."""
MESSAGES = [{"role": "user", "content": "shout the word 7"}]


class Item(BaseModel):
    name: Literal["a", "é"]
    count: int = Field(ge=0, le=99)


class Order(BaseModel):
    items: list[Item] = Field(max_length=2)
    note: str | None = Field(max_length=5)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, None, "é"]}, "default": {"type": "boolean", "default": None}},
    "required": ["a", "default"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": None}}


def post(served: Served, path: str = "chat/completions", **body: Any) -> httpx.Response:
    prompt = {"messages": MESSAGES} if path != "completions" else {"prompt": "shout the word 7"}
    defaults = {"max_tokens": 120, "logit_bias": BLANKS, "seed": 1, **prompt}
    return httpx.post(f"{served.url}/v1/{path}", json={**defaults, **body}, timeout=60)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [c["message"]["content"] if "message" in c else c["text"] for c in choices]


def test_the_clients_parse_gives_an_object(served: Served) -> None:
    client: Any = served.client()
    asked: dict[str, Any] = {
        "model": "auto",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 150,
    }
    asked["extra_body"] = {"logit_bias": BLANKS}
    answer = client.chat.completions.parse(**asked, response_format=Order)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Order)
    with client.chat.completions.stream(**asked, response_format=Order) as stream:
        for _ in stream:
            pass
        assert (
            stream.get_final_completion().choices[0].message.parsed
            == answer.choices[0].message.parsed
        )


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_choice_follows_the_schema(served: Served, path: str, temperature: float) -> None:
    for text in texts(post(served, path, response_format=FORMAT, n=3, temperature=temperature)):
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text))


def test_json_mode_is_an_object_or_cut(served: Served) -> None:
    response = post(served, response_format={"type": "json_object"}, n=4, temperature=1)
    for choice, text in zip(response.json()["choices"], texts(response), strict=True):
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert choice["finish_reason"] == "length"
    cut = post(served, response_format=FORMAT, max_tokens=3).json()["choices"][0]
    assert cut["finish_reason"] == "length"


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_vllms_names_for_a_schema(served: Served, form: dict[str, Any]) -> None:
    expected = texts(post(served, response_format=FORMAT))
    assert texts(post(served, **form)) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("regex", "(ab|/c){2}", {"abab", "ab/c", "/cab", "/c/c"}),
        ("choice", ["x\n", 'y"'], {"x\n", 'y"'}),
        ("grammar", 'start: one one\none: "p" | "q"', {"pp", "pq", "qp", "qq"}),
    ],
)
def test_vllms_other_forms(served: Served, name: str, value: Any, expected: set[str]) -> None:
    new = texts(post(served, structured_outputs={name: value}, n=3))
    assert set(new) <= expected
    assert texts(post(served, **{f"guided_{name}": value}, n=3)) == new
    assert texts(post(served, "completions", **{f"guided_{name}": value}))[0] in expected


def test_requests_with_and_without_a_form_change_nothing_for_each_other(served: Served) -> None:
    asked: list[dict[str, Any]] = [
        {"max_tokens": 20},
        {"response_format": FORMAT},
        {"guided_regex": "[a-z]{12}", "temperature": 0},
        {"max_tokens": 20, "temperature": 0, "model": "digit"},
    ]
    alone = [texts(post(served, **body)) for body in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: texts(post(served, **body)), asked * 2))
    assert together == alone * 2


def test_the_form_does_not_move_the_router(served: Served) -> None:
    plain = post(served, "route").json()
    asked = post(served, "route", response_format=FORMAT).json()
    assert (asked["blend"], asked["scores"]) == (plain["blend"], plain["scores"])
    answer = post(served, response_format=FORMAT)
    assert answer.headers["x-mergeroute-blend"] == "upper=1"


def test_logprobs_and_stop_go_with_a_form(served: Served) -> None:
    body = post(served, guided_regex="a{9}b", stop="aab", logprobs=True, top_logprobs=1).json()
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a" * 7, "stop")
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert tokens == ["a"] * 9 + ["b"]
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] != "a"


def with_schema(schema: Any, **more: Any) -> dict[str, Any]:
    stated = {"name": "n", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": stated}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (with_schema({"not": {}}), "response_format", "Unimplemented"),
        (with_schema({"type": "object", "minProperties": -1}), "response_format", ""),
        (with_schema(3), "response_format.json_schema.schema", "object"),
        (with_schema({}, name="a b"), "response_format.json_schema.name", "pattern"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "go together"),
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "one of them"),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos", "response_format"),
        ({"structured_outputs": {}}, "structured_outputs", "0 forms"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "2 forms"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "not",
        ),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": "[]"}, "guided_json", "object"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens", "leave it out"),
        ({"guided_grammar": "nothing"}, "guided_grammar", "cannot be kept"),
        (with_schema({"enum": ["x" * 140_000]}), "response_format", "131,072"),
        (
            with_schema(json.loads('{"items":' * 150 + "{}" + "}" * 150)),
            "response_format",
            "recursion",
        ),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(
    served: Served, body: dict[str, Any], param: str, words: str
) -> None:
    for path in ("chat/completions", "route"):
        response = post(served, path, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert words in error["message"]
