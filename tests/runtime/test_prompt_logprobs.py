"""Log-probabilities of prompts are those of a plain forward of the merged model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import ContextLengthError
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.prompt_logprobs import score
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import FinishReason, GenerationRequest, SamplingParams

from ..tiny import make_model, make_module, make_prompt, make_rich_module

PLAIN = make_model(tied=False)
MODULES = {"m0": make_module(PLAIN, "m0", seed=1), "rich": make_rich_module(PLAIN, "rich", seed=2)}
BLENDS = [Blend(), Blend({"m0": 0.5}), Blend({"rich": 1.0}), Blend({"m0": -0.25, "rich": 0.75})]
SCORED: dict[str, Any] = {"max_tokens": 0, "prompt_logprobs": 3}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    options = EngineOptions(max_concurrency=4, token_budget=16)
    with TorchEngine(copy.deepcopy(PLAIN), options=options) as engine:
        yield engine


@pytest.fixture(scope="module")
def digests(engine: TorchEngine) -> dict[str, str]:
    return {name: engine.load_module(module) for name, module in MODULES.items()}


def request(prompt: tuple[int, ...], blend: Blend = BLENDS[0], **params: Any) -> GenerationRequest:
    given: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3, **params}
    return GenerationRequest(prompt, blend, SamplingParams(**given))


@torch.no_grad()
def reference(blend: Blend, prompt: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities after each token of the merged model, [t, vocabulary]."""
    merged = copy.deepcopy(PLAIN)
    merge_into(merged, MODULES, blend)
    logits: torch.Tensor = merged(torch.tensor([prompt])).logits[0]
    return logits.log_softmax(-1)


def test_they_equal_the_merged_models_in_a_mixed_batch(
    engine: TorchEngine, digests: dict[str, str]
) -> None:
    prompts = [make_prompt(length, seed=length) for length in (70, 1, 33, 5)]
    asked = [request(p, b.renamed(digests), **SCORED) for p, b in zip(prompts, BLENDS, strict=True)]
    beside = engine.submit(request(prompts[0], max_tokens=40))
    running = [engine.submit(one) for one in asked]
    for generation, blend, prompt in zip(running, BLENDS, prompts, strict=True):
        [event] = generation
        assert (event.finish_reason, event.token_id) == (FinishReason.LENGTH, None)
        expected = reference(blend, prompt)
        assert [s.logprob.token_id for s in generation.prompt_scores] == list(prompt[1:])
        for row, scored in zip(expected, generation.prompt_scores, strict=False):
            own = row[scored.logprob.token_id]
            assert scored.logprob.logprob == pytest.approx(float(own), abs=2e-4)
            assert scored.rank == int((row > own).sum()) + 1
            values, ids = row.topk(3)
            assert [t.token_id for t in scored.top_logprobs] == ids.tolist()
            assert [t.logprob for t in scored.top_logprobs] == pytest.approx(
                values.tolist(), abs=2e-4
            )
    assert len(list(beside)) == 40
    assert beside.prompt_scores == []


def test_a_scored_prompt_reuses_nothing_and_is_reused(engine: TorchEngine) -> None:
    prompt = make_prompt(60, seed=9)
    tokens = [e.token_id for e in engine.submit(request(prompt))]
    scored = engine.submit(request(prompt, prompt_logprobs=0))
    assert [e.token_id for e in scored] == tokens
    assert (scored.cached_tokens, len(scored.prompt_scores)) == (0, 59)
    again = engine.submit(request(prompt))
    assert [e.token_id for e in again] == tokens
    assert again.cached_tokens == 59


def test_a_prompt_that_fills_the_context_can_be_scored(engine: TorchEngine) -> None:
    whole = make_prompt(engine.max_length, seed=3)
    generation = engine.submit(request(whole, **SCORED))
    assert [e.finish_reason for e in generation] == [FinishReason.LENGTH]
    assert len(generation.prompt_scores) == engine.max_length - 1
    with pytest.raises(ContextLengthError):
        engine.submit(request((*whole, 1), **SCORED))
    with pytest.raises(ContextLengthError, match="to leave room"):
        engine.submit(request(whole, prompt_logprobs=1, max_tokens=None))


def test_a_module_that_overflows_fails_its_own_request_only(engine: TorchEngine) -> None:
    module = make_module(PLAIN, "huge", seed=5, scale=1e18)
    digest = engine.load_module(module)
    bad = engine.submit(request(make_prompt(30, seed=1), Blend({digest: 8.0}), **SCORED))
    good = engine.submit(request(make_prompt(30, seed=1), **SCORED))
    [event] = bad
    assert event.finish_reason is FinishReason.ERROR
    assert "NaN or inf" in (event.error or "")
    assert [e.finish_reason for e in good] == [FinishReason.LENGTH]
    assert len(good.prompt_scores) == 29
    engine.unload_module(digest)


def test_ranks_and_bests_of_hand_made_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = score(logits, [2, 0], count=5)
    assert (first.rank, second.rank) == (2, 1)
    assert [t.token_id for t in first.top_logprobs] == [1, 2, 0]
    assert second.top_logprobs[0].logprob == second.logprob.logprob


def test_no_end_token_comes_before_min_tokens(engine: TorchEngine) -> None:
    prompt = make_prompt(12, seed=4)
    free = [e.token_id for e in engine.submit(request(prompt, max_tokens=8))]
    ends: dict[str, Any] = {"stop_token_ids": (free[0],), "max_tokens": 8}
    [stopped] = engine.submit(request(prompt, **ends))
    assert (stopped.finish_reason, stopped.is_end) == (FinishReason.STOP, True)
    for least in (1, 5, 8):
        events = list(engine.submit(request(prompt, **ends, min_tokens=least)))
        assert len(events) >= least
        assert free[0] not in [e.token_id for e in events[:least]]
        sampled = list(
            engine.submit(request(prompt, **ends, min_tokens=least, temperature=1.5, seed=1))
        )
        assert free[0] not in [e.token_id for e in sampled[:least]]
