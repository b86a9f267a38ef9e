"""Routing by token, beside a slow dense forward and PEFT's Arrow, alone and in any batch."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import ArrowConfig, create_arrow_model
from torch import Tensor, nn

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import EngineStoppedError, RequestError, UnknownModuleError
from mergeroute.adapters.lora import Module
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.directions import spectrum
from mergeroute.runtime.gating import running_means, weights
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams, TokenGate

from ..tiny import CONFIGS, make_model, make_module, make_modules, make_prompt, make_rich_module

TOKENS = 8
ARROW = TokenRouting("arrow", top_k=2)
ROUTINGS = [
    ARROW,
    TokenRouting("arrow", top_k=0, norm="raw", temperature=4),
    TokenRouting("arrow", top_k=1, none=0.5),
    TokenRouting("arrow", none=1.0, smoothing=0.7),
    TokenRouting("spectr", top_k=2),
    TokenRouting("spectr", directions=2, norm="raw", temperature=3),
    TokenRouting("phatgoose"),
    TokenRouting("phatgoose", top_k=0, temperature=0.5, none=0, smoothing=0.3),
]
PROMPT = make_prompt(21, seed=4)
BACKBONE = Blend()


def with_gates(module: Module, *, seed: int) -> Module:
    generator = torch.Generator().manual_seed(seed)
    gates = {n: torch.randn(d.shape[1], generator=generator) for n, d in module.deltas.items()}
    return replace(module, gates=gates)


def gated_modules(model: Any, count: int) -> dict[str, Module]:
    """Modules with gates, of which one changes but half of the layers."""
    made = {
        name: with_gates(module, seed=k)
        for k, (name, module) in enumerate(make_modules(model, count).items())
    }
    half = dict(list(made["m1"].deltas.items())[::2])
    gates = {name: made["m1"].gates[name] for name in half}
    return made | {"m1": replace(made["m1"], deltas=half, gates=gates)}


# The reference: one token, one layer and one module at a time, on dense matrices.


def reference_score(x: Tensor, delta: Tensor, gate: Tensor, routing: TokenRouting) -> float:
    if routing.method == "phatgoose":
        x_hat = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        v_hat = (gate - gate.mean()) / gate.std(unbiased=False)
        return float(x_hat @ v_hat / len(x) ** 0.5)
    if routing.norm == "unit":
        x = x * len(x) ** 0.5 / x.norm()
    if routing.method == "spectr" and not routing.directions:
        return float((delta @ x.double()).norm())
    kept = routing.directions or 1
    return float((torch.linalg.svd(delta)[2][:kept] @ x.double()).norm())


def reference_weights(found: Mapping[str, float], routing: TokenRouting) -> dict[str, float]:
    best = sorted(found, key=lambda name: -found[name])[: routing.top_k or len(found)]
    kept = [found[name] for name in best] + ([] if routing.none is None else [routing.none])
    shares = torch.tensor(kept, dtype=torch.double).div(routing.temperature).softmax(0)
    return dict(zip(best, shares.tolist(), strict=False))


class Reference:
    """A plain model whose linear layers are followed by the weighed dense changes."""

    def __init__(
        self, plain: Any, modules: Mapping[str, Module], blend: Blend, routing: TokenRouting
    ) -> None:
        self.model = copy.deepcopy(plain)
        self.dense = {
            m: {n: d.dense().double() for n, d in module.deltas.items()}
            for m, module in modules.items()
        }
        self.modules, self.blend, self.routing = modules, blend, routing
        for name in {name for module in modules.values() for name in module.deltas}:
            self.model.get_submodule(name).register_forward_hook(self.hook(name))

    def hook(self, layer: str) -> Any:
        def change(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            means: dict[str, float] = {}
            rows = []
            for x, y in zip(inputs[0][0], output[0], strict=True):
                found = {
                    m: reference_score(
                        x, dense[layer], self.modules[m].gates.get(layer, x), self.routing
                    )
                    for m, dense in self.dense.items()
                    if layer in dense
                }
                share = self.routing.smoothing
                means = {
                    m: share * means.get(m, score) + (1 - share) * score
                    for m, score in found.items()
                }
                weighed = reference_weights(means, self.routing)
                total = {m: weighed.get(m, 0) + self.blend.get(m, 0) for m in found}
                rows.append(
                    sum((w * self.dense[m][layer] @ x.double() for m, w in total.items()), y)
                )
            return torch.stack(rows)[None].to(output)

        return change

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], count: int = TOKENS) -> list[tuple[int, float]]:
        """Greedy tokens with their log-probabilities, without a cache."""
        ids, found = list(prompt), []
        for _ in range(count):
            logprobs = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(0)
            ids.append(int(logprobs.argmax()))
            found.append((ids[-1], float(logprobs.max())))
        return found


def answer(generation: Any) -> list[tuple[int, float]]:
    events = [event for event in generation if event.token_id is not None]
    return [(e.token_id, e.logprob.logprob) for e in events]


def assert_close(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=2e-4)


def request(
    prompt: tuple[int, ...], gate: TokenGate | None, blend: Blend = BACKBONE, count: int = TOKENS
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=count, temperature=0.0, top_logprobs=0)
    return GenerationRequest(prompt, blend, sampling, gate)


def make_engine(model: Any, **options: int) -> TorchEngine:
    limits = {"max_concurrency": 4, "token_budget": 512, **options}
    return TorchEngine(copy.deepcopy(model), options=EngineOptions(**limits))


def load_all(engine: TorchEngine, modules: Mapping[str, Module]) -> dict[str, str]:
    return {name: engine.load_module(module) for name, module in modules.items()}


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_the_engine_is_the_slow_dense_forward(routing: TokenRouting) -> None:
    plain = make_model()
    modules = gated_modules(plain, 3)
    blend = Blend({"m2": 0.25})
    expected = Reference(plain, modules, blend, routing).answer(PROMPT)
    with make_engine(plain) as engine:
        digests = load_all(engine, modules)
        gate = TokenGate(routing, tuple(digests.values()))
        assert_close(answer(engine.submit(request(PROMPT, gate, blend.renamed(digests)))), expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_is_routed(architecture: str) -> None:
    plain = make_model(architecture)
    modules = gated_modules(plain, 3)
    expected = Reference(plain, modules, Blend(), ARROW).answer(PROMPT)
    with make_engine(plain) as engine:
        gate = TokenGate(ARROW, tuple(load_all(engine, modules).values()))
        assert_close(answer(engine.submit(request(PROMPT, gate))), expected)


def whole_module(model: Any, *, seed: int) -> Module:
    """PEFT's Arrow wants the same layers and the same rank of all."""
    made = make_module(model, "m", seed=seed)
    first, (out, into) = next(iter(linear_layers(model).items()))
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(shape, generator=generator) * 0.3 for shape in ((out, 4), (4, into)))
    return replace(made, deltas={first: LowRank(*factors), **made.deltas})


def test_it_is_pefts_arrow_with_our_prototypes(tmp_path: Path) -> None:
    """PEFT's own prototypes come from power iteration and miss on flat spectra."""
    plain = make_model()
    modules = {f"m{k}": whole_module(plain, seed=k) for k in range(4)}
    for name, module in modules.items():
        module.save(tmp_path / name)
    arrow = create_arrow_model(
        copy.deepcopy(plain),
        [str(tmp_path / name) for name in modules],
        ArrowConfig(top_k=2, router_temperature=3.0),
    )
    routing = TokenRouting("arrow", top_k=2, temperature=3.0, norm="raw")
    parts = 0
    for name, layer in arrow.named_modules():
        if name.endswith(".lora_arrow.arrow_router"):
            own = name.removeprefix("base_model.model.").removesuffix(".lora_arrow.arrow_router")
            found = [spectrum(module.deltas[own]).vectors[0] for module in modules.values()]
            layer.register_buffer("prototypes", torch.stack(found))
            layer._protos_ready = True
            parts += 1
    assert parts == len(linear_layers(plain))
    ids = list(PROMPT)
    expected = []
    with torch.no_grad():
        for _ in range(TOKENS):
            logprobs = arrow(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(0)
            ids.append(int(logprobs.argmax()))
            expected.append((ids[-1], float(logprobs.max())))
    with make_engine(plain) as engine:
        gate = TokenGate(routing, tuple(load_all(engine, modules).values()))
        assert_close(answer(engine.submit(request(PROMPT, gate))), expected)


def work_of(digests: Mapping[str, str]) -> list[GenerationRequest]:
    """Backbone, blends, gates of different settings and modules, and both, of several lengths."""
    all_of, two = tuple(digests.values()), tuple(digests.values())[:2]
    gates = [
        None,
        *(TokenGate(routing, all_of) for routing in ROUTINGS),
        TokenGate(ARROW, two),
        None,
        TokenGate(ARROW, all_of),
    ]
    blends = [Blend({"m0": 1.0}), Blend(), Blend({"m2": -0.25, "m3": 0.5}), Blend()]
    return [
        request(make_prompt(5 + 9 * k % 40, seed=k), gate, blend.renamed(digests))
        for k, (gate, blend) in enumerate(zip(gates, itertools.cycle(blends), strict=False))
    ]


def test_any_batch_is_one_by_one_and_chunks_are_the_whole() -> None:
    plain = make_model("qwen3")
    modules = gated_modules(plain, 4)
    with make_engine(plain) as engine:
        work = work_of(load_all(engine, modules))
        alone = [answer(engine.submit(one)) for one in work]
    assert len({tuple(token for token, _ in found) for found in alone}) == len(alone)
    for options in ({"max_concurrency": 12}, {"max_concurrency": 5, "token_budget": 7}):
        with make_engine(plain, **options) as engine:
            load_all(engine, modules)
            running = [engine.submit(one) for one in work]
            for found, expected in zip(map(answer, running), alone, strict=True):
                assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_1_of_one_module_is_its_blend(dtype: torch.dtype) -> None:
    plain = make_model().to(dtype)
    with make_engine(plain) as engine:
        digest = engine.load_module(make_module(plain, "m"))
        engine.load_module(make_module(plain, "other", seed=9))
        blended = answer(engine.submit(request(PROMPT, None, Blend({digest: 1.0}))))
        gate = TokenGate(TokenRouting("arrow", top_k=1), (digest,))
        assert answer(engine.submit(request(PROMPT, gate))) == blended


def test_a_slot_that_always_wins_is_the_backbone() -> None:
    plain = make_model()
    with make_engine(plain) as engine:
        digests = load_all(engine, gated_modules(plain, 3))
        gate = TokenGate(TokenRouting("arrow", none=1e4), tuple(digests.values()))
        assert_close(
            answer(engine.submit(request(PROMPT, gate))),
            answer(engine.submit(request(PROMPT, None))),
        )


def test_a_prefix_is_reused_by_its_own_gate_alone_and_never_where_scores_are_smoothed() -> None:
    plain = make_model()
    prompt, longer = make_prompt(60, seed=1), make_prompt(60, seed=1) + make_prompt(9, seed=2)
    smooth = TokenRouting("arrow", smoothing=0.5)
    with make_engine(plain, max_concurrency=8) as engine:
        modules = tuple(load_all(engine, gated_modules(plain, 3)).values())
        gates = [
            TokenGate(ARROW, modules),
            TokenGate(smooth, modules),
            TokenGate(ARROW, modules[:2]),
        ]
        fresh = []
        for gate in gates:
            found = engine.submit(request(longer, gate))
            fresh.append(answer(found))
            assert found.cached_tokens == 0
    with make_engine(plain, max_concurrency=8) as engine:
        load_all(engine, gated_modules(plain, 3))
        for gate, expected, cached in zip(gates, fresh, (60, 0, 60), strict=True):
            answer(engine.submit(request(prompt, gate)))
            again = engine.submit(request(longer, TokenGate(gate.routing, gate.modules[::-1])))
            assert_close(answer(again), expected)
            assert again.cached_tokens == cached


def test_modules_of_a_gate_stay_until_it_ends_and_leave_nothing_behind() -> None:
    plain = make_model()
    modules = gated_modules(plain, 3)
    with make_engine(plain) as engine:
        digests = load_all(engine, modules)
        gate = TokenGate(ARROW, tuple(digests.values()))
        expected = answer(engine.submit(request(PROMPT, gate, count=60)))
        running = engine.submit(request(PROMPT, gate, count=60))
        for digest in digests.values():
            engine.unload_module(digest)
        assert engine.stats().modules == 3
        assert_close(answer(running), expected)
        assert engine.stats().modules == 0
        assert not engine.modules._tables._stacks
        assert not engine.modules._tables._directions
        with pytest.raises(UnknownModuleError, match="is not loaded"):
            engine.submit(request(PROMPT, gate))
        load_all(engine, dict(reversed(modules.items())))  # in other ranks than before
        assert_close(answer(engine.submit(request(PROMPT, gate, count=60))), expected)


def test_a_gate_over_a_module_that_is_gone_is_refused_while_the_engine_is_busy() -> None:
    may_go_on = threading.Event()

    def wait() -> None:
        may_go_on.wait(30)

    with make_engine(make_model()) as engine, ThreadPoolExecutor(2) as pool:
        busy = pool.submit(engine._tasks.between_steps, wait)
        refused = pool.submit(engine.submit, request(PROMPT, TokenGate(ARROW, ("gone",))))
        try:
            with pytest.raises(UnknownModuleError, match="gone is not loaded"):
                refused.result(timeout=10)
            assert not busy.done()
        finally:
            may_go_on.set()


def test_modules_that_change_more_than_inner_layers_are_refused_and_so_are_missing_gates() -> None:
    plain = make_model(tied=False)
    with make_engine(plain) as engine:
        rich = engine.load_module(make_rich_module(plain, "rich"))
        bare = engine.load_module(make_module(plain, "bare"))
        with pytest.raises(
            RequestError, match=r"'rich' .* changes embeddings and the head and norms"
        ):
            engine.submit(request(PROMPT, TokenGate(ARROW, (rich, bare))))
        with pytest.raises(
            RequestError, match=r"'bare' .* ships no gate for .* phatgoose"
        ) as caught:
            engine.prepare_gate(TokenGate(TokenRouting("phatgoose"), (bare,)))
        assert caught.value.parameter == "routing"
        blended = request(PROMPT, TokenGate(ARROW, (bare,)), Blend({rich: 0.5}))
        assert len(answer(engine.submit(blended))) == TOKENS
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.prepare_gate(TokenGate(TokenRouting("phatgoose"), (bare,)))


@pytest.mark.parametrize("modules", [(), ("a", "a")])
def test_a_gate_is_over_different_modules(modules: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="at least one, and each once"):
        TokenGate(ARROW, modules)


def test_a_gate_is_the_same_in_any_order_of_its_modules() -> None:
    assert TokenGate(ARROW, ("b", "a")) == TokenGate(ARROW, ("a", "b"))
    assert hash(TokenGate(ARROW, ("b", "a"))) == hash(TokenGate(ARROW, ("a", "b")))


@given(st.integers(0, 2**31), st.sampled_from(ROUTINGS), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_weights_are_shares_whatever_the_order(
    seed: int, routing: TokenRouting, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, count, generator=generator) * 3
    found = weights(scores, routing)
    assert (found >= 0).all()
    total = found.sum(1)
    assert (total < 1 + 1e-6).all()
    assert routing.none is not None or (total > 1 - 1e-6).all()
    assert ((found > 0).sum(1) <= (routing.top_k or count)).all()
    order = torch.randperm(count, generator=generator)
    assert torch.allclose(weights(scores[:, order], routing), found[:, order], atol=1e-6)


@given(st.integers(1, 200), st.integers(0, 199), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_running_means_go_on_where_they_stopped(count: int, cut: int, share: float) -> None:
    scores = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    mean, expected = scores[0].double(), []
    for score in scores.double():
        mean = share * mean + (1 - share) * score
        expected.append(mean)
    whole = running_means(scores, None, share=share)
    assert torch.allclose(whole.double(), torch.stack(expected), atol=1e-5)
    if 0 < cut < count:
        rest = running_means(scores[cut:], whole[cut - 1], share=share)
        assert torch.allclose(rest, whole[cut:], atol=1e-5)
