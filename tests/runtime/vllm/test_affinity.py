"""Affinity: the same blend and beginning go to the same replica, as long as that has room."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mergeroute.runtime.vllm.affinity import affinity_key, preferred

NAMES = ("a", "b", "c", "d")
IDLE = dict.fromkeys(NAMES, 0)


def test_a_key_is_of_the_model_and_the_beginning() -> None:
    system = tuple(range(200))
    assert affinity_key("m", (*system, 1)) == affinity_key("m", (*system, 2, 3))
    assert affinity_key("m", system) != affinity_key("n", system)
    assert affinity_key("m", (1, 2)) != affinity_key("m", (1, 3))


@given(st.binary(max_size=8))
def test_a_replica_that_goes_moves_its_own_keys_alone(key: bytes) -> None:
    first, *rest = preferred(key, IDLE)
    assert preferred(key, dict.fromkeys(rest, 0)) == rest
    assert sorted([first, *rest]) == list(NAMES)


def test_keys_spread() -> None:
    counts = Counter(preferred(str(number).encode(), IDLE)[0] for number in range(1000))
    assert min(counts.values()) > 180


@given(st.binary(max_size=8), st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_nothing_goes_to_one_that_is_busier_than_its_share(key: bytes, loads: list[int]) -> None:
    in_flight = dict(zip(NAMES, loads, strict=True))
    first = preferred(key, in_flight)[0]
    assert in_flight[first] <= 1.25 * (sum(loads) + 1) / 4 + 1


def test_one_popular_key_fills_replicas_in_turn() -> None:
    in_flight = dict(IDLE)
    for _ in range(40):
        in_flight[preferred(b"popular", in_flight)[0]] += 1
    assert max(in_flight.values()) <= 13
    assert sum(in_flight.values()) == 40
