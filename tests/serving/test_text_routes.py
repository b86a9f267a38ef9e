"""Tokens and embeddings, through the openai client where it has the call."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import openai
import pytest
import torch
from torch.nn.functional import normalize

from ..tiny import make_model, make_tokenizer
from .conftest import Served, chat_ids

TEXTS = ["shout the word 7", "héllo", "x" * 200]
MESSAGES = [{"role": "user", "content": "hi"}]


def post(served: Served, path: str, **body: object) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=30)


@torch.no_grad()
def reference(text: str) -> list[float]:
    """The mean of a plain model's last hidden states, of length 1."""
    ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
    states = make_model().base_model(ids).last_hidden_state[0]
    vector: list[float] = normalize(states.mean(0), dim=0).tolist()
    return vector


@pytest.mark.parametrize("more", [{}, {"encoding_format": "float"}])
@pytest.mark.parametrize("model", ["auto", "zoo", "tiny"])
def test_embeddings_are_the_backbones_mean_state(
    served: Served, model: str, more: dict[str, Any]
) -> None:
    answer = served.client().embeddings.create(model=model, input=TEXTS, **more)
    for index, (item, text) in enumerate(zip(answer.data, TEXTS, strict=True)):
        assert item.index == index
        assert item.embedding == pytest.approx(reference(text), abs=1e-5)
        assert sum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-5)
    count = sum(len(text.encode()) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == count
    assert answer.model == model


def test_token_ids_and_texts_embed_alike(served: Served) -> None:
    client = served.client()
    ids = make_tokenizer()(TEXTS[0])["input_ids"]
    by_text = client.embeddings.create(model="auto", input=TEXTS[0]).data[0].embedding
    by_ids = client.embeddings.create(model="auto", input=ids).data[0].embedding
    many = client.embeddings.create(model="auto", input=[ids, ids]).data
    assert by_ids == by_text
    assert [len(one.embedding) for one in many] == [32, 32]


def test_fewer_dimensions_are_of_length_one_again(served: Served) -> None:
    short = post(served, "/v1/embeddings", input=TEXTS[0], dimensions=5).json()["data"][0]
    expected = normalize(torch.tensor(reference(TEXTS[0])[:5]), dim=0).tolist()
    assert short["embedding"] == pytest.approx(expected, abs=1e-5)
    coded = {"dimensions": 5, "encoding_format": "base64"}
    packed = post(served, "/v1/embeddings", input=TEXTS[0], **coded).json()["data"][0]
    assert list(struct.unpack("<5f", base64.b64decode(packed["embedding"]))) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": "x", "model": "upper"}, 400, "model", "ask for 'tiny'"),
        ({"input": "x", "model": "blend:upper=0.5"}, 400, "model", "backbone's alone"),
        ({"input": "x", "model": "nobody"}, 404, "model", "nobody"),
        ({"input": []}, 400, "input", "0 inputs"),
        ({"input": ["x", ""]}, 400, "input", "at least one token"),
        ({"input": ["x"] * 2049}, 400, "input", "2,049 inputs"),
        ({"input": "x" * 257}, 400, "input", "257 tokens"),
        ({"input": [300]}, 400, "input", "token 300"),
        ({"input": [-1]}, 400, "input", "token -1"),
        ({"input": "x", "dimensions": 33}, 400, "dimensions", "have 32"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions", "at least 1"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format", "float"),
        ({"input": "x", "blend": {"upper": 1}}, 400, "blend", "not supported"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    served: Served, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = post(served, "/v1/embeddings", **body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def test_a_whole_context_can_be_embedded(served: Served) -> None:
    answer = post(served, "/v1/embeddings", input="x" * 256).json()
    assert answer["data"][0]["embedding"] == pytest.approx(reference("x" * 256), abs=1e-5)


def test_tokens_go_there_and_back(served: Served) -> None:
    for model in ("auto", "tiny", "upper", "zoo:digit", "blend:upper=0.5"):
        told = post(served, "/tokenize", model=model, prompt=TEXTS[1]).json()
        assert told == {
            "count": 6,
            "max_model_len": 256,
            "tokens": make_tokenizer()(TEXTS[1])["input_ids"],
            "token_strs": None,
        }
        back = post(served, "/detokenize", model=model, tokens=told["tokens"]).json()
        assert back == {"prompt": TEXTS[1]}
    assert post(served, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_messages_are_tokenized_as_they_are_served(served: Served) -> None:
    told = post(served, "/tokenize", messages=MESSAGES, return_token_strs=True).json()
    assert tuple(told["tokens"]) == chat_ids(served.bank.backbone, "hi")
    assert told["token_strs"][0] == "<|user|>"
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    usage = post(served, "/v1/chat/completions", **asked).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]
    closed = post(served, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert closed["tokens"] == told["tokens"][:-1]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, "model"),
        ("/tokenize", {"prompt": "x", "rank": 1}, "rank"),
        (
            "/tokenize",
            {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs",
        ),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_tokens_are_refused_by_name(
    served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    answer = post(served, path, **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_the_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        served.client().embeddings.create(model="nobody", input="x")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/route", {"prompt": "x"}),
    ],
)
def test_their_time_is_limited_too(served: Served, path: str, body: dict[str, str]) -> None:
    headers = {"x-mergeroute-timeout": "1e-9"}
    answer = httpx.post(served.url + path, json=body, headers=headers, timeout=30)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert post(served, path, **body).status_code == 200  # no turn was lost


def test_a_long_body_is_read_as_a_short_one(served: Served) -> None:
    padding = {"user": "x" * 100_000}
    assert post(served, "/v1/embeddings", input="x", **padding).status_code == 200
    refused = post(served, "/v1/embeddings", input=[], **padding)
    assert refused.json()["error"]["param"] == "input"
