"""When modules are moved to neighbouring slots, and to which."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergeroute.runtime.vllm.neighbours import Steadiness, swaps


@given(st.sets(st.integers(0, 11)))
def test_after_the_swaps_they_are_neighbours(slots: set[int]) -> None:
    order = list(range(12))
    pairs = swaps(slots)
    assert len({slot for pair in pairs for slot in pair}) == 2 * len(pairs)
    for one, other in pairs:
        order[one], order[other] = order[other], order[one]
    assert sorted(order) == list(range(12))
    places = [order.index(slot) for slot in slots]
    assert not places or max(places) - min(places) == len(places) - 1


def test_neighbours_stay_where_they_are() -> None:
    assert swaps([5, 3, 4]) == swaps([7]) == swaps([]) == []
    assert swaps([1, 5, 7]) == [(5, 0), (7, 2)]


def test_steady_is_told_once_until_something_else_was_used() -> None:
    watch, pair, one = Steadiness(), frozenset("ab"), frozenset("a")
    told = [watch.is_steady(used) for used in [one] * 3 + [pair] * 20 + [one] * 2 + [pair] * 8]
    assert [step for step, is_told in enumerate(told) if is_told] == [10, 32]
