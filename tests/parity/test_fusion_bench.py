"""Our merges beside FusionBench's, where both mean the same, and where FusionBench's differ."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.merging.calibrated import fisher, fisher_norm, regmean, regmean_dense
from mergeroute.adapters.merging.elect import tall_mask
from mergeroute.adapters.merging.elementwise import consensus, emr, ties
from mergeroute.adapters.merging.masks import emr_mask_and_rescale
from mergeroute.adapters.merging.spectral import iso_c, tsv, wudi
from mergeroute.adapters.merging.stack import Stack, gathered
from mergeroute.adapters.merging.subspaces import knots, opcm_step

from .oracles import assert_same, dense_deltas, low_ranks, rotation

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the oracles' own imports
]

ONES = [1.0] * 3


def oracle(name: str) -> Any:
    """A module of FusionBench; the test is skipped without the parity extra."""
    return import_module(f"fusion_bench.method.{name}")


def dense(deltas: Sequence[LowRank]) -> list[dict[str, Tensor]]:
    """The deltas as task vectors of one matrix."""
    return [{"w": delta.dense()} for delta in deltas]


def tensor_of(merged: dict[str, Tensor]) -> Tensor:
    """The one matrix of a merged task vector."""
    return merged["w"].detach()


def rotated(deltas: Sequence[LowRank], turn: Tensor) -> list[LowRank]:
    """The deltas of a model whose outputs are rotated."""
    return [LowRank(turn @ delta.left, delta.right) for delta in deltas]


def their_ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES over flat task vectors."""
    utils = oracle("ties_merging.ties_merging_utils")
    flat = torch.stack([delta.flatten() for delta in deltas])
    merged: Tensor = utils.ties_merging(flat, reset_thresh=density, merge_func="mean")
    return merged.view_as(deltas[0])


def test_ties_keeps_one_entry_less_than_theirs() -> None:
    deltas = dense_deltas(20, 50)
    ours = gathered(ties(Stack.of(deltas), density=0.201))
    assert_same(ours, their_ties(deltas, 0.2))


def test_their_ties_trims_the_whole_model_ours_each_parameter() -> None:
    large, small = dense_deltas(1, 100), dense_deltas(1, 100, seed=1)
    models = [torch.cat([a, 0.01 * b], 1) for a, b in zip(large, small, strict=True)]
    assert not their_ties(models, 0.2)[:, 100:].any()
    assert gathered(ties(Stack.of(small), density=0.2)).count_nonzero() >= 20


def test_emr_and_what_gives_an_expert_its_part_back() -> None:
    deltas = dense_deltas(24, 16)
    merged = oracle("emr_merging.utils").emr_merge([{"w": delta} for delta in deltas])
    unified = gathered(emr(Stack.of(deltas)))
    assert_same(unified, merged[0]["w"])
    for delta, mask, rescale in zip(deltas, merged[1]["w"], merged[2].tolist(), strict=True):
        ours, number = emr_mask_and_rescale(delta, unified)
        assert torch.equal(ours, mask)
        assert number == pytest.approx(rescale, rel=1e-5)


def test_their_emr_counts_a_sum_of_zero_as_negative_ours_as_positive() -> None:
    deltas = [torch.tensor([[1.0, 3.0]]), torch.tensor([[-1.0, 2.0]])]
    merged = oracle("emr_merging.utils").emr_merge([{"w": delta} for delta in deltas])
    assert merged[0]["w"].tolist() == [[-1, 3]]
    assert gathered(emr(Stack.of(deltas))).tolist() == [[1, 3]]


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
def test_tall_masks_and_their_consensus(threshold: float) -> None:
    deltas = dense_deltas(24, 16)
    x, base = torch.stack(deltas).flatten(1), torch.zeros(24 * 16)
    masks = oracle("tall_mask.utils").generate_task_masks(x, x, base, tall_mask_lambda=threshold)
    total = torch.stack(deltas).sum(0)
    assert torch.equal(tall_mask(torch.stack(deltas), total, threshold).flatten(1), masks)
    ours = gathered(consensus(Stack.of(deltas), tall_threshold=threshold, agreement=2))
    used = (masks.sum(0) >= 2).view_as(total)
    assert_same(ours, total * used)


def their_tsv(deltas: Sequence[LowRank]) -> Tensor:
    """TSV-M of one matrix."""
    utils = oracle("task_singular_vector.utils.TSVM_utils")
    merged = utils.compute_and_sum_svd_mem_reduction(dense(deltas), accelerator="cpu")
    return tensor_of(merged)


@pytest.mark.parametrize(("rank", "shape"), [(8, (24, 40)), (8, (40, 24)), (24, (24, 40))])
def test_tsv_where_each_expert_fills_its_share_of_the_rank(
    rank: int, shape: tuple[int, int]
) -> None:
    deltas = low_ranks(*shape, rank=rank)
    ours = tsv(deltas, weights=ONES).dense()
    assert_same(ours, their_tsv(deltas), rtol=1e-4, atol=1e-4)


def test_their_tsv_fills_low_ranks_with_arbitrary_directions() -> None:
    deltas, turn = low_ranks(24, 40, rank=2), rotation(24)
    ours, theirs = tsv(deltas, weights=ONES).dense(), their_tsv(deltas)
    turned = tsv(rotated(deltas, turn), weights=ONES).dense()
    assert_same(turned, turn @ ours, rtol=1e-4, atol=1e-5)
    their_change = (their_tsv(rotated(deltas, turn)) - turn @ theirs).norm() / theirs.norm()
    assert their_change > 0.1


def their_iso_c(deltas: Sequence[LowRank]) -> Tensor:
    """ISO-C of one matrix."""
    utils = oracle("isotropic_merging.iso_utils")
    return tensor_of(utils.iso_c(dense(deltas), accelerator="cpu"))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_iso_c_of_a_sum_of_full_rank(shape: tuple[int, int]) -> None:
    deltas = low_ranks(*shape, rank=10)
    ours = iso_c(deltas, weights=ONES).dense()
    assert_same(ours, their_iso_c(deltas), rtol=1e-4, atol=1e-4)


def test_their_iso_c_gives_a_sum_of_low_rank_arbitrary_directions() -> None:
    deltas = low_ranks(24, 40, rank=2)
    ours, theirs = iso_c(deltas, weights=ONES).dense(), their_iso_c(deltas)
    rank, full = 6, 24
    assert torch.linalg.matrix_rank(ours, rtol=1e-4) == rank
    assert torch.linalg.matrix_rank(theirs, rtol=1e-4) == full
    u, _, _ = torch.linalg.svd(ours)
    within = u[:, :rank].T @ theirs  # their mean is over all 24 values, ours over the 6
    assert_same(within * full / rank, u[:, :rank].T @ ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_knots(density: float) -> None:
    deltas = low_ranks(24, 40, rank=4)
    align = oracle("knots.knots_utils").subspace_alignment
    u, singular, parts = align([delta.dense() for delta in deltas])
    scaled = [singular[:, None] * part for part in parts]
    theirs = u @ merge_utils.ties(scaled, torch.ones(3), density)
    ours = knots(deltas, weights=ONES, density=density).dense()
    assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def interference(merged: Tensor, deltas: Sequence[LowRank]) -> float:
    """What WUDI minimises."""
    terms = [((merged - d.dense()) @ d.dense().T).norm() / d.norm() for d in deltas]
    return float(sum(term.square() for term in terms))


def their_wudi(deltas: Sequence[LowRank]) -> Tensor:
    """300 steps of Adam from the sum."""
    with torch.enable_grad():
        merged = oracle("wudi.wudi").wudi_merging(dense(deltas), accelerator="cpu")
    return tensor_of(merged)


def test_wudi_has_less_interference_than_their_three_hundred_steps() -> None:
    common, *own = (delta.scaled(1e-3) for delta in low_ranks(24, 40, rank=4, experts=4))
    deltas = [LowRank(common.left + 0.5 * d.left, common.right + 0.5 * d.right) for d in own]
    ours, theirs = wudi(deltas, weights=ONES, ridge=0.0).dense(), their_wudi(deltas)
    at_end = interference(theirs, deltas)
    assert at_end < interference(torch.stack([d.dense() for d in deltas]).sum(0), deltas)
    assert interference(ours, deltas) < 1e-6 * at_end


def test_wudi_is_capped_at_the_norm_of_the_sum_theirs_is_not() -> None:
    deltas = [delta.scaled(1e-3) for delta in low_ranks(24, 40, rank=4)]
    bound = torch.stack([delta.dense() for delta in deltas]).sum(0).norm()
    ours = wudi(deltas, weights=ONES, ridge=0.0).dense()
    assert_same(ours.norm(), bound)
    assert their_wudi(deltas).norm() > bound
    rows = torch.cat([delta.right for delta in deltas]).T
    targets = torch.cat([delta.dense() @ delta.right.T for delta in deltas], 1)
    uncapped = ours * targets.norm() / (ours @ rows).norm()
    assert interference(uncapped, deltas) < 1e-6 * interference(ours, deltas)


@pytest.mark.parametrize("reduction", [0.1, 0.9, 1.0])
def test_regmean(reduction: float) -> None:
    base = dense_deltas(12, 20)[0]
    deltas = low_ranks(12, 20, rank=4, dtype=torch.float64)
    grams = [x.double().T @ x.double() / 64 for x in dense_deltas(64, 20, seed=1)]
    merge = oracle("regmean.regmean").merging_with_regmean_weights
    weights = {"l.weight": [base.double() + delta.dense() for delta in deltas]}
    theirs = merge(weights, [{"l": gram} for gram in grams], reduction)["l.weight"] - base
    ours = regmean(deltas, grams, reduction=reduction, ridge=1e-12)
    assert_same(ours.dense(), theirs)
    whole = regmean_dense([d.dense() for d in deltas], grams, reduction=reduction, ridge=1e-12)
    assert_same(whole, theirs)


def their_fisher(
    deltas: Sequence[Tensor], diagonals: Sequence[Tensor], *, normalize: bool
) -> Tensor:
    """Fisher merging of one parameter; the experts count equally."""
    merge = oracle("fisher_merging.fisher_merging").merging_with_fisher_weights
    fishers = [{"w": diagonal} for diagonal in diagonals]
    return tensor_of(merge({"w": list(deltas)}, fishers, torch.ones(len(deltas)), normalize))


def our_fisher(deltas: Sequence[Tensor], diagonals: Sequence[Tensor], *, normalize: bool) -> Tensor:
    """The same by ours."""
    norms = torch.tensor([fisher_norm([diagonal]) for diagonal in diagonals])
    return fisher(
        torch.stack(list(deltas)),
        torch.stack(list(diagonals)),
        weights=torch.ones(len(deltas)),
        norms=norms if normalize else None,
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher(normalize: bool) -> None:
    deltas = dense_deltas(12, 20)
    small, middle, large = (g.square() + 0.2 for g in dense_deltas(12, 20, seed=1))
    diagonals = [small, 5 * middle, 20 * large]
    ours = our_fisher(deltas, diagonals, normalize=normalize)
    theirs = their_fisher(deltas, diagonals, normalize=normalize)
    assert_same(ours, theirs, rtol=1e-3, atol=1e-3)  # the floor's place differs


def test_their_fisher_floor_outweighs_an_expert_of_small_norm() -> None:
    deltas = dense_deltas(12, 20)
    first, *others = (g.square() + 0.2 for g in dense_deltas(12, 20, seed=1))
    for merge, is_same in ((our_fisher, True), (their_fisher, False)):
        whole = merge(deltas, [first, *others], normalize=True)
        faint = merge(deltas, [first * 1e-6, *others], normalize=True)
        assert torch.allclose(whole, faint, atol=1e-3) == is_same


def their_opcm(
    monkeypatch: pytest.MonkeyPatch, total: Tensor, delta: Tensor, *, alpha: float
) -> Tensor:
    """One arrival before the norm is set. FusionBench's OPCM imports its CLIP models, which
    transformers 5 has no name for; they are not used here.
    """
    from transformers.models.clip import modeling_clip

    for name in ("CLIPVisionTransformer", "CLIPTextTransformer"):
        monkeypatch.setattr(modeling_clip, name, object, raising=False)
    step = oracle("opcm.opcm").OPCMForCLIP.merge_linear_weights
    lambdas = SimpleNamespace(previous_lambda_t=1, lambda_t=1)
    merged: Tensor = step(lambdas, total, torch.zeros_like(total), delta, "w", alpha)
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_an_arrival_of_opcm(
    monkeypatch: pytest.MonkeyPatch, alpha: float, shape: tuple[int, int]
) -> None:
    total, delta = low_ranks(*shape, rank=12, experts=2, dtype=torch.float64)
    ours = opcm_step(total, delta, alpha=alpha).dense()
    theirs = their_opcm(monkeypatch, total.dense(), delta.dense(), alpha=alpha)
    assert_same(ours, theirs)


def test_their_opcm_leaves_out_directions_that_a_total_of_low_rank_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, delta = low_ranks(12, 20, rank=3, experts=2, dtype=torch.float64)
    turn = rotation(12, dtype=torch.float64)
    turned_total, turned_delta = rotated([total, delta], turn)
    ours = opcm_step(total, delta).dense()
    assert_same(opcm_step(turned_total, turned_delta).dense(), turn @ ours)
    theirs = their_opcm(monkeypatch, total.dense(), delta.dense(), alpha=0.5)
    turned = their_opcm(monkeypatch, turned_total.dense(), turned_delta.dense(), alpha=0.5)
    assert (turned - turn @ theirs).norm() > 0.01 * theirs.norm()
