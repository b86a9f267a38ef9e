"""ModuleStack under a budget: what fits is what was reckoned, and what moves stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.adapters.errors import EngineError
from mergeroute.adapters.lora import Module
from mergeroute.runtime.footprint import Demand, Footprint, Room
from mergeroute.runtime.module_stack import ModuleStack
from mergeroute.runtime.prepared import PreparedModule

from ..tiny import make_model, make_module, make_rich_module

PLAIN = make_model()


def partial(name: str, *, rank: int, part: str) -> Module:
    """A module over the layers alone whose name has a part."""
    whole = make_module(PLAIN, name, rank=rank, seed=rank)
    return Module(name, {n: delta for n, delta in whole.deltas.items() if part in n})


MODULES = [
    *(make_module(PLAIN, f"m{rank}", rank=rank, seed=rank) for rank in (1, 2, 3, 5, 8)),
    *(make_rich_module(PLAIN, f"rich{rank}", rank=rank, seed=rank) for rank in (2, 4)),
    partial("attention", rank=6, part="q_proj"),
    partial("mlp", rank=7, part="down_proj"),
    Module("norm", {}, {"model.layers.1.input_layernorm.weight": torch.ones(32)}),
]
UNLIMITED = ModuleStack(copy.deepcopy(PLAIN))
PREPARED = [UNLIMITED.prepare(module) for module in MODULES]


def assert_holds(stack: ModuleStack, modules: Sequence[PreparedModule]) -> None:
    for module in modules:
        found = stack.resident(module.digest).deltas
        for layer, delta in found.items():
            a, b = module.factors[layer]
            assert torch.equal(delta.right[: a.shape[0]], a)
            assert torch.equal(delta.left.T[: b.shape[0]], b)
            assert not delta.right[a.shape[0] :].any()
        slot = stack._slots.by_digest.get(module.digest)
        for name, vector in module.vectors.items():
            owner, _, leaf = name.rpartition(".")
            rows = stack._slots.layers[owner].tensors[leaf == "bias"]
            assert slot is not None
            assert torch.equal(rows[slot], vector)


@settings(max_examples=30, deadline=None)
@given(
    budget=st.integers(1, 1_500_000),
    picks=st.lists(st.integers(0, len(MODULES) - 1), min_size=1, max_size=25),
)
def test_whatever_fits_by_the_reckoning_goes_in_and_memory_keeps_to_the_budget(
    budget: int, picks: list[int]
) -> None:
    """Each pick puts a module in, or takes it out where it is in."""
    stack = ModuleStack(copy.deepcopy(PLAIN), budget)
    inside: dict[int, PreparedModule] = {}
    for pick in picks:
        if pick in inside:
            stack.remove(inside.pop(pick).digest)
        else:
            wanted = [*inside.values(), PREPARED[pick]]
            if stack.room.fits(module.footprint for module in wanted):
                stack.add(PREPARED[pick])
                inside[pick] = PREPARED[pick]
            else:
                with pytest.raises(EngineError, match="the budget is"):
                    stack.add(PREPARED[pick])
        assert stack.nbytes <= budget
        assert len(stack) == len(inside)
        assert_holds(stack, list(inside.values()))


def test_a_module_takes_what_was_reckoned() -> None:
    for module in PREPARED:
        needed = UNLIMITED.room.needed([module.footprint])
        stack = ModuleStack(copy.deepcopy(PLAIN))
        stack.add(module)
        assert stack.nbytes == needed
        stack.remove(module.digest)
        assert stack.nbytes == 0


def test_holes_that_are_too_small_are_joined() -> None:
    five, two, three, eight = (PREPARED[k] for k in (3, 1, 2, 4))
    room = UNLIMITED.room.needed([Footprint(10, five.footprint.layers)])
    stack = ModuleStack(copy.deepcopy(PLAIN), room)
    for module in (two, five, three):
        stack.add(module)
    layout = stack.layout
    stack.remove(two.digest)
    stack.remove(three.digest)
    other = UNLIMITED.prepare(make_module(PLAIN, "m", rank=5, seed=99))
    stack.add(other)
    assert stack.layout == layout + 1
    assert_holds(stack, [five, other])
    with pytest.raises(EngineError):
        stack.add(eight)


def test_memory_is_not_shared_out_anew_for_modules_of_the_same_layers() -> None:
    one = PREPARED[3].footprint
    stack = ModuleStack(copy.deepcopy(PLAIN), 4 * UNLIMITED.room.needed([one]))
    stack.add(PREPARED[3])
    places = [buffer.data_ptr() for buffer in stack._model.buffers()]
    for seed in range(20):
        module = stack.prepare(make_module(PLAIN, "m", rank=5, seed=200 + seed))
        stack.add(module)
        stack.remove(module.digest)
    assert [buffer.data_ptr() for buffer in stack._model.buffers()] == places


def test_demand_is_the_sum_over_all_layers_of_any() -> None:
    room = Room({"a": 10, "b": 100}, {"n": 7}, budget=1_000)
    one, two = Footprint(2, frozenset("a")), Footprint(3, frozenset("b"), frozenset("n"))
    assert room.needed([one]) == 20
    assert room.needed([one, two]) == 5 * 110 + 7
    assert room.allot(Demand.of([one, two])) == (8, 2)
    assert room.fits([one, two, two])
    assert not room.fits([one, two, two, two])
