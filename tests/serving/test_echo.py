"""Prompts that are echoed and scored: what lm-eval asks of /v1/completions, and vLLM's shapes."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.runtime.merging import merge_into
from mergeroute.serving.assigning import check_scores
from mergeroute.serving.chat import Prompt
from mergeroute.serving.errors import ApiError
from mergeroute.serving.schemas.completions import CompletionRequest
from mergeroute.serving.validation import validate

from ..tiny import make_model, make_tokenizer
from .conftest import Served, chat_ids

TEXTS = ["shout the word 7", "0 1 2 3 4"]
BLEND = {"upper": 0.5, "digit": -0.25}


def post(served: Served, path: str = "/v1/completions", **body: object) -> Any:
    answer = httpx.post(served.url + path, json={"temperature": 0, **body}, timeout=30)
    return answer.json()


@torch.no_grad()
def reference(served: Served, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities after each token of the merged model, [t, vocabulary]."""
    merged = copy.deepcopy(make_model())
    modules = {m.name: served.bank.load(m) for m in served.bank.modules}
    merge_into(merged, modules, Blend(BLEND))
    logits: torch.Tensor = merged(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_scores_every_prompt_of_a_batch(
    served: Served, max_tokens: int, as_ids: bool
) -> None:
    ids = [tuple(make_tokenizer()(text)["input_ids"]) for text in TEXTS]
    answer = served.client().completions.create(
        model="auto",
        prompt=[list(each) for each in ids] if as_ids else TEXTS,
        echo=True,
        logprobs=1,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"blend": BLEND},
    )
    for choice, text, tokens in zip(answer.choices, TEXTS, ids, strict=True):
        told = choice.logprobs
        assert told is not None
        assert told.tokens
        assert told.token_logprobs
        assert told.top_logprobs
        assert told.text_offset
        assert choice.text.startswith(text)
        assert choice.finish_reason == "length"
        assert "".join(told.tokens[: len(tokens)]) == text
        assert len(told.tokens) == len(told.token_logprobs) == len(tokens) + max_tokens
        assert told.text_offset[: len(tokens)] == list(range(len(tokens)))
        assert [told.token_logprobs[0], told.top_logprobs[0]] == [None, None]
        rows = reference(served, tokens)
        for place in range(1, len(tokens)):
            row = rows[place - 1]
            own = float(row[tokens[place]])
            assert told.token_logprobs[place] == pytest.approx(own, abs=2e-4)
            top = told.top_logprobs[place]
            assert max(top.values()) == pytest.approx(float(row.max()), abs=2e-4)
            assert (told.token_logprobs[place] == max(top.values())) == (own == float(row.max()))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * max_tokens


def test_an_end_token_counts_among_the_logprobs_of_completions(served: Served) -> None:
    """lm-eval drops the last entry, whichever token it is."""
    body: dict[str, Any] = {"prompt": TEXTS[0], "echo": True, "logprobs": 1, "max_tokens": 1}
    free = post(served, **body, return_token_ids=True)["choices"][0]
    ended = post(served, **body, stop_token_ids=free["token_ids"])["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["logprobs"] == free["logprobs"]
    assert ended["text"] == TEXTS[0]


def test_an_echo_streams_the_prompt_first(served: Served) -> None:
    options: dict[str, Any] = {
        "model": "upper",
        "prompt": TEXTS,
        "n": 2,
        "echo": True,
        "max_tokens": 4,
        "logprobs": 2,
        "temperature": 0,
    }
    whole = served.client().completions.create(**options)
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: list[str], list[list[str]]
    for chunk in served.client().completions.create(**options, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    for index, text in enumerate(texts):
        assert text.startswith(TEXTS[index // 2])


def test_an_echo_without_logprobs_is_the_text_alone(served: Served) -> None:
    for max_tokens in (0, 3):
        choice = post(served, prompt=TEXTS[0], echo=True, max_tokens=max_tokens)["choices"][0]
        assert choice["text"].startswith(TEXTS[0])
        assert choice["logprobs"] is None


def test_prompt_logprobs_have_vllms_shape_on_both_routes(served: Served) -> None:
    chat = {"messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 2}
    whole = post(served, "/v1/chat/completions", **chat, blend=BLEND, prompt_logprobs=2)
    text = post(served, prompt=TEXTS[0], blend=BLEND, prompt_logprobs=2, max_tokens=2)
    plain = tuple(make_tokenizer()(TEXTS[0])["input_ids"])
    for told, ids in (
        (whole["prompt_logprobs"], chat_ids(served.bank.backbone, TEXTS[0])),
        (text["choices"][0]["prompt_logprobs"], plain),
    ):
        assert told[0] is None
        assert len(told) == len(ids)
        for entry, token, row in zip(told[1:], ids[1:], reference(served, ids), strict=False):
            own = entry[str(token)]
            assert own["logprob"] == pytest.approx(float(row[token]), abs=2e-4)
            assert own["rank"] == int((row > row[token]).sum()) + 1
            assert own["decoded_token"] == make_tokenizer().decode([token])
            assert {e["rank"] for e in entry.values()} >= {1, 2}
            assert len(entry) in (2, 3)


def test_token_ids_come_where_asked_for(served: Served) -> None:
    chat = {"messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 4}
    answer = post(served, "/v1/chat/completions", **chat, return_token_ids=True)
    assert answer["prompt_token_ids"] == list(chat_ids(served.bank.backbone, TEXTS[0]))
    assert len(answer["choices"][0]["token_ids"]) == 4
    names: dict[str, Any] = {"return_tokens_as_token_ids": True, "logprobs": 1, "max_tokens": 4}
    text = post(served, prompt=TEXTS[0], **names, return_token_ids=True)["choices"][0]
    assert text["logprobs"]["tokens"] == [f"token_id:{i}" for i in text["token_ids"]]
    assert all(name.startswith("token_id:") for name in text["logprobs"]["top_logprobs"][0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"return_token_ids": True, "stream": True}, "return_token_ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(
    served: Served, body: dict[str, Any], param: str
) -> None:
    assert post(served, prompt="x", **body)["error"]["param"] == param


def test_a_full_batch_is_scored(served: Served) -> None:
    many: dict[str, Any] = {"prompt": ["x" * 240] * 128, "max_tokens": 1}
    told = post(served, **many, echo=True, logprobs=1)["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in told] == [241] * 128


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 5}])
def test_more_scores_than_can_be_held_are_refused(served: Served, asked: dict[str, Any]) -> None:
    body = validate({"prompt": "x", "n": 8, **asked}, CompletionRequest)
    prompt = Prompt((1,) * 50_000, tuple)
    with pytest.raises(ApiError, match="the limit is 262,144") as caught:
        check_scores(body, [prompt], served.service.hosted[0])
    assert caught.value.param == next(iter(asked))
