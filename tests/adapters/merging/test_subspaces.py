"""KnOTS and OPCM against slow dense references."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.delta import LowRank, concat
from mergeroute.adapters.merging.subspaces import knots, opcm, opcm_step

seeds = st.integers(0, 2**16)


def make_deltas(
    seed: int, *, o: int = 9, i: int = 8, ranks: Sequence[int] = (3, 2, 4)
) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(torch.randn(o, r, generator=generator), torch.randn(r, i, generator=generator))
        for r in ranks
    ]


def dense(delta: LowRank) -> Tensor:
    return delta.left.double() @ delta.right.double()


def assert_same(one: Tensor, other: Tensor, *, tolerance: float = 2e-5) -> None:
    scale = max(float(one.norm()), float(other.norm()), 1e-9)
    assert float((one.double() - other.double()).norm()) <= tolerance * scale


def ties_of_entries(columns: list[list[float]], weights: list[float], density: float) -> Tensor:
    """TIES on lists of numbers, one entry after another."""
    kept = max(1, int(density * len(columns[0])))
    trimmed = []
    for column in columns:
        least = sorted((abs(x) for x in column), reverse=True)[kept - 1]
        trimmed.append([x if abs(x) >= least else 0.0 for x in column])
    merged = []
    for entries in zip(*trimmed, strict=True):
        total = sum(w * x for w, x in zip(weights, entries, strict=True))
        agree = [(w, x) for w, x in zip(weights, entries, strict=True) if x * total > 0]
        divisor = sum(w for w, _ in agree)
        merged.append(sum(w * x for w, x in agree) / divisor if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


def dense_knots(deltas: Sequence[Tensor], weights: list[float], density: float) -> Tensor:
    """[D_1 ... D_T] = U S [V_1 ... V_T], TIES on the parts S V_t, U times the result."""
    whole = torch.cat([w * d for w, d in zip(weights, deltas, strict=True)], 1)
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    parts = (s[:rank, None] * vt[:rank]).split(deltas[0].shape[1], dim=1)
    columns = [(part / w).flatten().tolist() for part, w in zip(parts, weights, strict=True)]
    merged: Tensor = u[:, :rank] @ ties_of_entries(columns, weights, density).view(rank, -1)
    return merged


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0.05, 0.2, 0.5, 1.0]), st.sampled_from([(1, 1, 1), (1, 0.5, 3)]))
def test_knots_is_ties_in_the_shared_basis(
    seed: int, density: float, weights: tuple[float, ...]
) -> None:
    deltas = make_deltas(seed)
    merged = knots(deltas, weights=weights, density=density)
    expected = dense_knots([dense(d) for d in deltas], list(weights), density)
    assert_same(dense(merged), expected, tolerance=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.25, 7.0])
def test_knots_of_one_expert_or_its_copies_is_the_expert(weight: float) -> None:
    one = make_deltas(1, ranks=[3])[0]
    for copies in (1, 3):
        merged = knots([one] * copies, weights=[weight] * copies, density=1.0)
        assert_same(dense(merged), dense(one))
        assert merged.rank == 3


def test_knots_trims_to_the_largest_entries_of_the_shared_basis() -> None:
    one = LowRank(torch.eye(3), torch.tensor([[9.0, 0.1], [0.2, 5.0], [0.0, 0.3]]))
    u, s, vt = one.svd()
    entries = (s[:, None] * vt).flatten()
    kept = entries.where(entries.abs() >= entries.abs().sort().values[2], 0.0)
    merged = knots([one], weights=[1.0], density=0.5)
    assert_same(dense(merged), u @ kept.view(2, 2))


def test_knots_with_an_exact_tie_elects_neither() -> None:
    one = make_deltas(2, ranks=[2])[0]
    merged = knots([one, one.scaled(-1)], weights=[1.0, 1.0], density=1.0)
    assert merged.norm() == pytest.approx(0, abs=1e-6)
    # a negative weight turns a delta round
    merged = knots([one, one.scaled(-1)], weights=[1.0, -1.0], density=1.0)
    assert_same(dense(merged), dense(one))


def test_knots_refuses_a_density_out_of_range() -> None:
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density"):
            knots(make_deltas(1), weights=[1.0] * 3, density=density)


def dense_opcm(deltas: Sequence[Tensor], alpha: float) -> Tensor:
    """The published loop with its factors: full decompositions, the norm restored every time."""
    merged, previous = deltas[0].clone(), 1.0
    for count, delta in enumerate(deltas[1:], 2):
        u, s, vt = torch.linalg.svd(merged, full_matrices=True)
        leading = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
        projected = u.T @ delta @ vt.T
        projected.diagonal().fill_(0)
        projected[:leading, :leading] = 0
        total = previous * merged + u @ projected @ vt
        mean = torch.stack([d.norm() for d in deltas[:count]]).mean()
        previous = float(total.norm() / mean)
        merged = total / previous
    return merged


@settings(deadline=None, max_examples=25)
@given(
    seeds, st.integers(1, 4), st.integers(3, 8), st.integers(3, 8), st.sampled_from([0.0, 0.5, 0.9])
)
def test_opcm_of_full_rank_deltas_is_the_published_method(
    seed: int, experts: int, o: int, i: int, alpha: float
) -> None:
    deltas = make_deltas(seed, o=o, i=i, ranks=[min(o, i)] * experts)
    merged = opcm(deltas, weights=[1.0] * experts, alpha=alpha)
    assert_same(dense(merged), dense_opcm([dense(d) for d in deltas], alpha), tolerance=1e-4)


def test_opcm_restores_the_mean_norm_and_weighs() -> None:
    deltas, weights = make_deltas(3), [1.0, 0.5, 3.0]
    merged = opcm(deltas, weights=weights)
    norms = [w * d.norm() for w, d in zip(weights, deltas, strict=True)]
    assert merged.norm() == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert merged.rank <= 8
    scaled = [d.scaled(w) for w, d in zip(weights, deltas, strict=True)]
    assert_same(dense(merged), dense(opcm(scaled, weights=[1.0] * 3)))


def test_opcm_of_one_expert_or_its_copies_is_the_expert() -> None:
    one = make_deltas(4, ranks=[3])[0]
    for copies in (1, 2, 4):
        assert_same(dense(opcm([one] * copies, weights=[1.0] * copies)), dense(one))


def test_an_arrival_adds_only_what_is_new() -> None:
    total, delta, _ = make_deltas(5)
    u, s, vt = total.svd()
    for alpha in (0.0, 0.5, 1.0):
        after = opcm_step(total, delta, alpha=alpha)
        change = u.T @ (dense(after) - dense(total)) @ vt.T  # in the frame of the total
        torch.testing.assert_close(change.diagonal(), torch.zeros_like(s), atol=1e-5, rtol=0)
        leading = int((s.cumsum(0) <= alpha * s.sum()).sum()) if alpha < 1 else len(s)
        block = change[:leading, :leading]
        torch.testing.assert_close(block, torch.zeros_like(block), atol=1e-5, rtol=0)
        beyond = torch.eye(9, dtype=torch.float64) - u @ u.T  # nothing else is lost
        assert_same(beyond @ (dense(after) - dense(total)), beyond @ dense(delta))
    assert_same(dense(opcm_step(total, total)), dense(total))


def test_arrivals_one_by_one_are_the_merge_of_all() -> None:
    deltas = make_deltas(6)
    total = deltas[0]
    for delta in deltas[1:]:
        total = opcm_step(total, delta)
    merged = opcm(deltas, weights=[1.0] * 3)
    mean = sum(delta.norm() for delta in deltas) / 3
    assert_same(dense(total) * mean / total.norm(), dense(merged))


def test_an_arrival_at_nothing_is_itself() -> None:
    delta = make_deltas(7)[0]
    zero = LowRank(torch.zeros(9, 2), torch.zeros(2, 8))
    assert_same(dense(opcm_step(zero, delta)), dense(delta))
    assert_same(dense(opcm_step(delta, zero)), dense(delta))


def test_experts_in_orthogonal_spaces_add_up() -> None:
    left = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(1))).Q
    right = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(2))).Q.T
    parts = [LowRank(left[:, k : k + 3], right[k : k + 3]) for k in (0, 3)]
    after = opcm_step(*parts)
    assert_same(dense(after), dense(concat(parts)))


def test_opcm_errors() -> None:
    one, other = make_deltas(8, ranks=[2, 2])
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            opcm_step(one, other, alpha=alpha)
    with pytest.raises(ValueError, match="cannot join"):
        opcm_step(one, make_deltas(1, o=4)[0])
