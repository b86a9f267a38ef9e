"""Pools of modules against dense references: likeness, groups, merging, shrinking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import BankError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.pool import (
    FoldMethod,
    groups,
    layers_of,
    likeness,
    merge_modules,
    ranks_within,
    relative_error,
    shrink_module,
    used_groups,
    without_double_head,
)
from mergeroute.adapters.ranks import component_bytes
from mergeroute.adapters.shapes import Shapes

from ..tiny import make_model, make_module, make_rich_module

MODEL = make_model(tied=True)
SHAPES = Shapes.of(MODEL)
METHODS = get_args(FoldMethod)
RICH = [make_rich_module(MODEL, name, seed=k) for k, name in enumerate("abc")]


def weights(module: Module) -> dict[str, Tensor]:
    """What a module adds to each weight, dense, in float64."""
    deltas = {n: d.left.double() @ d.right.double() for n, d in module.resolved(SHAPES).items()}
    return deltas | {name: vector.double() for name, vector in module.vectors.items()}


def flat(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    parts = [weights.get(n, torch.zeros_like(like[n])).flatten() for n in sorted(like)]
    return torch.cat(parts)


def assert_same(one: Module, other: Module, *, tolerance: float = 1e-5) -> None:
    assert relative_error(one, other, SHAPES) < tolerance


def without(module: Module, layer: str) -> Module:
    return replace(module, deltas={n: d for n, d in module.deltas.items() if n != layer})


def test_likeness_is_the_cosine_of_the_dense_changes() -> None:
    modules = [*RICH, make_module(MODEL, "d", seed=9), without(RICH[0], layers_of(RICH, SHAPES)[0])]
    dense = [weights(module) for module in modules]
    everything = {name: tensor for each in dense for name, tensor in each.items()}
    rows = torch.stack([flat(each, everything) for each in dense])
    rows /= rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(likeness(modules, SHAPES), rows @ rows.T, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(2, 7), st.data())
def test_groups_do_not_depend_on_the_order(seed: int, size: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    count = data.draw(st.integers(1, size - 1))
    order = data.draw(st.permutations(range(size)))
    found = groups(rows @ rows.T, count)
    again = groups(rows[order] @ rows[order].T, count)
    assert len(found) == count
    assert sorted(sorted(order[k] for k in group) for group in again) == sorted(found)


def test_equal_modules_are_grouped_first_and_only_as_far_as_asked() -> None:
    cosine = torch.tensor(
        [[1, 0.1, 1, 1], [0.1, 1, 0.1, 0.1], [1, 0.1, 1, 1], [1, 0.1, 1, 1]]
    ).double()
    assert groups(cosine, 2) == [[0, 2, 3], [1]]
    assert sorted(map(len, groups(cosine, 3))) == [1, 1, 2]
    assert [1] in groups(cosine, 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(2, 6), data=st.data())
def test_used_modules_are_grouped_by_what_traffic_loses(
    seed: int, size: int, data: st.DataObject
) -> None:
    """The first step against every pair, by the squared error of the pair's weighed mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(size, 8, generator=generator).double(), dim=1)
    numbers = st.lists(st.floats(0.01, 1), min_size=size, max_size=size)
    shares = data.draw(numbers)

    def loss(a: int, b: int) -> float:
        mean = (shares[a] * x[a] + shares[b] * x[b]) / (shares[a] + shares[b])
        return sum(shares[k] * float((x[k] - mean).square().sum()) for k in (a, b))

    losses = {(a, b): loss(a, b) for a in range(size) for b in range(a + 1, size)}
    found = used_groups(x @ x.T, shares, size - 1)
    joined = next(group for group in found if len(group) > 1)
    assert losses[joined[0], joined[1]] == pytest.approx(min(losses.values()))
    assert sorted(k for group in found for k in group) == list(range(size))
    assert used_groups(x @ x.T, shares, 1) == [list(range(size))]


def test_what_is_used_most_stays_as_it_is() -> None:
    """Of modules that have nothing in common; copies meet before that."""
    shares = [1 / rank for rank in range(1, 9)]
    assert used_groups(torch.eye(8), shares, 4) == [[0], [1], [2], [3, 4, 5, 6, 7]]
    cosine = torch.eye(3)
    cosine[0, 2] = cosine[2, 0] = 1
    assert used_groups(cosine, [0.6, 0.01, 0.4], 2) == [[0, 2], [1]]


@pytest.mark.parametrize("method", METHODS)
def test_copies_collapse_into_the_module(method: FoldMethod) -> None:
    merged = merge_modules([RICH[0]] * 3, name="m", shapes=SHAPES, method=method)
    assert_same(merged, RICH[0])
    assert merged.deltas.keys() == RICH[0].deltas.keys()
    assert merged.embeddings == RICH[0].embeddings
    assert merged.ties_head
    assert merged.rank == RICH[0].rank


def test_svd_truncates_the_mean_and_vectors_are_averaged() -> None:
    first = without(RICH[0], next(iter(RICH[0].deltas)))
    members = [first, RICH[1]]
    merged = weights(merge_modules(members, name="m", shapes=SHAPES, method="svd"))
    dense = [weights(member) for member in members]
    for name in dense[1]:
        mean = (dense[0].get(name, torch.zeros_like(dense[1][name])) + dense[1][name]) / 2
        if mean.ndim == 2:
            u, s, vt = torch.linalg.svd(mean, full_matrices=False)
            rank = RICH[1].resolved(SHAPES)[name].rank
            mean = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(merged[name], mean, atol=1e-4, rtol=1e-4)


def test_lego_does_not_count_who_leaves_a_layer_as_it_is() -> None:
    layer = next(iter(RICH[0].deltas))
    members = [without(RICH[1], layer), RICH[0]]
    merged = merge_modules(members, name="m", shapes=SHAPES, method="lego")
    kept = weights(RICH[0])[layer]
    torch.testing.assert_close(weights(merged)[layer], kept, atol=1e-4, rtol=1e-4)


def test_a_merged_module_has_the_size_of_its_largest_member() -> None:
    small, large = make_module(MODEL, "s", rank=2, seed=1), make_module(MODEL, "l", rank=5, seed=2)
    for method in METHODS:
        merged = merge_modules([small, large], name="m", shapes=SHAPES, method=method)
        assert {delta.rank for delta in merged.deltas.values()} == {5}


@pytest.mark.parametrize("method", METHODS)
def test_members_that_treat_a_tied_head_differently_are_both_honoured(method: FoldMethod) -> None:
    apart = make_rich_module(MODEL, "x", seed=5, ties_head=False)
    merged = merge_modules([RICH[0], apart], name="m", shapes=SHAPES, method=method)
    merged.check(SHAPES)
    assert not merged.ties_head
    assert SHAPES.tied is not None
    embedding, head = SHAPES.tied
    one, other = RICH[0].resolved(SHAPES)[head], apart.deltas[head]
    alone = merge_modules(
        [Module("a", {head: one}), Module("b", {head: other})],
        name="m",
        shapes=SHAPES,
        method=method,
    )
    torch.testing.assert_close(weights(merged)[head], weights(alone)[head])
    assert not torch.allclose(weights(merged)[head], weights(merged)[embedding])


def test_a_tied_heads_delta_is_said_once() -> None:
    assert SHAPES.tied is not None
    embedding, head = SHAPES.tied
    double = replace(RICH[0], deltas={**RICH[0].deltas, head: RICH[0].deltas[embedding]})
    assert without_double_head(double, SHAPES).deltas.keys() == RICH[0].deltas.keys()
    apart = make_rich_module(MODEL, "x", ties_head=False)
    assert without_double_head(apart, SHAPES) is apart


def test_modules_that_cancel_are_refused() -> None:
    one = make_module(MODEL, "a")
    minus = replace(one, name="b", deltas={n: d.scaled(-1) for n, d in one.deltas.items()})
    with pytest.raises(BankError, match="a, b cancel each other out"):
        merge_modules([one, minus], name="m", shapes=SHAPES, method="svd")


def stored_bytes(module: Module, ranks: Mapping[str, int], dtype: str) -> int:
    vectors = sum(4 * vector.numel() for vector in module.vectors.values())
    shapes = {layer: delta.shape for layer, delta in module.deltas.items()}
    return vectors + sum(component_bytes(shapes[n], dtype) * rank for n, rank in ranks.items())


POOL = [make_module(MODEL, "a", rank=3), make_module(MODEL, "b", rank=8, seed=1), RICH[2]]
DTYPES = ["float32", "int8", "bfloat16"]
WHOLE = sum(
    stored_bytes(module, {n: d.rank for n, d in module.deltas.items()}, dtype)
    for module, dtype in zip(POOL, DTYPES, strict=True)
)


@settings(deadline=None, max_examples=25)
@given(st.integers(20_000, WHOLE - 1))
def test_a_budget_is_kept_and_used_up_to_one_component(budget: int) -> None:
    ranks = ranks_within(POOL, DTYPES, budget)
    taken = sum(
        stored_bytes(module, own, dtype)
        for module, own, dtype in zip(POOL, ranks, DTYPES, strict=True)
    )
    dearest = max(
        component_bytes(delta.shape, dtype)
        for module, dtype in zip(POOL, DTYPES, strict=True)
        for delta in module.deltas.values()
    )
    assert budget - dearest < taken <= budget
    assert taken >= 0.9 * budget
    pairs = zip(POOL, ranks, strict=True)
    cut = {r for module, own in pairs for n, r in own.items() if r < module.deltas[n].rank}
    assert all(own.keys() == module.deltas.keys() for module, own in zip(POOL, ranks, strict=True))
    assert max(cut) - min(cut) <= 1


def test_layers_that_change_nothing_take_no_bytes() -> None:
    module = make_module(MODEL, "a")
    layer = next(iter(module.deltas))
    empty = replace(module, deltas={**module.deltas, layer: module.deltas[layer].scaled(0)})
    (ranks,) = ranks_within([empty], ["float32"], 12_000)
    assert layer not in ranks
    assert layer not in shrink_module(empty, ranks, "svd").deltas


def test_budgets_out_of_range_are_refused() -> None:
    with pytest.raises(BankError, match="1,000 bytes are too little for 3 modules: rank 1 takes"):
        ranks_within(POOL, DTYPES, 1000)
    with pytest.raises(BankError, match=f"take {WHOLE:,} bytes and fit {WHOLE:,} as they are"):
        ranks_within(POOL, DTYPES, WHOLE)


def test_shrinking_by_svd_keeps_the_largest_components() -> None:
    module = make_module(MODEL, "a", rank=6)
    small = weights(shrink_module(module, dict.fromkeys(module.deltas, 2), "svd"))
    for name, dense in weights(module).items():
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        torch.testing.assert_close(small[name], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_shrinking_loses_nothing_that_there_is_room_for(method: FoldMethod) -> None:
    ranks = {layer: delta.rank for layer, delta in RICH[0].deltas.items()}
    assert_same(shrink_module(RICH[0], ranks, method), RICH[0])
    one = shrink_module(RICH[0], dict.fromkeys(ranks, 1), method)
    assert one.rank == 1
    assert set(one.vectors) == set(RICH[0].vectors)


def test_the_relative_error_is_that_of_the_dense_changes() -> None:
    one, other = weights(RICH[0]), weights(RICH[1])
    expected = (flat(one, one) - flat(other, one)).norm() / flat(one, one).norm()
    assert relative_error(RICH[1], RICH[0], SHAPES) == pytest.approx(float(expected))
    nothing = Module("n", {n: LowRank(d.left * 0, d.right) for n, d in RICH[0].deltas.items()})
    assert relative_error(nothing, RICH[0], SHAPES) == pytest.approx(1.0)


def test_a_folded_module_stands_on_what_all_its_members_stand_on() -> None:
    stated = [("sha256:1", "sha256:2"), ("sha256:2", "sha256:3"), ("sha256:2",)]
    members = [replace(m, backbones=b) for m, b in zip(RICH, stated, strict=True)]
    for group, wanted in ((members, ("sha256:2",)), (members[:1], stated[0]), (RICH, ())):
        merged = merge_modules(group, name="m", shapes=SHAPES, method="svd")
        assert merged.backbones == wanted
    assert merge_modules([*members, RICH[0]], name="m", shapes=SHAPES, method="svd").backbones == ()
    ranks = dict.fromkeys(members[0].deltas, 1)
    assert shrink_module(members[0], ranks, "svd").backbones == stated[0]
