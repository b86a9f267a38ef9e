"""What a recipe makes of a layer's experts: against its parts called by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.smoe.alignment import aligned
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.grouping import dominants, group_by_logits, group_by_outputs
from mergeroute.adapters.smoe.layout import ExpertWeights, MoeCheckpoint
from mergeroute.adapters.smoe.merging import usage_shares
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.adapters.smoe.stored import ExpertsReport, read_layers, read_report
from mergeroute.adapters.smoe.usage import LayerUsage, Usage
from mergeroute.runtime.sparse_blocks import sparse_blocks

from ...moe import EXPERTS, make_moe, usage_of

Grouping = Callable[[LayerUsage, int], Tensor]


def in_one_group(usage: LayerUsage, _count: int) -> Tensor:
    return torch.zeros(len(usage.counts), dtype=torch.long)


CASES: dict[str, tuple[dict[str, Any], Grouping, float | None, bool]] = {
    "m-smoe": ({"method": "m-smoe", "keep": 2}, group_by_logits, 1e-3, True),
    "not aligned": (
        {"method": "m-smoe", "keep": 2, "align": "none"},
        group_by_logits,
        1e-3,
        False,
    ),
    "floor": ({"method": "m-smoe", "keep": 2, "floor": 0.25}, group_by_logits, 0.25, True),
    "hc-smoe": ({"method": "hc-smoe", "keep": 2}, group_by_outputs, 1e-3, False),
    "hc-smoe aligned": (
        {"method": "hc-smoe", "keep": 2, "align": "dominant"},
        group_by_outputs,
        1e-3,
        True,
    ),
    "average": ({"method": "average", "keep": 2}, group_by_logits, None, False),
    "shared": ({"method": "shared"}, in_one_group, None, False),
}
"""A recipe's experts; its groups, the floor of its mean by usage if it is one, its alignment."""


@pytest.fixture(scope="module")
def model() -> Any:
    return make_moe(seed=2)


@pytest.fixture(scope="module")
def usage(model: Any) -> Usage:
    return usage_of(model)


@pytest.fixture(scope="module")
def moe(model: Any, tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    folder = tmp_path_factory.mktemp("layers") / "moe"
    model.save_pretrained(folder)
    return MoeCheckpoint.open(folder)


def build(moe: MoeCheckpoint, experts: Mapping[str, Any], usage: Usage, out: Path) -> Bank:
    document = {"base": str(moe.path), "experts": experts, "calibration": "prompts"}
    recipe = MoeRecipe.model_validate(document)
    return build_moe(recipe, out, tools=MoeTools(collect=lambda _: usage))


def report_of(bank: Bank) -> ExpertsReport:
    report = read_report(bank.backbone.path)
    assert report is not None
    return report


def expected(case: str, weights: ExpertWeights, usage: LayerUsage) -> tuple[Tensor, ExpertWeights]:
    """Each expert's group, and the centre of that in its place."""
    experts, grouping, floor, is_aligned = CASES[case]
    groups = grouping(usage, experts.get("keep", 1))
    if is_aligned:
        weights = aligned(weights, dominants(groups, usage.counts))
    shares = torch.ones(EXPERTS) if floor is None else usage_shares(usage, floor=floor)
    own = (groups[:, None] == groups) * shares  # [E, E]
    own = own / own.sum(1, keepdim=True)
    means = (torch.einsum("ef,foi->eoi", own, matrix) for matrix in weights.matrices)
    return groups, ExpertWeights(*means)


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_groups_aligns_and_weighs_as_its_method_says(
    case: str, moe: MoeCheckpoint, usage: Usage, tmp_path: Path
) -> None:
    bank = build(moe, CASES[case][0], usage, tmp_path / "bank")
    plain = MoeCheckpoint.open(bank.backbone.path)
    layers = zip(moe.layers, plain.layers, report_of(bank).layers, strict=True)
    for original, merged, told in layers:
        own = usage[original.name]
        groups, centres = expected(case, moe.read(original), own)
        found = torch.tensor(told.groups)
        assert torch.equal(found[:, None] == found, groups[:, None] == groups)
        used = [int(own.counts[found == group].sum()) for group in range(told.experts)]
        assert used == sorted(used, reverse=True)
        stored = plain.read(merged).chosen(found)
        for matrix, wanted in zip(stored.matrices, centres.matrices, strict=True):
            assert torch.allclose(matrix, wanted, atol=1e-6)


def test_the_cases_tell_each_other_apart(moe: MoeCheckpoint, usage: Usage) -> None:
    found = {
        case: [expected(case, moe.read(x), usage[x.name])[1].gate_up for x in moe.layers]
        for case in CASES
    }
    for one, other in itertools.combinations(found.values(), 2):
        assert not all(torch.allclose(x, y, atol=1e-3) for x, y in zip(one, other, strict=True))


def test_residuals_that_are_fitted_to_outputs_keep_those_closer(
    moe: MoeCheckpoint, usage: Usage, tmp_path: Path
) -> None:
    """Where inputs are: what the calibration tokens bring in. Down is not fitted."""
    missing, downs = {}, {}
    for fit in ("weights", "outputs"):
        residuals = {"rank": 4, "fit": fit, "dtype": "float32"}
        bank = build(moe, {"method": "shared", "residuals": residuals}, usage, tmp_path / fit)
        (name, layer), *_ = read_layers(bank.backbone.path, [moe.layers[0].name])
        assert layer.residuals is not None
        plain = MoeCheckpoint.open(bank.backbone.path)
        centre = plain.read(plain.layers[0]).gate_up[0]
        served = torch.stack([centre + own.dense() for own in layer.residuals[0]])
        change = moe.read(moe.layers[0]).gate_up - served
        moment = usage[name].moment
        assert moment is not None
        missing[fit] = float(torch.einsum("eoi,ij,eoj->", change, moment, change))
        downs[fit] = torch.stack([own.dense() for own in layer.residuals[1]])
    assert missing["outputs"] < 0.9 * missing["weights"]
    assert torch.equal(downs["outputs"], downs["weights"])


@torch.no_grad()
def test_experts_that_are_copies_with_shuffled_neurons_lose_nothing_where_they_are_aligned(
    tmp_path: Path,
) -> None:
    model: Any = make_moe()
    for block in sparse_blocks(model).values():
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        width = down.shape[2]
        for expert in range(1, EXPERTS):
            order = torch.randperm(width)
            gate_up[expert] = gate_up[0][torch.cat([order, order + width])]
            down[expert] = down[0][:, order]
    model.save_pretrained(tmp_path / "moe")
    moe, usage = MoeCheckpoint.open(tmp_path / "moe"), usage_of(model)
    errors = {}
    for align in ("dominant", "none"):
        experts = {"method": "m-smoe", "keep": 1, "align": align}
        bank = build(moe, experts, usage, tmp_path / align)
        errors[align] = [max(layer.errors) for layer in report_of(bank).layers]
    assert max(errors["dominant"]) < 1e-6
    assert min(errors["none"]) > 0.1
