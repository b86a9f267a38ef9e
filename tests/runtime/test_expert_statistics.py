"""What experts do on calibration prompts, and the merges that weigh by it, against whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergeroute.adapters.build import open_sources
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.merge import Merger
from mergeroute.adapters.merging.calibrated import fisher, regmean_dense
from mergeroute.adapters.recipe import Recipe
from mergeroute.runtime.calibration import fisher_diagonals, input_moments
from mergeroute.runtime.expert_statistics import (
    ExpertStatistics,
    SequentialStatistics,
    expert_model,
)
from mergeroute.runtime.rendering import Rendered

from ..experts import Weights, Zoo, make_zoo
from ..tiny import make_model, make_prompt

CPU = torch.device("cpu")
PROMPTS = {
    name: [Rendered(make_prompt(n, seed=10 * k + n), n) for n in (4, 9, 6)]
    for k, name in enumerate("abc")
}
WEIGHTS = [1.0, 0.5]
Zoos = Callable[..., Zoo]


@pytest.fixture(scope="session")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Zoos:
    @cache
    def zoo(architecture: str = "llama", tied: bool | None = None) -> Zoo:
        folder = tmp_path_factory.mktemp(f"zoo-{architecture}")
        return make_zoo(folder, make_model(architecture, tied=tied))

    return zoo


def recipe_of(zoo: Zoo, method: str, names: str = "ac", **backbone: Any) -> Recipe:
    return zoo.recipe(
        names, weights=WEIGHTS, backbone={"method": method, **backbone}, calibration="prompts"
    )


def merged(recipe: Recipe, kind: type[ExpertStatistics], folder: Path) -> tuple[Weights, int]:
    """The backbone that statistics of a kind lead to, and how often a prompt was run."""
    base, experts = open_sources(recipe)
    runs: list[int] = []
    statistics = kind(base, experts, PROMPTS, device=CPU, on_prompt=lambda: runs.append(1))
    folder.mkdir(exist_ok=True)
    merger = Merger(base, experts, recipe, statistics)
    merger.write_backbone(folder, on_parameter=lambda: None)
    return load_file(folder / "model.safetensors"), len(runs)


def model_of(architecture: str, tied: bool | None, *parts: Mapping[str, Tensor]) -> Any:
    """A model with weights from several places, later ones first."""
    model = make_model(architecture, tied=tied)
    with torch.no_grad():
        for part in parts:
            for name, weight in part.items():
                model.get_parameter(name).copy_(weight)
    return model


def mean_of(zoo: Zoo, names: str, name: str) -> Tensor:
    total = sum(WEIGHTS)
    weighted = [w / total * zoo.experts[e][name] for e, w in zip(names, WEIGHTS, strict=True)]
    return torch.stack(weighted).sum(0)


def regressed(
    zoo: Zoo, names: str, name: str, grams: Sequence[Tensor], *, is_transposed: bool
) -> Tensor:
    """RegMean of one linear layer, on dense deltas."""
    deltas = [zoo.experts[e][name] - zoo.base[name] for e in names]
    deltas = [delta.T for delta in deltas] if is_transposed else deltas
    change = regmean_dense(deltas, grams, weights=WEIGHTS)
    return zoo.base[name] + (change.T if is_transposed else change)


@pytest.mark.parametrize("name", ["a", "c"])
def test_the_model_of_an_expert_has_its_weights(name: str, zoos: Zoos) -> None:
    zoo = zoos()
    base, (expert,) = open_sources(zoo.recipe(name))
    model = expert_model(expert, base, CPU)
    for parameter, weight in zoo.experts[name].items():
        torch.testing.assert_close(model.get_parameter(parameter), weight)


def test_moments_are_those_of_each_expert_on_its_own_prompts(zoos: Zoos) -> None:
    zoo = zoos()
    base, experts = open_sources(zoo.recipe("ac"))
    statistics = ExpertStatistics(base, experts, PROMPTS, device=CPU)
    models = [model_of("llama", None, zoo.experts[e]) for e in "ac"]
    wanted = [input_moments(m, PROMPTS[e]) for e, m in zip("ac", models, strict=True)]
    for layer in base.shapes.linear:
        for found, own in zip(statistics.moments(layer), wanted, strict=True):
            torch.testing.assert_close(found, own[layer].mean, atol=1e-4, rtol=1e-3)
    assert torch.equal(statistics.moments_of(experts[1])[layer], list(statistics.moments(layer))[1])


def test_fisher_diagonals_have_norm_one_over_each_expert(zoos: Zoos) -> None:
    zoo = zoos("llama", True)
    base, experts = open_sources(zoo.recipe("ac"))
    statistics = ExpertStatistics(base, experts, PROMPTS, device=CPU)
    for k, name in enumerate("ac"):
        own = fisher_diagonals(
            model_of("llama", True, zoo.experts[name]), PROMPTS[name], labels="sampled"
        )
        norm = torch.cat([d.flatten() for d in own.values()]).double().norm()
        for parameter in base.parameters:
            found = statistics.fishers(parameter)[k]
            torch.testing.assert_close(found, (own[parameter] / norm).float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("names", ["ab", "ac"])
def test_a_fisher_merge_weighs_every_entry(
    names: str, architecture: str, tied: bool, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture, tied)
    found, runs = merged(recipe_of(zoo, "fisher", names, floor=1e-4), ExpertStatistics, tmp_path)
    assert runs == 2 * len(PROMPTS["a"])
    base, experts = open_sources(zoo.recipe(names))
    statistics = ExpertStatistics(base, experts, PROMPTS, device=CPU)
    for name, before in zoo.base.items():
        x = torch.stack([zoo.experts[e][name] - before for e in names])
        diagonals = torch.stack(list(statistics.fishers(name)))
        change = fisher(x, diagonals, weights=torch.tensor(WEIGHTS), floor=1e-4)
        torch.testing.assert_close(found[name], before + change, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "names"), [("llama", "ab"), ("gpt2", "ac")])
def test_a_regmean_merge_regresses_linear_layers_and_averages_the_rest(
    architecture: str, names: str, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture)
    recipe = recipe_of(zoo, "regmean", names)
    found, runs = merged(recipe, ExpertStatistics, tmp_path)
    assert runs == 2 * len(PROMPTS["a"])
    base, _ = open_sources(recipe)
    models = [model_of(architecture, None, zoo.experts[e]) for e in names]
    moments = [input_moments(m, PROMPTS[e]) for e, m in zip(names, models, strict=True)]
    for name, parameter in base.parameters.items():
        if parameter.kind is Kind.LINEAR:
            grams = [own[parameter.layer].mean for own in moments]
            wanted = regressed(zoo, names, name, grams, is_transposed=parameter.is_transposed)
        else:
            wanted = mean_of(zoo, names, name)
        torch.testing.assert_close(found[name], wanted, atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize(
    ("architecture", "names"), [("llama", "ab"), ("gpt2", "ac"), ("llama", "ac")]
)
def test_regmean_plus_plus_looks_behind_what_is_merged(
    architecture: str, names: str, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos(architecture)
    recipe = recipe_of(zoo, "regmean_plus_plus", names)
    found, runs = merged(recipe, SequentialStatistics, tmp_path)
    base, _ = open_sources(recipe)
    assert runs <= 2 * base.blocks * 2 * len(PROMPTS["a"])
    done = {n: mean_of(zoo, names, n) for n, p in base.parameters.items() if p.depth is None}
    for depth in (0.0, 0.5, 1.0):
        block = [p for p in base.parameters.values() if p.depth == depth]
        layers = [p.layer for p in block if p.kind is Kind.LINEAR]
        moments = []
        for expert in names:
            own = {p.name: zoo.experts[expert][p.name] for p in block}
            model = model_of(architecture, None, zoo.base, done, own)
            moments.append(input_moments(copy.deepcopy(model), PROMPTS[expert], layers=layers))
        for parameter in block:
            name = parameter.name
            if parameter.kind is Kind.LINEAR:
                grams = [own[parameter.layer].mean for own in moments]
                done[name] = regressed(
                    zoo, names, name, grams, is_transposed=parameter.is_transposed
                )
            else:
                done[name] = mean_of(zoo, names, name)
    for name, wanted in done.items():
        torch.testing.assert_close(found[name], wanted, atol=2e-3, rtol=1e-2, msg=name)
    plain, _ = merged(recipe_of(zoo, "regmean", names), ExpertStatistics, tmp_path / "plain")
    assert any((plain[name] - found[name]).abs().max() > 1e-2 for name in found)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
def test_loras_stay_in_factors_and_are_looked_at_once(
    method: str, zoos: Zoos, tmp_path: Path
) -> None:
    zoo = zoos()
    recipe = zoo.recipe("cd", backbone={"method": method}, calibration="prompts")
    base, experts = open_sources(recipe)
    kind = SequentialStatistics if method == "regmean_plus_plus" else ExpertStatistics
    prompts = {**PROMPTS, "d": PROMPTS["a"]}
    statistics = kind(base, experts, prompts, device=CPU)
    merger = Merger(base, experts, recipe, statistics)
    merger.write_backbone(tmp_path, on_parameter=lambda: None)
    found = load_file(tmp_path / "model.safetensors")
    assert merger.is_factored
    for layer, delta in merger.shared_deltas().items():
        name = f"{layer}.weight"
        torch.testing.assert_close(
            zoo.base[name] + delta.dense(), found[name], atol=1e-4, rtol=1e-4
        )


def test_the_statistics_of_one_expert_alone_leave_it_as_it_is(zoos: Zoos, tmp_path: Path) -> None:
    zoo = zoos()
    for method in ("fisher", "regmean"):
        recipe = zoo.recipe("b", backbone={"method": method}, calibration="prompts")
        found, _ = merged(recipe, ExpertStatistics, tmp_path / method)
        for name, weight in zoo.experts["b"].items():
            torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-3)
