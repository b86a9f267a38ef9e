"""What is exclusive to an expert: with all of it kept, the expert comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.build import build, open_sources
from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.experts import Base, LoraExpert
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.lora import Module
from mergeroute.adapters.module_files import INT8_FILE, WEIGHTS_FILE
from mergeroute.adapters.recipe import KindSettings
from mergeroute.adapters.truncation import distance
from mergeroute.adapters.twin import Extracted, Source, extract, matrices, own_factors
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams

from ..experts import EVERYTHING, Weights, Zoo, blended, changed, make_zoo, weights_of, write_model
from ..tiny import make_model, make_module, make_prompt, make_rich_module

MODELS = [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", True), ("qwen2", False)]
TIES = {"method": "ties", "density": 0.5}
SUM = {"method": "task_arithmetic", "scale": 0.4}
Zoos = Callable[..., Zoo]
transposed = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
"""PEFT finds out by itself that GPT-2 stores weights transposed, and says so."""


@pytest.fixture(scope="session")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Zoos:
    """A zoo by architecture and tiedness."""

    @cache
    def zoo(architecture: str = "llama", tied: bool | None = None) -> Zoo:
        folder = tmp_path_factory.mktemp(f"zoo-{architecture}-{tied}")
        return make_zoo(folder, make_model(architecture, tied=tied))

    return zoo


@pytest.fixture(scope="session")
def bank(zoos: Zoos, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of mixed experts that keeps everything."""
    recipe = zoos().recipe("abc", backbone=TIES, **EVERYTHING)
    return build(recipe, tmp_path_factory.mktemp("banks") / "bank")


def assert_close(found: Weights, wanted: Weights, *, atol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=1e-4, msg=name)


def sources_of(zoo: Zoo, folder: Path, names: str = "ab", **keys: Any) -> Source:
    """A backbone on disk and what modules are taken against it."""
    recipe = zoo.recipe(names, **{"backbone": SUM, "modules": {"method": "none"}, **keys})
    built = build(recipe, folder / "source")
    base, experts = open_sources(recipe)
    moved = {name for name in base.parameters if any(e.changes(name) for e in experts)}
    return Source(base, Checkpoint.open(built.backbone.path), frozenset(moved))


def extracted(zoo: Zoo, source: Source, name: str = "a", **keys: Any) -> Extracted:
    own = {"kinds": keys.pop("kinds", {}), "seed": keys.pop("seed", 0)}
    moments = keys.pop("moments", None)
    recipe = zoo.recipe(name, modules=keys, calibration="prompts.jsonl", **own)
    _, (expert,) = open_sources(recipe)
    return extract(expert, source, recipe, moments=moments)


def exclusive_of(zoo: Zoo, source: Source, name: str = "a") -> dict[str, Tensor]:
    """Expert minus backbone by linear layer, [o, i]."""
    found = {}
    for parameter in source.base.parameters.values():
        if parameter.kind is Kind.LINEAR:
            change = zoo.experts[name][parameter.name] - source.backbone.read(parameter.name)
            found[parameter.layer] = change.T if parameter.is_transposed else change
    return found


# Identities.


@pytest.mark.parametrize(("names", "backbone"), [("ab", TIES), ("cd", SUM), ("ac", SUM)])
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_all_of_what_is_exclusive_gives_every_expert_back(
    architecture: str, tied: bool, names: str, backbone: Any, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied)
    recipe = zoo.recipe(names, backbone=backbone, **EVERYTHING)
    built = build(recipe, tmp_path / "bank")
    for name in names:
        assert_close(blended(built, Blend({name: 1.0})), zoo.experts[name])
    for entry in built.modules:
        assert entry.provenance["error"] < 1e-4


@pytest.mark.parametrize(
    "method", ["none", "linear", "dare_ties", "emr", "layer_swap", "tsv", "iso_c", "wudi", "lego"]
)
@pytest.mark.parametrize("names", ["ab", "cd"])
def test_whatever_the_backbone_is(names: str, method: str, zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    parameters: dict[str, dict[str, Any]] = {
        "layer_swap": dict(zip(("outer", "inner"), names, strict=True)),
        "lego": {"rank": 3},
    }
    backbone = {"method": method, **parameters.get(method, {})}
    built = build(zoo.recipe(names, backbone=backbone, **EVERYTHING), tmp_path / "bank")
    for name in names:
        assert_close(blended(built, Blend({name: 1.0})), zoo.experts[name])


@pytest.mark.parametrize(
    "backbone",
    [
        SUM,
        {"method": "linear", "lines": {"beta": 0.5}},
        {"method": "knots", "density": 0.6},
        {"method": "lego", "rank": 3},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_shared_module_is_the_folded_change_beside_the_base(
    architecture: str, backbone: dict[str, Any], zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture)
    banks = {
        shared: build(
            zoo.recipe("cd", backbone=backbone, shared=shared, **EVERYTHING), tmp_path / shared
        )
        for shared in ("folded", "module")
    }
    beside = banks["module"]
    assert beside.shared is not None
    for name, weight in zoo.base.items():
        assert torch.equal(Checkpoint.open(beside.backbone.path).read(name), weight)
    for blend in (Blend(), Blend({"c": 1.0}), Blend({"c": 0.5, "d": -0.25})):
        assert_close(blended(beside, blend), blended(banks["folded"], blend))
    assert_close(blended(beside, Blend({"d": 1.0})), zoo.experts["d"])


def test_a_blend_of_nothing_is_the_backbone(bank: Bank) -> None:
    opened = Checkpoint.open(bank.backbone.path)
    for name, weight in blended(bank, Blend()).items():
        assert torch.equal(weight, opened.read(name))


@settings(max_examples=10, deadline=None)
@given(shares=st.tuples(st.integers(0, 64), st.integers(0, 64)))
def test_weights_that_sum_to_one_give_the_mean_of_the_experts(
    shares: tuple[int, int], bank: Bank, zoos: Zoos
) -> None:
    zoo = zoos()
    low, high = sorted(shares)
    weights = {"a": low / 64, "b": (high - low) / 64, "c": (64 - high) / 64}
    wanted = {
        n: sum((w * zoo.experts[e][n] for e, w in weights.items()), torch.zeros(()))
        for n in zoo.base
    }
    found = blended(bank, Blend({name: weight for name, weight in weights.items() if weight}))
    assert_close(found, wanted)


def test_a_lora_that_leaves_out_a_layer_of_another_gets_the_base_back_there(
    zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    built = build(zoo.recipe("cd", backbone=SUM, **EVERYTHING), tmp_path / "bank")
    own, module = Module.read(zoo.folder / "c", name="c"), built.load(built.modules[0])
    others = Module.read(zoo.folder / "d", name="d").deltas.keys() - own.deltas.keys()
    assert others
    assert others <= module.deltas.keys()


def test_loras_of_embeddings_and_norms_come_back_too(tmp_path: Path) -> None:
    model = make_model("qwen2", tied=True)
    zoo = make_zoo(tmp_path / "zoo", model)
    rich = make_rich_module(model, "r", seed=4)
    rich.save(zoo.folder / "r")
    merge_into(model, {"r": rich}, Blend({"r": 1.0}))
    for backbone in (SUM, TIES):
        recipe = zoo.recipe("cr", backbone=backbone, **EVERYTHING)
        built = build(recipe, tmp_path / str(backbone["method"]))
        assert_close(blended(built, Blend({"r": 1.0})), weights_of(model))
        assert_close(blended(built, Blend({"c": 1.0})), zoo.experts["c"])


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int = 8) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@transposed
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_the_served_bank_answers_as_each_expert_does(
    architecture: str, tied: bool, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied)
    built = build(zoo.recipe("ac", backbone=TIES, **EVERYTHING), tmp_path / "bank")
    prompts = [make_prompt(length, seed=length) for length in (5, 19)]
    found = {}
    with TorchEngine.load(built.backbone.path, dtype="float32") as engine:
        digests = {entry.name: engine.load_module(built.load(entry)) for entry in built.modules}
        params = SamplingParams(max_tokens=8, temperature=0.0)
        for name in "ac":
            blend = Blend({digests[name]: 1.0})
            running = [engine.submit(GenerationRequest(p, blend, params)) for p in prompts]
            found[name] = [[e.token_id for e in g if e.token_id is not None] for g in running]
    expert = transformers.AutoModelForCausalLM.from_pretrained(zoo.folder / "a").eval()
    assert found["a"] == [greedy(expert, prompt) for prompt in prompts]
    lora = transformers.AutoModelForCausalLM.from_pretrained(zoo.folder / "base")
    lora = peft.PeftModel.from_pretrained(lora, zoo.folder / "c").eval()
    assert found["c"] == [greedy(lora, prompt) for prompt in prompts]
    assert found["a"] != found["c"]


@transposed
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("gpt2", True)])
def test_a_module_is_a_plain_peft_folder_on_a_plain_checkpoint(
    architecture: str, tied: bool, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied)
    modules = {"rank": 5, "dtype": "float32"}
    built = build(zoo.recipe("ac", backbone=TIES, modules=modules), tmp_path / "bank")
    ids = torch.tensor([list(make_prompt(17, seed=1))])
    for entry in built.modules:
        assert {f.name for f in entry.path.iterdir()} == {"adapter_config.json", WEIGHTS_FILE}
        plain = transformers.AutoModelForCausalLM.from_pretrained(built.backbone.path).eval()
        merged = transformers.AutoModelForCausalLM.from_pretrained(built.backbone.path).eval()
        merge_into(merged, {entry.name: built.load(entry)}, Blend({entry.name: 1.0}))
        adapted = peft.PeftModel.from_pretrained(plain, entry.path)
        with torch.no_grad():
            found, wanted = adapted(ids).logits, merged(ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        with adapted.disable_adapter(), torch.no_grad():
            assert (adapted(ids).logits - found).abs().max() > 0.1


# Ranks, energy and bytes.


@pytest.mark.parametrize("name", ["a", "c"])
def test_errors_fall_with_the_rank_and_are_those_of_the_best_approximation(
    name: str, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    exclusive = exclusive_of(zoo, source, name)
    before = 2.0
    for rank in (1, 2, 5, 17, 32):
        found = extracted(zoo, source, name, rank=rank)
        left = sum(
            float(torch.linalg.svdvals(change.double())[rank:].square().sum())
            for change in exclusive.values()
        )
        total = sum(float(change.double().square().sum()) for change in exclusive.values())
        assert found.error == pytest.approx((left / total) ** 0.5, abs=1e-4)
        assert found.error <= before
        before = found.error
        for layer, delta in found.module.deltas.items():
            assert delta.rank <= rank
            difference = distance(exclusive[layer], delta)
            wanted = float(torch.linalg.svdvals(exclusive[layer])[rank:].norm())
            assert difference == pytest.approx(wanted, abs=1e-3)


def test_factors_and_dense_matrices_give_the_same_module(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    recipe = zoo.recipe("cd", backbone=SUM, modules={"rank": 3, "dtype": "float32"})
    built = build(recipe, tmp_path / "bank")
    dense = sources_of(zoo, tmp_path, "cd")
    assert dense.shared is None
    for entry in built.modules:
        module, other = built.load(entry), extracted(zoo, dense, entry.name, rank=3).module
        assert module.deltas.keys() <= other.deltas.keys()
        for layer, delta in other.deltas.items():
            wanted = module.deltas[layer].dense() if layer in module.deltas else torch.zeros(1)
            torch.testing.assert_close(
                delta.dense(), wanted.expand(delta.shape), atol=1e-4, rtol=1e-3
            )


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_at_least_the_energy_asked_for_is_kept(energy: float, zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    found = extracted(zoo, source, energy=energy)
    for layer, change in exclusive_of(zoo, source).items():
        values = torch.linalg.svdvals(change.double()).square()
        rank = found.module.deltas[layer].rank
        assert values[:rank].sum() >= energy * values.sum() * (1 - 1e-5)
        assert values[: rank - 1].sum() < energy * values.sum() * (1 + 1e-5)
    assert found.error**2 <= 1 - energy + 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("allocation", ["fixed", "energy"])
@pytest.mark.parametrize("kinds", [{}, {"embedding": "svd", "norm": "exact"}])
def test_a_budget_of_bytes_is_kept_and_used(
    kinds: dict[str, str], allocation: str, dtype: str, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    bytes_a_rank = {"float32": 6300, "bfloat16": 3150, "int8": 1700}[dtype]
    budget = 14 * bytes_a_rank
    settings_ = {"bytes": budget, "allocation": allocation, "dtype": dtype}
    recipe = zoo.recipe("ab", backbone=SUM, modules=settings_, kinds=kinds)
    built = build(recipe, tmp_path / "bank")
    for entry in built.modules:
        size = sum(stored_bytes(file) for file in entry.path.glob("*.safetensors"))
        assert 0.9 * budget <= size <= budget
        assert bool(built.load(entry).vectors) == bool(kinds)


def stored_bytes(file: Path) -> int:
    """Bytes of a file's tensors, without its header."""
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def test_energy_spends_a_budget_better_than_one_rank(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    errors = [
        extracted(zoo, source, bytes=40_000, dtype="bfloat16", allocation=allocation).error
        for allocation in ("fixed", "energy")
    ]
    assert errors[1] < errors[0]


def test_a_budget_that_is_too_small_is_refused(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    with pytest.raises(RecipeError, match=r"bytes: 1,000}} is too little|bytes: 1,000} is too"):
        extracted(zoo, source, bytes=1000)
    with pytest.raises(RecipeError, match="too little"):
        extracted(zoo, source, bytes=20, allocation="energy")
    with pytest.raises(RecipeError, match="too little"):
        extracted(zoo, source, bytes=800, kinds={"norm": "exact"})


def test_what_is_stored_is_read_back_and_rounding_is_reported(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    errors = {}
    for dtype in ("float32", "bfloat16", "int8"):
        modules = {"rank": 6, "dtype": dtype}
        built = build(zoo.recipe("ab", backbone=SUM, modules=modules), tmp_path / dtype)
        (entry, _) = built.modules
        assert (entry.path / INT8_FILE).is_file() == (dtype == "int8")
        report = entry.provenance
        assert report["ranks"] == [6, 6]
        assert report["dtype"] == dtype
        assert report["bytes"] == sum(f.stat().st_size for f in entry.path.glob("*.safetensors"))
        errors[dtype] = report["rounding_error"]
        once = built.load(entry)
        once.save(tmp_path / "again" / dtype, dtype=torch.float32)
        again = Module.read(tmp_path / "again" / dtype, name="a")
        assert again.digest == once.digest
    assert errors["float32"] < 1e-6
    assert 0 < errors["bfloat16"] < 0.01
    assert 0 < errors["int8"] < 0.03


def test_a_scale_enlarges_what_is_kept(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    one, other = extracted(zoo, source, rank=4), extracted(zoo, source, rank=4, scale=1.25)
    for layer, delta in one.module.deltas.items():
        torch.testing.assert_close(other.module.deltas[layer].dense(), 1.25 * delta.dense())


@pytest.mark.parametrize("backbone", [SUM, TIES, {"method": "none"}])
def test_layers_that_no_expert_changes_take_nothing_of_a_budget(
    backbone: dict[str, Any], tmp_path: Path
) -> None:
    """Rank 1 of all layers would take more."""
    model = make_model()
    zoo = make_zoo(tmp_path / "zoo", model)
    names = [f"{n}.weight" for n in make_module(model, "x").deltas if n.endswith("q_proj")]
    for seed, name in enumerate("ef"):
        whole = make_module(model, name, rank=3, seed=seed)
        deltas = {n: delta for n, delta in whole.deltas.items() if f"{n}.weight" in names}
        Module(name, deltas).save(zoo.folder / name)
    everything = {**EVERYTHING["kinds"], "head": "shared"}
    for kinds in ({}, everything):
        recipe = zoo.recipe("ef", backbone=backbone, modules={"bytes": 4000}, kinds=kinds)
        built = build(recipe, tmp_path / f"bank{len(kinds)}")
        for entry in built.modules:
            assert {f"{layer}.weight" for layer in built.load(entry).deltas} == set(names)


@pytest.mark.parametrize("names", ["cd", "xy"])
def test_rounding_of_the_backbone_is_no_change_of_an_expert(names: str, tmp_path: Path) -> None:
    """Neither LoRAs nor full experts change embedding, head and norms."""
    zoo = make_zoo(tmp_path / "zoo", make_model())
    for seed, name in enumerate("xy"):
        expert = changed(make_model(), seed=seed)
        keep = {n: w for n, w in zoo.base.items() if "proj" not in n}
        expert.load_state_dict(keep, strict=False)
        write_model(zoo.folder / name, expert)
    recipe = zoo.recipe(names, backbone=TIES, dtype="bfloat16", kinds=EVERYTHING["kinds"])
    for entry in (built := build(recipe, tmp_path / "bank")).modules:
        module = built.load(entry)
        assert all("proj" in layer for layer in module.deltas)
        assert not module.vectors


# Calibrated: the change of outputs is kept.


def test_fitting_outputs_keeps_them_closer_at_equal_rank(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    exclusive = exclusive_of(zoo, source)
    generator = torch.Generator().manual_seed(0)
    roots = {
        layer: torch.randn(e.shape[1], e.shape[1], generator=generator).double()
        * torch.logspace(0, -2, e.shape[1]).double()
        for layer, e in exclusive.items()
    }
    moments = {layer: (root @ root.T).float() for layer, root in roots.items()}
    fitted = extracted(zoo, source, rank=4, fit="outputs", moments=moments)
    plain = extracted(zoo, source, rank=4)
    assert plain.error < fitted.error

    def lost(found: Extracted, layer: str) -> float:
        error = exclusive[layer] - found.module.deltas[layer].dense()
        return float((error.double() @ roots[layer]).norm())

    for layer in exclusive:
        assert lost(fitted, layer) < lost(plain, layer)


# Kinds.


def test_by_default_modules_hold_linear_layers_alone(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos("llama", True)
    source = sources_of(zoo, tmp_path)
    found = extracted(zoo, source, rank=4).module
    assert found.deltas.keys() == source.base.shapes.linear.keys()
    assert not found.vectors
    assert not found.embeddings


@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_each_kind_is_kept_where_it_is_asked_for(
    architecture: str, tied: bool, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied)
    source = sources_of(zoo, tmp_path)
    shapes = source.base.shapes
    tables = extracted(zoo, source, rank=2, kinds={"embedding": "svd"}).module
    assert tables.embeddings == set(shapes.embeddings) == tables.deltas.keys() - shapes.linear
    head = extracted(zoo, source, rank=2, kinds={"head": "svd"}).module
    assert head.deltas.keys() - shapes.linear == (set() if tied else set(shapes.head))
    exact = extracted(zoo, source, rank=2, kinds={"norm": "exact", "bias": "exact"}).module
    assert exact.vectors.keys() == shapes.vectors.keys()
    for module in (tables, head, exact):
        module.check(shapes)


def test_the_number_of_matrices_is_known_beforehand(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    recipe = zoo.recipe("a", modules={"rank": 1}, kinds={"embedding": "svd", "head": "svd"})
    _, (expert,) = open_sources(recipe)
    steps: list[int] = []
    extract(expert, source, recipe, on_layer=lambda: steps.append(1))
    assert len(steps) == len(matrices(expert, source, recipe.kinds))


# Other compressors.


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("magnitude", SUM),
        ("compeft", SUM),
        ("bitdelta", SUM),
        ("tall", {"method": "task_arithmetic", "scale": 1.0}),
        ("emr", {"method": "emr"}),
        ("lego", SUM),
    ],
)
@pytest.mark.parametrize("names", ["ab", "cd"])
def test_compressors_are_converted_to_low_rank_and_report_both_errors(
    names: str, method: str, backbone: dict[str, Any], zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    reports = {}
    for rank in (4, 32):
        modules = {"method": method, "rank": rank, "dtype": "float32"}
        built = build(zoo.recipe(names, backbone=backbone, modules=modules), tmp_path / str(rank))
        reports[rank] = built.modules[0].provenance
        assert reports[rank]["ranks"][1] <= rank
    if method == "lego":
        assert reports[32]["error"] < 1e-3
        return
    compressor_error = reports[32]["compressor_error"]
    assert 0 < compressor_error < 1.5
    assert reports[32]["error"] == pytest.approx(compressor_error, abs=1e-3)
    assert reports[4]["compressor_error"] == pytest.approx(compressor_error, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_of_one_experts_units_keep_their_size(
    seed: int, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    found = extracted(zoo, source, method="lego", rank=4, seed=seed)
    best = extracted(zoo, source, rank=4)
    assert best.error <= found.error < min(1, 1.3 * best.error)


def test_the_seed_of_the_recipe_draws_the_clusters(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    source = sources_of(zoo, tmp_path)
    digests = {
        extracted(zoo, source, method="lego", rank=8, seed=seed).module.digest for seed in range(3)
    }
    assert len(digests) > 1


def test_masks_of_the_merged_change_stand_on_the_base(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    backbone = {"method": "task_arithmetic", "scale": 1.0}
    modules = {"method": "tall", "rank": 32, "dtype": "float32"}
    built = build(zoo.recipe("ab", backbone=backbone, modules=modules), tmp_path / "bank")
    found = blended(built, Blend({"a": 1.0}))
    for parameter in Base.open(zoo.folder / "base").parameters.values():
        if parameter.kind is Kind.LINEAR:
            name = parameter.name
            own, other = (zoo.experts[e][name] - zoo.base[name] for e in "ab")
            mask = own.abs() > 0.4 * other.abs()
            agree = (own.abs() - 0.4 * other.abs()).abs() > 1e-4
            wanted = zoo.base[name] + (own + other) * mask
            assert (found[name] - wanted)[agree].abs().max() < 1e-3


def test_own_factors_are_kept_as_they_are(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    keys = {"backbone": {"method": "none"}, "modules": {"method": "lora", "dtype": "float32"}}
    built = build(zoo.recipe("cd", **keys), tmp_path / "bank")
    for entry in built.modules:
        assert built.load(entry).digest == Module.read(zoo.folder / entry.name, name="x").digest
    assert built.backbone.name == "base"
    with pytest.raises(RecipeError, match=r"'a' is a full checkpoint, .*method: svd"):
        build(zoo.recipe("ca", **keys), tmp_path / "other")
    _, (full,) = open_sources(zoo.recipe("a"))
    with pytest.raises(RecipeError, match="no factors of its own"):
        own_factors(full, KindSettings())


def test_own_factors_follow_the_policy_of_kinds(tmp_path: Path) -> None:
    model = make_model("qwen2", tied=False)
    zoo = make_zoo(tmp_path / "zoo", model)
    make_rich_module(model, "r", seed=4).save(zoo.folder / "r")
    _, (rich,) = open_sources(zoo.recipe("r"))
    assert isinstance(rich, LoraExpert)
    own = Module.read(zoo.folder / "r", name="r")
    shapes = Base.open(zoo.folder / "base").shapes
    everything = EVERYTHING["kinds"]
    whole = own_factors(rich, KindSettings(**everything)).module
    assert whole.digest == own.digest
    none = own_factors(rich, KindSettings(**dict.fromkeys(everything, "drop"))).module
    assert none.deltas.keys() == own.deltas.keys() & shapes.linear.keys()
    assert not none.vectors
    assert not none.embeddings
    for kind in everything:
        kinds = KindSettings(**{**everything, kind: "shared"})
        remedy = everything[kind]
        with pytest.raises(RecipeError, match=rf"kinds\.{kind} is shared.*{{{kind}: {remedy}}}"):
            own_factors(rich, kinds)
        dropped = own_factors(rich, KindSettings(**{**everything, kind: "drop"})).module
        missing = {*own.deltas, *own.vectors} - {*dropped.deltas, *dropped.vectors}
        assert missing
        assert dropped.digest != own.digest
    outer = dataclasses.replace(own, deltas={n: own.deltas[n] for n in shapes.head}, vectors={})
    with pytest.raises(RecipeError, match="nothing is left of expert 'r'"):
        own_factors(dataclasses.replace(rich, module=outer), KindSettings(head="drop"))


def test_own_factors_of_a_tied_head_are_the_embeddings(tmp_path: Path) -> None:
    model = make_model("qwen2", tied=True)
    zoo = make_zoo(tmp_path / "zoo", model)
    make_rich_module(model, "r", seed=4).save(zoo.folder / "r")
    _, (rich,) = open_sources(zoo.recipe("r"))
    kinds = {"norm": "exact", "bias": "exact"}
    kept = own_factors(rich, KindSettings(**kinds, embedding="svd")).module
    assert kept.digest == Module.read(zoo.folder / "r", name="r").digest
    dropped = own_factors(rich, KindSettings(**kinds, embedding="drop")).module
    assert (
        dropped.deltas.keys() == Base.open(zoo.folder / "base").shapes.linear & kept.deltas.keys()
    )


def test_the_policy_of_kinds_holds_for_own_factors_in_a_build(tmp_path: Path) -> None:
    model = make_model("qwen2", tied=False)
    zoo = make_zoo(tmp_path / "zoo", model)
    make_rich_module(model, "r", seed=4).save(zoo.folder / "r")
    keys = {"backbone": {"method": "none"}, "modules": {"method": "lora"}}
    with pytest.raises(RecipeError, match=r"is shared"):
        build(zoo.recipe("cr", **keys), tmp_path / "bank")
    drop = dict.fromkeys(EVERYTHING["kinds"], "drop")
    bank = build(zoo.recipe("cr", **keys, kinds=drop), tmp_path / "bank")
    assert not bank.load(bank.modules[1]).vectors


def test_an_expert_that_is_the_backbone_has_nothing_of_its_own(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    for name in "ac":
        for kinds in ({}, EVERYTHING["kinds"]):
            recipe = zoo.recipe(name, backbone={"method": "linear"}, kinds=kinds)
            with pytest.raises(RecipeError, match=rf"nothing is exclusive to expert '{name}'"):
                build(recipe, tmp_path / "bank")
    source = sources_of(zoo, tmp_path)
    backbone = dataclasses.replace(source, backbone=Checkpoint.open(zoo.folder / "a"))
    with pytest.raises(RecipeError, match=r"nothing is exclusive to expert 'a'"):
        extracted(zoo, backbone, rank=4)
