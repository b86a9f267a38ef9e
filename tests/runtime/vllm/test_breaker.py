"""Breaker: when a replica is left alone, and when it is tried again."""

from __future__ import annotations

from mergeroute.runtime.vllm.breaker import Breaker


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(most=3, rest_s=1, clock=clock)
    for _ in range(3):
        assert not breaker.is_open
        breaker.begin()
        breaker.fail()
    return breaker


def test_it_opens_after_failures_in_a_row_alone() -> None:
    breaker = broken(Clock())
    assert breaker.is_open
    breaker.succeed()
    assert not breaker.is_open
    for _ in range(5):
        breaker.fail()
        breaker.fail()
        breaker.succeed()
    assert not breaker.is_open


def test_one_request_tries_it_and_a_failure_doubles_the_rest() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now += 1
    assert not breaker.is_open
    breaker.begin()
    assert breaker.is_open  # the others wait for what becomes of it
    breaker.fail()
    clock.now += 1.5
    assert breaker.is_open
    clock.now += 0.6
    assert not breaker.is_open
    breaker.begin()
    breaker.leave()  # given up by the client
    assert not breaker.is_open
    breaker.begin()
    breaker.succeed()
    assert not breaker.is_open


def test_an_answer_that_has_begun_lets_others_try_and_its_end_tells() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now += 1
    breaker.begin()
    breaker.leave()  # its first chunk is here
    assert not breaker.is_open
    breaker.fail()
    clock.now += 1.5
    assert breaker.is_open  # for twice as long
    clock.now += 0.6
    breaker.begin()
    breaker.leave()
    breaker.succeed()
    breaker.fail()
    assert not breaker.is_open


def test_no_rest_is_longer_than_half_a_minute() -> None:
    clock = Clock()
    breaker = broken(clock)
    for _ in range(1000):
        breaker.fail()
    clock.now += 30.1
    assert not breaker.is_open
