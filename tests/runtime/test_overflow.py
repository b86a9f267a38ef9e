"""Requests that go wrong or out of time: they end, and nobody else is told the difference."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent

from ..tiny import make_model, make_module, make_modules, make_prompt, reference_tokens

PLAIN = make_model()
MODULES = make_modules(PLAIN, 1)
PROMPT = make_prompt(24, seed=1)


def make_huge() -> Module:
    """Finite weights that overflow in every row they are added to."""
    deltas = make_module(PLAIN, "huge").deltas
    return Module(
        "huge",
        {
            name: LowRank(torch.full_like(delta.left, 1e38), torch.ones_like(delta.right))
            for name, delta in deltas.items()
            if isinstance(delta, LowRank)
        },
    )


@pytest.fixture
def engine() -> Iterator[TorchEngine]:
    options = EngineOptions(max_concurrency=4)
    with TorchEngine(copy.deepcopy(PLAIN), options=options) as made:
        yield made


def submit(engine: TorchEngine, blend: Blend, **more: Any) -> Any:
    sampling = SamplingParams(temperature=0.0, max_tokens=more.pop("max_tokens", 40))
    return engine.submit(GenerationRequest(PROMPT, blend, sampling, **more))


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def test_a_module_that_overflows_fails_its_own_request_alone(engine: TorchEngine) -> None:
    huge, own = engine.load_module(make_huge()), engine.load_module(MODULES["m0"])
    neighbours = [submit(engine, blend) for blend in (Blend({own: 1.0}), Blend())]
    first = [next(iter(n)) for n in neighbours]
    for _ in range(3):
        (failed,) = submit(engine, Blend({huge: 1.0}))
        assert failed.finish_reason is FinishReason.ERROR
        assert "NaN" in (failed.error or "")
    for event, rest, blend in zip(first, neighbours, ({"m0": 1.0}, {}), strict=True):
        wanted = reference_tokens(PLAIN, MODULES, Blend(blend), PROMPT, 40)
        assert tokens([event, *rest]) == wanted
    assert engine.stats().running == 0


def test_rows_that_go_wrong_together_are_tried_alone(engine: TorchEngine) -> None:
    """Decodes share products with their neighbours' modules, where a half type may overflow."""
    own = engine.load_module(MODULES["m0"])

    def spoil(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * torch.nan if logits.shape[1] > 1 else logits

    handle = engine.model.lm_head.register_forward_hook(spoil)
    generations = [submit(engine, blend) for blend in (Blend({own: 1.0}), Blend())]
    got = [tokens(list(generation)) for generation in generations]
    handle.remove()
    assert got == [
        reference_tokens(PLAIN, MODULES, Blend(blend), PROMPT, 40) for blend in ({"m0": 1.0}, {})
    ]


def test_keys_that_are_no_numbers_are_not_offered_to_others(engine: TorchEngine) -> None:
    """A fault that passes (here a hook) must not live on in the cache."""
    attention = engine.model.model.layers[1].self_attn

    def poison(_: Any, inputs: Any, keywords: Any) -> Any:
        hidden = keywords["hidden_states"].clone()
        hidden[:, 3] = torch.nan
        return inputs, {**keywords, "hidden_states": hidden}

    handle = attention.register_forward_pre_hook(poison, with_kwargs=True)
    (failed,) = submit(engine, Blend())
    handle.remove()
    assert failed.finish_reason is FinishReason.ERROR
    generation = submit(engine, Blend())
    assert tokens(list(generation)) == reference_tokens(PLAIN, {}, Blend(), PROMPT, 40)
    assert generation.cached_tokens == 0
    again = submit(engine, Blend())
    list(again)
    assert again.cached_tokens == len(PROMPT) - 1


def test_what_a_slot_held_before_is_never_read(engine: TorchEngine) -> None:
    list(submit(engine, Blend(), max_tokens=1))
    with torch.inference_mode():
        for keys, values in engine._forward.cache._layers.values():
            keys[:] = torch.nan
            values[:] = torch.nan
    for content in engine._scheduler.prefixes.contents:
        content.valid = 0
    wanted = reference_tokens(PLAIN, {}, Blend(), PROMPT, 40)
    together = [submit(engine, Blend()) for _ in range(4)]
    assert all(tokens(list(generation)) == wanted for generation in together)


def test_a_request_whose_time_is_up_ends_running_or_waiting(engine: TorchEngine) -> None:
    soon = time.monotonic() + 0.05
    held = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    long = [submit(engine, Blend(), max_tokens=200, deadline=soon) for _ in range(6)]
    ends = [list(generation)[-1] for generation in long]
    held.remove()
    assert {end.finish_reason for end in ends} == {FinishReason.TIMEOUT}
    assert engine.stats().generated_tokens < 4 * 200
    whole = submit(engine, Blend(), deadline=time.monotonic() + 60)
    assert list(whole)[-1].finish_reason is FinishReason.LENGTH


def test_the_engine_tells_how_long_it_has_been_silent(engine: TorchEngine) -> None:
    time.sleep(0.6)
    assert engine.stats().silent_s < 0.6  # idle, and it comes round
    held = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.9))
    generation = submit(engine, Blend(), max_tokens=1)
    time.sleep(0.7)
    assert engine.stats().silent_s > 0.5
    list(generation)
    held.remove()
    time.sleep(0.1)
    assert engine.stats().silent_s < 0.6
