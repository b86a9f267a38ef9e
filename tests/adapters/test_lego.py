"""LoRA-LEGO: exact cases, invariances, and the cases where reweighting would go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.delta import LowRank, concat
from mergeroute.adapters.lego import Gauge, Reweight, cluster_units, lego

seeds = st.integers(0, 2**16)
gauges = st.sampled_from(get_args(Gauge))


def make_deltas(
    seed: int, *, o: int = 12, i: int = 10, ranks: Sequence[int] = (4, 4, 4)
) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(torch.randn(o, r, generator=generator), torch.randn(r, i, generator=generator))
        for r in ranks
    ]


def regauged(delta: LowRank, seed: int) -> LowRank:
    """The same change in other factors, (B G⁻¹, G A)."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(delta.rank, delta.rank, generator=generator, dtype=torch.float64)
    return LowRank(delta.left.double() @ torch.linalg.inv(g), g @ delta.right.double())


def dense(delta: LowRank) -> Tensor:
    return delta.left.double() @ delta.right.double()


def assert_same(one: Tensor, other: Tensor, *, tolerance: float = 2e-5) -> None:
    scale = max(float(one.norm()), float(other.norm()), 1e-9)
    assert float((one.double() - other.double()).norm()) <= tolerance * scale


@settings(deadline=None, max_examples=25)
@given(seeds, gauges, st.integers(1, 4))
def test_copies_of_one_adapter_collapse_into_it(seed: int, gauge: Gauge, copies: int) -> None:
    one = make_deltas(seed)[0]
    merged = lego([one] * copies, rank=4, gauge=gauge)
    assert merged.rank == 4
    assert_same(dense(merged), dense(one))


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_one_adapter_in_several_gauges_collapses_into_it(seed: int) -> None:
    one = make_deltas(seed)[0]
    merged = lego([one, regauged(one, seed), regauged(one, seed + 1)], rank=4)
    assert_same(dense(merged), dense(one))


def test_the_raw_form_depends_on_the_gauge() -> None:
    one = make_deltas(1)[0]
    merged = lego([one, regauged(one, 1), regauged(one, 2)], rank=4, gauge="raw")
    assert float((dense(merged) - dense(one)).norm()) > 0.5 * one.norm()


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 12))
def test_the_balanced_form_does_not_depend_on_the_gauge(seed: int, rank: int) -> None:
    deltas = make_deltas(seed)
    others = [regauged(delta, seed + k) for k, delta in enumerate(deltas)]
    assert_same(dense(lego(deltas, rank=rank)), dense(lego(others, rank=rank)), tolerance=1e-4)


@settings(deadline=None, max_examples=25)
@given(seeds, gauges, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_as_many_clusters_as_units_give_the_sum_at_the_stated_scale(
    seed: int, gauge: Gauge, ranks: list[int]
) -> None:
    deltas = make_deltas(seed, ranks=ranks)
    total = dense(concat(deltas))
    for rank in (sum(ranks), 100):
        plain = lego(deltas, rank=rank, gauge=gauge, reweight="none")
        assert plain.rank == sum(ranks)
        assert_same(dense(plain), total)
        assert_same(dense(lego(deltas, rank=rank, gauge=gauge)), total / len(ranks) ** 0.5)


@settings(deadline=None, max_examples=25)
@given(seeds, gauges, st.permutations(range(3)), st.integers(1, 12))
def test_the_order_of_adapters_does_not_matter(
    seed: int, gauge: Gauge, order: list[int], rank: int
) -> None:
    deltas = make_deltas(seed, ranks=(4, 3, 5))
    merged = lego(deltas, rank=rank, gauge=gauge)
    assert_same(dense(merged), dense(lego([deltas[k] for k in order], rank=rank, gauge=gauge)))


@pytest.mark.parametrize("gauge", get_args(Gauge))
def test_the_same_seed_gives_the_same_bits(gauge: Gauge) -> None:
    deltas = make_deltas(2)
    state = torch.get_rng_state()
    one, other = (lego(deltas, rank=3, gauge=gauge, seed=5) for _ in range(2))
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cluster_is_represented_by_the_best_rank_one_of_its_mean() -> None:
    deltas = make_deltas(3, ranks=(1, 1, 1))
    mean = torch.stack([dense(delta) for delta in deltas]).mean(0)
    u, s, vt = torch.linalg.svd(mean)
    best = s[0] * u[:, :1] @ vt[:1]
    assert_same(dense(lego(deltas, rank=1, reweight="none")), best)
    sizes = sum(delta.norm() for delta in deltas) / 3
    assert_same(dense(lego(deltas, rank=1, reweight="parameter")), best * sizes / s[0])
    assert_same(dense(lego(deltas, rank=1, reweight="output")), best)  # one component each


def test_the_raw_centroid_is_the_mean_of_the_vectors() -> None:
    deltas = make_deltas(4, ranks=(1, 1, 1))
    vectors = torch.stack([torch.cat([d.left[:, 0], d.right[0]]).double() for d in deltas])
    mean = vectors.mean(0)
    plain = torch.outer(mean[:12], mean[12:])
    assert_same(dense(lego(deltas, rank=1, gauge="raw", reweight="none")), plain)
    ratio = vectors.norm(dim=1).mean() / mean.norm()
    merged = lego(deltas, rank=1, gauge="raw", reweight="parameter")
    assert_same(dense(merged), plain * ratio**2)


def test_what_each_gauge_takes_for_alike() -> None:
    e = torch.eye(2)
    one = LowRank(e[:, :1], e[:1])
    turned = LowRank(-e[:, :1], -e[:1])  # the same matrix, the opposite vector [a; b]
    other = LowRank(e[:, :1], 0.2 * e[1:])  # a near vector, an orthogonal matrix
    deltas = [one, turned, other]
    balanced = lego(deltas, rank=2, reweight="none")
    torch.testing.assert_close(balanced.dense(), torch.tensor([[1.0, 0.2], [0.0, 0.0]]))
    raw = lego(deltas, rank=2, gauge="raw", reweight="none")
    torch.testing.assert_close(raw.dense(), torch.tensor([[1.5, 0.1], [0.0, 0.0]]))


@pytest.mark.parametrize("reweight", get_args(Reweight))
def test_output_reweighting_is_the_root_of_ranks(reweight: Reweight) -> None:
    deltas = make_deltas(5, ranks=(2, 4, 6))  # 4 on average
    base = {"both": "parameter", "output": "none"}.get(reweight, reweight)
    merged = lego(deltas, rank=3, reweight=reweight)
    plain = lego(deltas, rank=3, reweight="parameter" if base == "parameter" else "none")
    assert merged.rank == 3
    factor = (4 / 3) ** 0.5 if reweight in ("both", "output") else 1.0
    assert_same(dense(merged), factor * dense(plain))


@pytest.mark.parametrize("gauge", get_args(Gauge))
def test_units_that_nearly_cancel_are_not_blown_up(gauge: Gauge) -> None:
    one = make_deltas(6, ranks=[1])[0]
    other = LowRank(-one.left * 0.999, one.right * (-0.999 if gauge == "raw" else 1))
    for rest in (other, one.scaled(-1)):
        merged = lego([one, rest], rank=1, gauge=gauge)
        assert bool(merged.dense().isfinite().all())
        assert merged.norm() <= 1e-2 * one.norm()


def test_deltas_that_change_nothing_do_not_count() -> None:
    deltas = make_deltas(7)
    zero = LowRank(torch.zeros(12, 4), torch.ones(4, 10))
    assert_same(dense(lego([zero, *deltas], rank=3)), dense(lego(deltas, rank=3)))
    nothing = lego([zero, zero], rank=3)
    assert nothing.rank >= 1
    assert torch.equal(nothing.dense(), torch.zeros(12, 10))


def test_unequal_ranks_and_more_clusters_than_distinct_units() -> None:
    one, other = make_deltas(8, ranks=(1, 5))
    merged = lego([one, other, one], rank=4)
    assert merged.rank == 4
    copies = lego([other] * 3, rank=9)  # 15 units, 5 of them distinct
    assert copies.rank == 5
    assert_same(dense(copies), dense(other))


def test_the_dtype_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        deltas = [LowRank(d.left.to(dtype), d.right.to(dtype)) for d in make_deltas(9)]
        assert lego(deltas, rank=2).left.dtype == dtype


def test_errors() -> None:
    with pytest.raises(ValueError, match="rank 0 is out of range"):
        lego(make_deltas(1), rank=0)
    with pytest.raises(ValueError, match="nothing"):
        lego([], rank=1)
    with pytest.raises(ValueError, match="different shapes"):
        lego([make_deltas(1)[0], make_deltas(1, o=3)[0]], rank=1)


def test_well_separated_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    truth = torch.randint(5, (40,), generator=generator)
    points = centres[truth] + 0.1 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    labels = cluster_units(points @ points.T, clusters=5)
    same = labels[:, None] == labels[None]
    assert torch.equal(same, truth[:, None] == truth[None])
    assert sorted(set(labels.tolist())) == list(range(5))


def spread(points: Tensor, labels: Tensor) -> float:
    return sum(
        float((points[labels == k] - points[labels == k].mean(0)).square().sum())
        for k in set(labels.tolist())
    )


@pytest.mark.parametrize("seed", range(10))  # restarts find the best often, not always
def test_two_clusters_of_few_points_are_the_best_of_all_splits(seed: int) -> None:
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double()
    labels = cluster_units(points @ points.T, clusters=2, restarts=30)
    splits = (torch.tensor([(k >> bit) & 1 for bit in range(7)]) for k in range(1, 64))
    assert spread(points, labels) <= min(spread(points, split) for split in splits) * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 9), st.permutations(range(9)))
def test_labels_follow_the_points(seed: int, clusters: int, order: list[int]) -> None:
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).double()
    labels = cluster_units(points @ points.T, clusters=clusters, seed=3)
    moved = cluster_units(points[order] @ points[order].T, clusters=clusters, seed=3)
    same, after = labels[:, None] == labels[None], moved[:, None] == moved[None]
    assert torch.equal(same[order][:, order], after)
    assert sorted(set(labels.tolist())) == list(range(clusters))


def test_equal_points_share_a_cluster_and_zeros_do_no_harm() -> None:
    points = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    labels = cluster_units(points @ points.T, clusters=5)
    assert len(set(labels.tolist())) == 3
    assert torch.equal(labels, labels[:3].repeat(4))
    assert cluster_units(torch.zeros(4, 4), clusters=2).tolist() == [0, 0, 0, 0]
