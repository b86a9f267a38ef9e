"""Service: what is routed, what is started, and what a full queue does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import (
    BankError,
    ContextLengthError,
    QueueFullError,
    RouterError,
)
from mergeroute.routers.base import Turn
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.assigning import Assignment
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.schemas.completions import ChatRequest, GenerationBody
from mergeroute.serving.service import Service
from mergeroute.serving.validation import validate

from ..tiny import make_model, make_module, make_tokenizer
from .conftest import Served, chat_ids, running, write_checkpoint, write_routed_bank

TIGHT = EngineOptions(max_concurrency=1, max_waiting=2)


@pytest.fixture
def tight(bank: Bank) -> Iterator[Service]:
    service = Service(host_banks([bank], Placement(dtype="float32", options=TIGHT)))
    yield service
    service.stop()


def chat(*texts: str, **more: object) -> ChatRequest:
    """A conversation: system, user, assistant, user, ..."""
    roles = ["developer", "user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return validate({"messages": messages, **more}, ChatRequest)


def assigned(service: Service, body: GenerationBody) -> list[Assignment]:
    return asyncio.run(service.assign(body))


def test_the_router_sees_each_user_message_as_a_conversation_of_its_own(tight: Service) -> None:
    body = chat("0 1 2 3 4", "0 1 2 3 4 5", "0 1 2", "shout the word 7")
    (assignment,) = assigned(tight, body)
    assert assignment.decision.blend == Blend({"upper": 1.0})
    backbone = assignment.hosted.bank.backbone
    texts = ["0 1 2 3 4 5", "shout the word 7"]
    assert list(assignment.prompt.turns) == [Turn(chat_ids(backbone, t), t) for t in texts]
    rendered = make_tokenizer().decode(assignment.prompt.token_ids)
    assert rendered.startswith("<|user|>system:0 1 2 3 4<|end|>")


def test_nothing_is_routed_for_a_prompt_that_does_not_fit(tight: Service) -> None:
    with pytest.raises(ContextLengthError) as caught:
        assigned(tight, chat("x", "y" * 300))
    assert caught.value.parameter == "messages"


def test_all_choices_start_or_none(tight: Service) -> None:
    body = chat("x", "shout the word 7", n=9, max_tokens=100, ignore_eos=True)
    assignments = assigned(tight, body)
    with pytest.raises(QueueFullError, match="the limit is 2"):
        tight.submit(body, assignments)
    again = chat("x", "shout the word 7", max_tokens=2)
    for _ in range(200):
        try:
            (choice,) = tight.submit(again, assigned(tight, again))
            break
        except QueueFullError:
            continue
    assert [event.finish_reason for event in choice.generation][-1] is not None
    assert tight.hosted[0].engine.stats().running == 0


def test_a_full_queue_is_429_with_retry_after(tight: Service) -> None:
    with running(tight) as url:
        body = {"prompt": "x", "n": 20, "max_tokens": 50, "ignore_eos": True}
        response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"


def test_several_prompts_are_routed_apart_and_the_headers_tell(served: Served) -> None:
    texts = ("shout the word 1", "0 1 2 3 4 5")
    prompts = [f"<|user|>user:{text}<|end|><|user|>" for text in texts]
    body = {"prompt": prompts, "model": "auto", "max_tokens": 1}
    headers = httpx.post(f"{served.url}/v1/completions", json=body).headers
    assert headers["x-mergeroute-target"] == "auto"
    assert headers["x-mergeroute-blend"] == "upper=1; digit=1"


def test_the_backbones_generation_config_fills_in(bank: Bank, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in bank.backbone.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stated = {"temperature": 0.25, "top_k": 7, "eos_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    make_module(make_model(), "m").save(tmp_path / "m")
    adhoc = Bank.adhoc("mine", Backbone.open(folder), [BankModule("m", tmp_path / "m")])
    (hosted,) = host_banks([adhoc], Placement(dtype="float32"))
    hosted.engine.stop()
    assert (hosted.defaults.temperature, hosted.defaults.top_k) == (0.25, 7)


def test_a_router_that_reads_a_layer_too_many_is_refused_at_start(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    bank = write_routed_bank(tmp_path / "bank", name="bent", backbone=checkpoint)
    assert bank.router_path is not None
    settings = json.loads((bank.router_path / "router.json").read_text())
    settings["signal"]["layer"] = 9
    (bank.router_path / "router.json").write_text(json.dumps(settings))
    with pytest.raises(BankError, match="does not fit its backbone"):
        host_banks([bank], Placement(dtype="float32"))


def test_a_router_fitted_on_another_checkpoint_is_refused_at_start(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=5)
    bank = write_routed_bank(tmp_path / "bank", name="moved", backbone=checkpoint)
    moved = replace(bank, backbone=other)
    with pytest.raises(RouterError, match="was fitted on backbone"):
        host_banks([moved], Placement(dtype="float32"))


def test_text_offsets_count_the_tokens_texts(served: Served) -> None:
    answer = served.client().completions.create(
        model="upper", prompt="abc", temperature=0, max_tokens=5, logprobs=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert [list(top) for top in logprobs.top_logprobs or []] == [
        [t] for t in logprobs.tokens or []
    ]


def test_logit_bias_reaches_the_tokens(served: Served) -> None:
    answer = served.client().completions.create(
        model="upper", prompt="abc", temperature=0, max_tokens=4, logit_bias={"65": 100}
    )
    assert answer.choices[0].text == make_tokenizer().decode([65]) * 4
