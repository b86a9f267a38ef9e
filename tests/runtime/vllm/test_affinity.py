"""Affinity: the same blend and beginning go to the same replica, as long as that has room."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mergeroute.runtime.vllm.affinity import Affinity, preferred

NAMES = ("a", "b", "c", "d")
IDLE = dict.fromkeys(NAMES, 0)


def test_a_key_is_of_the_model_and_the_beginning() -> None:
    system = tuple(range(200))
    assert Affinity.of("m", (*system, 1)) == Affinity.of("m", (*system, 2, 3))
    assert Affinity.of("m", system) != Affinity.of("n", system)
    assert Affinity.of("m", (1, 2)) != Affinity.of("m", (1, 3))


@given(st.binary(max_size=8))
def test_a_replica_that_goes_moves_its_own_keys_alone(key: bytes) -> None:
    first, *rest = preferred(Affinity(key), IDLE)
    assert preferred(Affinity(key), dict.fromkeys(rest, 0)) == rest
    assert sorted([first, *rest]) == list(NAMES)


def test_keys_spread() -> None:
    counts = Counter(preferred(Affinity(str(number).encode()), IDLE)[0] for number in range(1000))
    assert min(counts.values()) > 180


@given(st.binary(max_size=8), st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_nothing_goes_to_one_that_is_busier_than_its_share(key: bytes, loads: list[int]) -> None:
    in_flight = dict(zip(NAMES, loads, strict=True))
    first = preferred(Affinity(key), in_flight)[0]
    assert in_flight[first] <= 1.25 * (sum(loads) + 1) / 4 + 1


def test_one_popular_key_fills_replicas_in_turn() -> None:
    in_flight = dict(IDLE)
    for _ in range(40):
        in_flight[preferred(Affinity(b"popular"), in_flight)[0]] += 1
    assert max(in_flight.values()) <= 13
    assert sum(in_flight.values()) == 40


def test_a_short_prompt_goes_to_the_least_busy() -> None:
    short = Affinity.of("m", (1, 2, 3))
    assert not short.is_strong
    assert Affinity.of("m", tuple(range(64))).is_strong
    assert preferred(short, {"a": 2, "b": 0, "c": 1}) == ["b", "c", "a"]
    firsts = {preferred(Affinity.of("m", (number,)), IDLE)[0] for number in range(50)}
    assert firsts == set(NAMES)
