"""Modules that change embeddings, head, norms and biases too: in any batch, the merged model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import ModuleError, UnsupportedModelError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.blended import Blended
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.module_stack import ModuleStack
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams

from ..tiny import (
    CONFIGS,
    make_model,
    make_module,
    make_prompt,
    make_rich_module,
    reference_tokens,
)

TOKENS = 8
TOP = 10
VARIANTS = [(name, tied) for name in CONFIGS for tied in (False, True)]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NORM = "model.layers.1.input_layernorm"
PROMPT = make_prompt(12, seed=1)


def make_engine(model: Any, **options: Any) -> TorchEngine:
    limits = EngineOptions(**{"max_concurrency": 4, "token_budget": 24, **options})
    return TorchEngine(copy.deepcopy(model), options=limits)


def request(prompt: tuple[int, ...], blend: Blend, count: int = TOKENS) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=count, temperature=0.0, top_logprobs=TOP)
    return GenerationRequest(prompt, blend, sampling)


def result_of(generation: Any) -> tuple[list[int], list[tuple[int, float]]]:
    """Tokens, and the best tokens of every step with their log-probabilities."""
    events = list(generation)
    tokens = [e.token_id for e in events if e.token_id is not None]
    return tokens, [(t.token_id, t.logprob) for e in events for t in e.top_logprobs]


@torch.no_grad()
def merged_logprobs(
    plain: Any, modules: dict[str, Module], blend: Blend, ids: list[int]
) -> torch.Tensor:
    model = copy.deepcopy(plain)
    merge_into(model, modules, blend)
    logprobs: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


def assert_merged(
    result: tuple[list[int], list[tuple[int, float]]],
    plain: Any,
    modules: dict[str, Module],
    blend: Blend,
    prompt: tuple[int, ...],
) -> None:
    """Tokens and log-probabilities are those of the model with the blend merged in."""
    tokens, tops = result
    assert tokens == reference_tokens(plain, modules, blend, prompt, TOKENS)
    wanted = merged_logprobs(plain, modules, blend, [*prompt, *tokens])[len(prompt) - 1 : -1]
    for step in range(len(tokens)):
        for token, logprob in tops[step * TOP : (step + 1) * TOP]:
            assert logprob == pytest.approx(float(wanted[step, token]), abs=2e-3)


def make_zoo(plain: Any) -> dict[str, Module]:
    """Two rich modules, one that leaves a tied head alone, a plain one, and one with one norm."""
    norm = next(n for n in Shapes.of(plain).vectors if n.endswith("weight"))
    size = Shapes.of(plain).vectors[norm]
    return {
        "rich": make_rich_module(plain, "rich", rank=3, seed=1),
        "other": make_rich_module(plain, "other", rank=5, seed=2),
        "split": make_rich_module(plain, "split", rank=2, seed=3, ties_head=False),
        "plain": make_module(plain, "plain", seed=4),
        "norm": Module("norm", {}, {norm: torch.linspace(-1, 1, size)}),
    }


BLENDS = [
    Blend(),
    Blend({"rich": 1.0}),
    Blend({"plain": 0.75}),
    Blend({"rich": 0.5, "other": -0.25, "plain": 0.25}),
    Blend({"split": 0.75}),
    Blend({"norm": 1.0}),
    Blend({"split": 0.5, "rich": 0.5, "norm": 0.5}),
]


@pytest.mark.parametrize(("architecture", "tied"), VARIANTS)
def test_every_architecture_gives_the_merged_model(architecture: str, tied: bool) -> None:
    plain = make_model(architecture, tied=tied)
    assert (Shapes.of(plain).tied is not None) == tied
    modules = make_zoo(plain)
    prompts = [make_prompt(3 + 9 * k, seed=k) for k in range(len(BLENDS))]
    with make_engine(plain) as engine:
        digests = {name: engine.load_module(module) for name, module in modules.items()}
        work = [request(p, b.renamed(digests)) for p, b in zip(prompts, BLENDS, strict=True)]
        results = [result_of(g) for g in [engine.submit(asked) for asked in work]]
        alone = [result_of(engine.submit(asked)) for asked in work]
    assert [tokens for tokens, _ in results] == [tokens for tokens, _ in alone]
    for result, blend, prompt in zip(results, BLENDS, prompts, strict=True):
        assert_merged(result, plain, modules, blend, prompt)


@pytest.mark.parametrize(("architecture", "tied"), VARIANTS)
def test_every_kind_of_change_moves_the_reference(architecture: str, tied: bool) -> None:
    plain = make_model(architecture, tied=tied)
    bare = merged_logprobs(plain, {}, Blend(), list(PROMPT))
    rich = make_rich_module(plain, "m", ties_head=False)
    parts = [Module("m", {n: d}, {}, rich.embeddings & {n}) for n, d in rich.deltas.items()]
    parts += [Module("m", {}, {name: vector}) for name, vector in rich.vectors.items()]
    for part in parts:
        moved = merged_logprobs(plain, {"m": part}, Blend({"m": 1.0}), list(PROMPT))
        # A bias of keys moves all scores of a query alike.
        if not any(n.endswith("k_proj.bias") for n in part.vectors):
            assert (moved - bare).abs().max() > 1e-3, (list(part.deltas), list(part.vectors))


LLAMA = make_model("llama", tied=True)
RICH = {name: make_rich_module(LLAMA, name, rank=2 + k, seed=k) for k, name in enumerate("abc")}
RICH["d"] = make_module(LLAMA, "d", seed=9)
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.integers(-64, 96).map(lambda u: u / 64))


@settings(max_examples=15, deadline=None)
@given(blends=st.lists(WEIGHTS.map(Blend), min_size=2, max_size=4))
def test_any_blends_in_one_batch_are_the_merged_models(blends: list[Blend]) -> None:
    prompts = [make_prompt(1 + 13 * k, seed=k) for k in range(len(blends))]
    with make_engine(LLAMA) as engine:
        digests = {name: engine.load_module(module) for name, module in RICH.items()}
        work = [request(p, b.renamed(digests)) for p, b in zip(prompts, blends, strict=True)]
        results = [result_of(g) for g in [engine.submit(asked) for asked in work]]
    for result, blend, prompt in zip(results, blends, prompts, strict=True):
        assert_merged(result, LLAMA, RICH, blend, prompt)


@pytest.mark.parametrize("names", [[], ["d"]])
def test_rows_without_such_changes_are_untouched_bit_for_bit(names: list[str]) -> None:
    plain = {name: RICH[name] for name in names}
    with make_engine(LLAMA) as engine:
        digests = {name: engine.load_module(module) for name, module in plain.items()}
        asked = request(PROMPT, Blend(dict.fromkeys(names, 1.0)).renamed(digests))
        before = result_of(engine.submit(asked))
        for name in "ab":
            engine.load_module(RICH[name])
        assert result_of(engine.submit(asked)) == before


def test_layers_without_such_changes_stay_as_they_are() -> None:
    with make_engine(LLAMA) as engine:
        engine.load_module(RICH["d"])
        model = engine.model
        assert not any(isinstance(model.get_submodule(n), Blended) for n in (EMBEDDING, HEAD, NORM))
        digest = engine.load_module(Module("m", {}, {f"{NORM}.weight": torch.ones(32)}))
        wrapped = [n for n, la in model.named_modules() if isinstance(la, Blended)]
        assert [n for n in wrapped if n not in RICH["d"].deltas] == [NORM]
        assert result_of(engine.submit(request(PROMPT, Blend({digest: 0.5}))))[0]


def test_rich_modules_come_and_go_while_requests_run() -> None:
    blend = Blend({"a": 1.0, "b": -0.5})
    expected = reference_tokens(LLAMA, RICH, blend, PROMPT, 100)
    with make_engine(LLAMA) as engine:
        bare = sum(buffer.nbytes for buffer in engine.model.buffers())
        digests = {name: engine.load_module(RICH[name]) for name in "ab"}
        long_run = engine.submit(request(PROMPT, blend.renamed(digests), 100))
        engine.unload_module(digests["a"])
        engine.unload_module(digests["b"])
        for seed in range(5):
            module = make_rich_module(LLAMA, "m", rank=1 + seed, seed=50 + seed)
            only, digest = Blend({"m": 1.0}), engine.load_module(module)
            short = result_of(engine.submit(request(PROMPT, only.renamed({"m": digest}))))
            assert_merged(short, LLAMA, {"m": module}, only, PROMPT)
            engine.unload_module(digest)
        assert result_of(long_run)[0] == expected
        assert engine.stats().modules == 0
        assert sum(buffer.nbytes for buffer in engine.model.buffers()) == bare


def test_a_slot_that_is_used_again_holds_nothing_of_before() -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    plain = make_model("qwen2")
    first = Module("first", {}, {bias: torch.ones(32) * 50, f"{NORM}.weight": torch.ones(32) * 50})
    second = Module("second", {}, {f"{NORM}.weight": torch.ones(32)})
    with make_engine(plain) as engine:
        kept = engine.load_module(make_rich_module(plain, "kept"))
        engine.unload_module(engine.load_module(first))
        digest = engine.load_module(second)
        assert kept != digest
        only = Blend({"second": 1.0})
        result = result_of(engine.submit(request(PROMPT, only.renamed({"second": digest}))))
        assert_merged(result, plain, {"second": second}, only, PROMPT)


def test_prefixes_are_not_shared_with_a_module_that_differs_in_a_norm_alone() -> None:
    deltas = RICH["d"].deltas
    pair = [Module("m", deltas, {f"{NORM}.weight": torch.ones(32) * k}) for k in (1.0, 2.0)]
    prompt, only = make_prompt(64, seed=9), Blend({"m": 1.0})
    with make_engine(LLAMA) as engine:
        for module in (*pair, pair[0]):
            digest = engine.load_module(module)
            result = result_of(engine.submit(request(prompt, only.renamed({"m": digest}))))
            assert_merged(result, LLAMA, {"m": module}, only, prompt)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_routers_see_the_bare_backbone(architecture: str) -> None:
    plain = make_model(architecture)
    with make_engine(plain) as engine:
        bare = [engine.encode([PROMPT], (layer,))[0] for layer in (1, 2)]
    with make_engine(plain) as engine:
        before = engine.encode([PROMPT], (1,))[0]
        engine.load_module(make_rich_module(plain, "m"))
        after = [engine.encode([PROMPT], (layer,))[0] for layer in (1, 2)]
    for states, wanted in zip([before, *after], [bare[0], *bare], strict=True):
        assert torch.equal(states, wanted)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bfloat16_is_within_tolerance_of_the_merged_float32_model(architecture: str) -> None:
    """The best tokens' log-probabilities within 0.1, where the module moves them by 1."""
    plain = make_model(architecture)
    rich = make_rich_module(plain, "m", seed=1)
    blend = Blend({"m": 0.5})
    wanted = merged_logprobs(plain, {"m": rich}, blend, list(PROMPT))[-1]
    assert (wanted - merged_logprobs(plain, {}, Blend(), list(PROMPT))[-1]).abs().max() > 1
    with make_engine(plain.bfloat16()) as engine:
        digest = engine.load_module(rich)
        _, tops = result_of(engine.submit(request(PROMPT, blend.renamed({"m": digest}), 1)))
    for token, logprob in tops:
        assert logprob == pytest.approx(float(wanted[token]), abs=0.1)


# What cannot be served exactly is refused by name.


def refuse(model: Any, module: Module, *texts: str) -> None:
    stack = ModuleStack(model)
    with pytest.raises((ModuleError, UnsupportedModelError)) as caught:
        stack.prepare(module)
    for text in texts:
        assert text in str(caught.value)


def test_a_head_that_the_model_does_not_call_is_refused() -> None:
    class Bypassed(type(LLAMA)):  # type: ignore[misc]
        def forward(self, *, logits_to_keep: Any = None, **inputs: Any) -> Any:
            hidden = self.model(**inputs).last_hidden_state[:, logits_to_keep]
            return F.linear(hidden, self.model.embed_tokens.weight)

    model = copy.deepcopy(LLAMA)
    model.__class__ = Bypassed
    refuse(model, RICH["a"], repr(HEAD), "the model calls it with inputs of shape []")
    ModuleStack(model).prepare(RICH["d"])


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    model = copy.deepcopy(LLAMA)
    model.model.embed_tokens.__class__ = Shifted
    refuse(model, RICH["a"], repr(EMBEDDING), "Shifted", "look up")


def test_a_norm_that_is_not_affine_in_its_weight_is_refused() -> None:
    class Squared(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.weight

    model = copy.deepcopy(LLAMA)
    model.set_submodule(NORM, Squared(32))
    refuse(model, RICH["a"], repr(NORM), "Squared", "normalised")


def test_what_does_not_fit_the_model_is_refused() -> None:
    delta = RICH["a"].deltas[EMBEDDING]
    wide = LowRank(torch.ones(301, 2), torch.ones(2, 32))
    embeddings = frozenset({EMBEDDING})
    refuse(LLAMA, Module("m", {EMBEDDING: delta}), EMBEDDING, "lora_embedding_A")
    refuse(LLAMA, Module("m", {HEAD: delta}, {}, frozenset({HEAD})), HEAD, "lora_A")
    refuse(LLAMA, Module("m", {EMBEDDING: wide}, {}, embeddings), EMBEDDING, "301 x 32")
    refuse(LLAMA, Module("m", {}, {"model.norm.bias": torch.ones(32)}), "model.norm.bias")
    refuse(LLAMA, Module("m", {}, {"model.norm.weight": torch.ones(31)}), "model.norm.weight", "31")
    refuse(LLAMA, Module("m", {}, {"model.norm.weight": torch.ones(32) * torch.nan}), "NaN")
    refuse(LLAMA, Module("m", {}, {"model.norm.weight": torch.zeros(32)}), "changes nothing")


def test_a_tied_head_changed_otherwise_than_its_embedding_is_refused_unless_untied() -> None:
    split = make_rich_module(LLAMA, "m", ties_head=False)
    both = Module("m", split.deltas, {}, split.embeddings, ties_head=True)
    refuse(LLAMA, both, EMBEDDING, HEAD, "share one weight")
    same = {**split.deltas, HEAD: split.deltas[EMBEDDING]}
    stack = ModuleStack(copy.deepcopy(LLAMA))
    stack.prepare(Module("m", same, {}, split.embeddings, ties_head=True))
    stack.prepare(split)
    ModuleStack(make_model("llama", tied=False)).prepare(both)


def test_a_vector_too_large_for_the_models_dtype_is_refused() -> None:
    model = copy.deepcopy(LLAMA).half()
    refuse(model, Module("m", {}, {f"{NORM}.weight": torch.ones(32) * 1e5}), "float16", NORM)


def test_a_head_with_a_bias_is_served() -> None:
    config = transformers.PhiConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    rich = {"m": make_rich_module(plain, "m", seed=3)}
    assert "lm_head.bias" in rich["m"].vectors
    blends = [Blend({"m": 1.0}), Blend(), Blend({"m": -0.5})]
    with make_engine(plain) as engine:
        digest = {"m": engine.load_module(rich["m"])}
        running = [engine.submit(request(PROMPT, blend.renamed(digest))) for blend in blends]
        results = [result_of(generation) for generation in running]
    for result, blend in zip(results, blends, strict=True):
        assert_merged(result, plain, rich, blend, PROMPT)
