"""Streamed merges of checkpoints against each method on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergeroute.adapters.build import build, open_sources
from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import CheckpointError, RecipeError
from mergeroute.adapters.experts import Base
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.merge import Merger
from mergeroute.adapters.merging.depth import lines_alpha
from mergeroute.adapters.merging.elementwise import linear
from mergeroute.adapters.merging.methods import Method, find_method, method_names
from mergeroute.adapters.merging.stack import Context, Stack, gathered
from mergeroute.adapters.recipe import Recipe

from ..experts import Weights, Zoo, make_zoo, wide_model
from ..tiny import make_model

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {},
    "average": {"normalize": False},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.3, "scale": 0.8},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.6},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.7, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.05},
    "sce": {"select_topk": 0.5},
    "pcb": {"ratio": 0.4},
    "consensus": {},
    "emr": {"scale": 0.5},
    "widen": {},
    "mwa": {"losses": [1.0, 3.0]},
    "layer_swap": {"outer": "a", "inner": "b", "transition": 0.3},
    "tsv": {},
    "iso_c": {"scale": 0.5},
    "knots": {"density": 0.5},
    "wudi": {},
    "opcm": {},
    "lego": {"rank": 4},
}
"""Parameters of every method that needs no calibration prompts."""

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SPECTRAL = [name for name in SETTINGS if find_method(name).space == "spectral"]
ELEMENTWISE = [name for name in SETTINGS if name not in SPECTRAL]
WEIGHTS = [1.0, 0.5]


@pytest.fixture(scope="session")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A zoo by architecture; `wide` ones have several blocks of rows in a matrix."""

    @cache
    def zoo(name: str, wide: bool = False, tied: bool | None = None) -> Zoo:
        model = wide_model(name) if wide else make_model(name, tied=tied)
        return make_zoo(tmp_path_factory.mktemp(f"zoo-{name}"), model)

    return zoo


def written(recipe: Recipe, folder: Path) -> Weights:
    """The backbone that a build writes."""
    static = recipe.model_copy(
        update={"modules": recipe.modules.model_copy(update={"method": "none"})}
    )
    found: Weights = load_file(build(static, folder / "bank").backbone.path / "model.safetensors")
    return found


def context_of(base: Base, name: str, recipe: Recipe) -> Context:
    names = tuple(expert.name for expert in recipe.experts)
    parameter = base.parameters[name]
    is_transposed = parameter.is_transposed or parameter.kind is Kind.EMBEDDING
    return Context(name, names, recipe.seed, parameter.depth, is_transposed)


def reference(recipe: Recipe, zoo: Zoo, *, block_elements: int = 1 << 30) -> Weights:
    """Every method on whole deltas in memory: base plus what comes out."""
    base = Base.open(recipe.base)
    method = find_method(recipe.backbone.method)
    weights = [entry.weight for entry in recipe.experts]
    found = {}
    for name, before in zoo.base.items():
        deltas = [zoo.experts[entry.name][name] - before for entry in recipe.experts]
        parameter = base.parameters[name]
        if method.space == "spectral" and parameter.kind is Kind.LINEAR:
            change = spectral(method, deltas, recipe, is_transposed=parameter.is_transposed)
        else:
            context = context_of(base, name, recipe)
            stack = Stack.of(
                deltas, weights=weights, base=before, context=context, block_elements=block_elements
            )
            is_mean = method.space == "spectral"
            parameters = {} if is_mean else recipe.backbone.parameters
            function = linear if is_mean else method.function
            change = gathered(function(stack, **parameters)).view_as(before)
        found[name] = before + change
    return found


def spectral(
    method: Method, deltas: Sequence[Tensor], recipe: Recipe, *, is_transposed: bool
) -> Tensor:
    """A spectral method on exact singular value decompositions."""
    turned = [delta.T if is_transposed else delta for delta in deltas]
    parts = []
    for delta in turned:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        parts.append(LowRank((u * s).float(), vt.float()))
    weights = [entry.weight for entry in recipe.experts]
    merged: Tensor = method.function(parts, weights=weights, **recipe.backbone.parameters).dense()
    return merged.T if is_transposed else merged


def assert_same(found: Weights, wanted: Weights, *, atol: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=atol, msg=name)


def test_every_method_is_tried() -> None:
    needs_data = {name for name in method_names() if find_method(name).needs}
    assert needs_data == {"fisher", "regmean", "regmean_plus_plus"}
    assert set(SETTINGS) == set(method_names()) - needs_data


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_streamed_merge_is_the_merge_of_whole_tensors(
    architecture: str, method: str, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos(architecture, wide=True)
    recipe = zoo.recipe(
        "ab", weights=WEIGHTS, seed=3, backbone={"method": method} | SETTINGS[method]
    )
    blocks = {"block_elements": 1 << 17} if method in RANDOM else {}
    wanted = reference(recipe, zoo, **blocks)
    found = written(recipe, tmp_path)
    assert_same(found, wanted)
    moved = any(not torch.equal(found[name], zoo.base[name]) for name in zoo.base)
    assert moved == (method != "none")


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", None), ("qwen2", True)])
def test_a_spectral_merge_of_full_experts_is_that_of_their_exact_decompositions(
    architecture: str, tied: bool | None, method: str, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied=tied)
    recipe = zoo.recipe("ab", weights=WEIGHTS, backbone={"method": method} | SETTINGS[method])
    assert_same(written(recipe, tmp_path), reference(recipe, zoo), atol=1e-3)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "average", "knots", "opcm"])
@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
@pytest.mark.parametrize("names", ["cd", "ac"])
def test_lora_and_mixed_experts_merge_as_their_dense_deltas(
    names: str, architecture: str, method: str, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos(architecture)
    recipe = zoo.recipe(names, weights=WEIGHTS, backbone={"method": method} | SETTINGS[method])
    assert_same(written(recipe, tmp_path), reference(recipe, zoo), atol=1e-3)


@pytest.mark.parametrize("method", ["linear", "average", "task_arithmetic"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_linear_merges_of_loras_are_the_same_in_factors(
    architecture: str, method: str, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos(architecture)
    recipe = zoo.recipe("cd", weights=WEIGHTS, backbone={"method": method} | SETTINGS[method])
    base, experts = open_sources(recipe)
    merger = Merger(base, experts, recipe)
    assert merger.is_factored
    deltas = merger.shared_deltas()
    wanted = reference(recipe, zoo)
    for name, parameter in base.parameters.items():
        if parameter.layer in deltas and parameter.kind is Kind.LINEAR:
            dense = deltas[parameter.layer].dense()
            dense = dense.T if parameter.is_transposed else dense
            torch.testing.assert_close(zoo.base[name] + dense, wanted[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(wanted[name], zoo.base[name])
    assert_same(written(recipe, tmp_path), wanted)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("gpt2", True)]
)
def test_kinds_that_are_dropped_keep_the_bases_values(
    architecture: str, tied: bool, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied=tied)
    dropped = dict.fromkeys(("embedding", "head", "norm", "bias"), "drop")
    recipe = zoo.recipe("ab", kinds=dropped, backbone={"method": "linear"})
    found, base = written(recipe, tmp_path), Base.open(recipe.base)
    for name, before in zoo.base.items():
        is_linear = base.parameters[name].kind is Kind.LINEAR
        assert torch.equal(found[name], before) != is_linear


@pytest.mark.parametrize("kind", ["embedding", "head", "norm", "bias"])
def test_each_kind_is_dropped_on_its_own(kind: str, zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("qwen2")
    found = written(zoo.recipe("ab", kinds={kind: "drop"}, backbone={"method": "linear"}), tmp_path)
    base = Base.open(zoo.folder / "base")
    for name, before in zoo.base.items():
        assert torch.equal(found[name], before) == (base.parameters[name].kind == kind), name


# Scaling by depth.


def lines_reference(recipe: Recipe, zoo: Zoo, alpha: float, beta: float) -> Weights:
    base, plain = Base.open(recipe.base), reference(recipe, zoo)
    depths = {name: base.parameters[name].depth for name in plain}
    factors = {n: alpha + beta * d if d is not None else alpha for n, d in depths.items()}
    return {n: zoo.base[n] + factors[n] * (plain[n] - zoo.base[n]) for n in plain}


@pytest.mark.parametrize(("names", "method"), [("ab", "ties"), ("cd", "task_arithmetic")])
def test_lines_scales_by_depth(names: str, method: str, zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    backbone = {"method": method, "lines": {"alpha": 0.2, "beta": 0.5}}
    recipe = zoo.recipe(names, backbone=backbone)
    assert_same(written(recipe, tmp_path), lines_reference(recipe, zoo, 0.2, 0.5))


@pytest.mark.parametrize(("names", "method"), [("ab", "ties"), ("cd", "task_arithmetic")])
def test_lines_finds_its_alpha_from_the_norms(
    names: str, method: str, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos("llama")
    recipe = zoo.recipe(names, backbone={"method": method, "scale": 0.7, "lines": {"beta": 0.5}})
    plain = reference(recipe, zoo)
    summed = sum(
        float(sum((zoo.experts[e][n] - zoo.base[n] for e in names), torch.zeros(())).abs().sum())
        for n in plain
    )
    merged = sum(float((plain[n] - zoo.base[n]).abs().sum()) for n in plain)
    alpha = lines_alpha(summed, merged, experts=2)
    assert_same(written(recipe, tmp_path), lines_reference(recipe, zoo, alpha, 0.5), atol=1e-4)


# Storage.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_backbone_is_stored_in_the_recipes_dtype(dtype: str, zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    recipe = zoo.recipe("ab", dtype=dtype, backbone={"method": "linear"})
    wanted = getattr(torch, dtype)
    found = written(recipe, tmp_path)
    for name, exact in reference(recipe, zoo).items():
        assert found[name].dtype == wanted
        torch.testing.assert_close(found[name], exact.to(wanted), rtol=1e-2, atol=1e-3)


def test_a_base_in_bfloat16_is_merged_in_float32_and_stored_as_it_was(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    zoo = make_zoo(tmp_path / "zoo", model)
    recipe = zoo.recipe("ab", backbone={"method": "task_arithmetic", "scale": 0.5})
    found = written(recipe, tmp_path)
    for name, before in zoo.base.items():
        deltas = [zoo.experts[e][name].float() - before.float() for e in "ab"]
        wanted = (before.float() + 0.5 * (deltas[0] + deltas[1])).bfloat16()
        assert torch.equal(found[name], wanted), name


def test_order_and_experts_names_do_not_matter_to_a_sum(zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    one = written(zoo.recipe("abc", backbone={"method": "linear"}), tmp_path / "1")
    other = written(zoo.recipe("cba", backbone={"method": "linear"}), tmp_path / "2")
    assert_same(one, other)


def test_weights_of_zero_leave_an_expert_out(zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    found = written(zoo.recipe("ab", weights=[0.0, 2.0], backbone={"method": "linear"}), tmp_path)
    assert_same(found, zoo.experts["b"])


# What cannot be merged.


def poison(folder: Path, source: Path, name: str, value: float) -> None:
    """A copy of a checkpoint with one entry replaced."""
    from shutil import copytree

    from safetensors.torch import save_file

    copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["ties", "tsv", "none", "task_arithmetic"])
@pytest.mark.parametrize("names", ["ab", "cd"])
def test_nan_or_inf_in_the_base_is_refused(
    names: str, method: str, value: float, zoos: Any, tmp_path: Path
) -> None:
    zoo = zoos("llama")
    poison(tmp_path / "base", zoo.folder / "base", LAYER, value)
    recipe = zoo.recipe(names, base=str(tmp_path / "base"), backbone={"method": method})
    with pytest.raises(CheckpointError, match=rf"the base .* holds NaN or inf in '{LAYER}'"):
        build(recipe, tmp_path / "bank")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("method", ["ties", "tsv", "none"])
def test_nan_in_an_expert_is_refused(method: str, zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    poison(tmp_path / "a", zoo.folder / "a", LAYER, float("nan"))
    entries = [{"name": "a", "path": str(tmp_path / "a")}, zoo.recipe("b").experts[0].model_dump()]
    recipe = zoo.recipe(experts=entries, backbone={"method": method})
    with pytest.raises(CheckpointError, match=rf"expert 'a' holds NaN or inf in '{LAYER}'"):
        build(recipe, tmp_path / "bank")


def test_a_result_too_large_for_its_dtype_is_refused(zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    recipe = zoo.recipe(dtype="float16", backbone={"method": "task_arithmetic", "scale": 1e6})
    with pytest.raises(CheckpointError, match="NaN or inf in float16: lower the scale"):
        build(recipe, tmp_path / "bank")


def test_parameters_that_depend_on_the_experts_are_checked(zoos: Any, tmp_path: Path) -> None:
    zoo = zoos("llama")
    refused: Mapping[str, dict[str, Any]] = {
        "layer_swap: 'x' is no expert": {"method": "layer_swap", "outer": "a", "inner": "x"},
        "3 losses for 2 experts": {"method": "mwa", "losses": [1, 2, 3]},
    }
    for message, backbone in refused.items():
        with pytest.raises(RecipeError, match=message):
            build(zoo.recipe(backbone=backbone), tmp_path / "bank")


def test_a_buffer_is_kept_as_the_base_has_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    zoo = make_zoo(tmp_path / "zoo", make_model())
    for k, name in enumerate(("base", "a", "b")):
        path = zoo.folder / name / "model.safetensors"
        extra = {"model.rotary.inv_freq": torch.full((4,), float(k))}
        save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    for method in ("linear", "tsv"):
        found = written(zoo.recipe(backbone={"method": method}), tmp_path / method)
        assert found["model.rotary.inv_freq"].tolist() == [0.0] * 4


def test_statistics_see_parameters_in_the_order_of_the_blocks(zoos: Any) -> None:
    zoo = zoos("gpt2")
    recipe = zoo.recipe()
    merger = Merger(*open_sources(recipe), recipe)
    depths = [merger.base.parameters[name].depth for name in merger.names]
    outside = depths.count(None)
    assert depths[:outside] == [None] * outside
    assert depths[outside:] == sorted(depths[outside:], key=lambda d: d or 0.0)
    assert set(merger.names) == set(zoo.base)
    assert Checkpoint.open(zoo.folder / "base").tensors.keys() == set(zoo.base)


def test_the_forms_of_a_method_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        Method("elementwise", linear, linear)  # type: ignore[call-arg]
