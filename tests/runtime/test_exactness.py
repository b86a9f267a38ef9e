"""The promise the product stands on: in any batch, the tokens of the merged model."""

from __future__ import annotations

import copy
import random
import time

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import FinishReason, GenerationRequest, SamplingParams

from ..tiny import CONFIGS, make_model, make_module, make_modules, make_prompt, reference_tokens

TOKENS = 12


def load_all(engine: TorchEngine, modules: dict[str, Module]) -> dict[str, str]:
    return {name: engine.load_module(module) for name, module in modules.items()}


def request(
    prompt: tuple[int, ...], blend: Blend, digests: dict[str, str], **sampling: object
) -> GenerationRequest:
    params = {"max_tokens": TOKENS, "temperature": 0.0, **sampling}
    return GenerationRequest(prompt, blend.renamed(digests), SamplingParams(**params))  # type: ignore[arg-type]


def tokens_of(generation: object) -> list[int]:
    return [e.token_id for e in generation if e.token_id is not None]  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_gives_the_merged_models_tokens(architecture: str) -> None:
    plain = make_model(architecture)
    modules = make_modules(plain, 3)
    blends = [Blend(), Blend({"m0": 1.0}), Blend({"m0": 0.5, "m2": -0.25}), Blend({"m1": 0.75})]
    prompts = [make_prompt(length, seed=length) for length in (40, 3, 17, 61)]
    expected = [
        reference_tokens(plain, modules, b, p, TOKENS) for b, p in zip(blends, prompts, strict=True)
    ]
    options = EngineOptions(max_concurrency=4, token_budget=24)
    with TorchEngine(copy.deepcopy(plain), options=options) as engine:
        digests = load_all(engine, modules)
        running = [
            engine.submit(request(p, b, digests)) for p, b in zip(prompts, blends, strict=True)
        ]
        assert [tokens_of(generation) for generation in running] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


def test_sixteen_blends_with_staggered_arrivals_cancellations_and_sampling() -> None:
    plain = make_model()
    modules = make_modules(plain, 6)
    chance = random.Random(1)
    names = list(modules)
    blends = [
        Blend({name: chance.randint(-64, 96) / 64 for name in chance.sample(names, 1 + k % 4)})
        for k in range(16)
    ]
    assert len(set(blends)) == 16
    prompts = [make_prompt(chance.randint(1, 60), seed=k) for k in range(16)]
    with TorchEngine(
        copy.deepcopy(plain), options=EngineOptions(max_concurrency=6, token_budget=32)
    ) as engine:
        digests = load_all(engine, modules)
        running = []
        for k in range(16):
            long_run = {"max_tokens": 150} if k % 5 == 4 else {}
            sampled = {"temperature": 0.9, "seed": k} if k % 4 == 3 else {}
            running.append(
                engine.submit(request(prompts[k], blends[k], digests, **long_run, **sampled))
            )
            if k % 3 == 0:
                time.sleep(0.01)
        for k in range(4, 16, 5):
            running[k].cancel()
        results = [list(generation) for generation in running]
        alone = [
            tokens_of(
                engine.submit(request(prompts[k], blends[k], digests, temperature=0.9, seed=k))
            )
            for k in range(3, 16, 4)
        ]
        assert engine.stats().running == engine.stats().waiting == 0
    for k, events in enumerate(results):
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
        tokens = [e.token_id for e in events if e.token_id is not None]
        if k % 5 == 4:
            assert events[-1].finish_reason is FinishReason.CANCELLED
        elif k % 4 == 3:
            assert tokens == alone[k // 4]
        else:
            assert tokens == reference_tokens(plain, modules, blends[k], prompts[k], TOKENS)


def test_batched_equals_one_by_one() -> None:
    plain = make_model("qwen3")
    modules = make_modules(plain, 4)
    work = [
        (make_prompt(5 + 7 * k, seed=k), Blend({f"m{k % 4}": 1.0, f"m{(k + 1) % 4}": 0.25 * k}))
        for k in range(8)
    ]
    with TorchEngine(plain) as engine:
        digests = load_all(engine, modules)
        together = [engine.submit(request(p, b, digests)) for p, b in work]
        batched = [tokens_of(generation) for generation in together]
        assert batched == [tokens_of(engine.submit(request(p, b, digests))) for p, b in work]


def test_an_empty_blend_is_the_bare_backbone_bit_for_bit() -> None:
    plain = make_model()
    prompt = make_prompt(30, seed=3)

    def logprobs(engine: TorchEngine) -> list[float]:
        events = engine.submit(request(prompt, Blend(), {}, top_logprobs=5))
        return [t.logprob for e in events for t in e.top_logprobs]

    with TorchEngine(copy.deepcopy(plain)) as engine:
        bare = logprobs(engine)
    with TorchEngine(copy.deepcopy(plain)) as engine:
        load_all(engine, make_modules(plain, 3))
        assert logprobs(engine) == bare


def test_two_scales_of_one_module_in_one_batch_differ() -> None:
    plain = make_model()
    modules = make_modules(plain, 1)
    prompt = make_prompt(20, seed=5)
    with TorchEngine(copy.deepcopy(plain)) as engine:
        digests = load_all(engine, modules)
        blends = [Blend({"m0": weight}) for weight in (0.25, 1.0, -1.0)]
        running = [engine.submit(request(prompt, blend, digests)) for blend in blends]
        results = [tokens_of(generation) for generation in running]
    assert results == [reference_tokens(plain, modules, b, prompt, TOKENS) for b in blends]
    assert len({tuple(tokens) for tokens in results}) == 3


def test_prefix_reuse_never_crosses_blends() -> None:
    plain = make_model()
    modules = make_modules(plain, 2)
    prompt = make_prompt(64, seed=9)
    blends = [Blend(), Blend({"m0": 1.0}), Blend({"m0": 63 / 64}), Blend({"m1": 1.0})]
    with TorchEngine(copy.deepcopy(plain)) as engine:
        digests = load_all(engine, modules)
        for blend in blends * 2:
            expected = reference_tokens(plain, modules, blend, prompt, TOKENS)
            assert tokens_of(engine.submit(request(prompt, blend, digests))) == expected
        again = engine.submit(request((*prompt, 1, 2), blends[1], digests))
        tokens_of(again)
        assert again.cached_tokens == 64
        assert engine.stats().reused_tokens == 4 * 63 + 64


def test_a_module_replaced_under_its_name_never_hits_the_old_prefix() -> None:
    plain = make_model()
    old, new = make_module(plain, "m", seed=1), make_module(plain, "m", seed=2)
    prompt = make_prompt(64, seed=9)
    with TorchEngine(copy.deepcopy(plain)) as engine:
        for module in (old, new, old):
            digest = engine.load_module(module)
            generation = engine.submit(request(prompt, Blend({"m": 1.0}), {"m": digest}))
            expected = reference_tokens(plain, {"m": module}, Blend({"m": 1.0}), prompt, TOKENS)
            assert tokens_of(generation) == expected
            engine.unload_module(digest)


def test_a_shared_prefix_is_copied_from_a_running_neighbour() -> None:
    plain = make_model()
    modules = make_modules(plain, 1)
    blend = Blend({"m0": 1.0})
    shared = make_prompt(50, seed=2)
    with TorchEngine(copy.deepcopy(plain)) as engine:
        digests = load_all(engine, modules)
        first = engine.submit(request(shared, blend, digests, max_tokens=100))
        stream = iter(first)
        next(stream)
        second = engine.submit(request((*shared, 7, 8), blend, digests))
        tokens = tokens_of(second)
        assert second.cached_tokens == 50
        assert tokens == reference_tokens(plain, modules, blend, (*shared, 7, 8), TOKENS)
        rest = [e.token_id for e in stream]
        assert rest[-1] == reference_tokens(plain, modules, blend, shared, 100)[-1]


def test_modules_come_and_go_while_requests_run() -> None:
    plain = make_model()
    modules = make_modules(plain, 8)
    blend = Blend({"m0": 1.0, "m1": -0.5})
    prompt = make_prompt(30, seed=4)
    expected = reference_tokens(plain, modules, blend, prompt, 120)
    with TorchEngine(copy.deepcopy(plain)) as engine:
        digests = load_all(engine, {name: modules[name] for name in ("m0", "m1")})
        long_run = engine.submit(request(prompt, blend, digests, max_tokens=120))
        engine.unload_module(digests["m0"])
        engine.unload_module(digests["m1"])
        for name in ("m2", "m3", "m4", "m5", "m6", "m7"):
            digest = engine.load_module(modules[name])
            only = Blend({name: 1.0})
            short = engine.submit(request(prompt, only, {name: digest}))
            assert tokens_of(short) == reference_tokens(plain, modules, only, prompt, TOKENS)
            engine.unload_module(digest)
        assert tokens_of(long_run) == expected
        assert engine.stats().modules == 0
