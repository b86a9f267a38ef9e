"""Order and slots: nobody starves, and a slot's content is not thrown away for little."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import QueueFullError
from mergeroute.runtime.engine import Generation
from mergeroute.runtime.fair_queue import FairQueue
from mergeroute.runtime.prefix_cache import PrefixCache
from mergeroute.runtime.sampling import SamplingState
from mergeroute.runtime.scheduler import Scheduler, Sequence
from mergeroute.runtime.types import SamplingParams

BLEND = Blend({"m": 1.0})


def sequence(length: int, blend: Blend = BLEND, tenant: str | None = None) -> Sequence:
    state = SamplingState(SamplingParams(), list(range(length)), length)
    return Sequence(Generation(), blend, state, limit=10, end_tokens=frozenset(), tenant=tenant)


def running(*sequences: Sequence, budget: int) -> Scheduler:
    scheduler = Scheduler(slots=len(sequences), token_budget=budget, max_waiting=99)
    for one in sequences:
        scheduler.add(one)
    scheduler.admit(lambda *_: None)
    return scheduler


def test_prompts_go_in_order_of_arrival_whatever_their_blend() -> None:
    first, second, third = sequence(50, Blend()), sequence(50), sequence(50, Blend())
    chunks = running(first, second, third, budget=80).plan()
    assert [(c.sequence, c.count) for c in chunks] == [(first, 50), (second, 30)]


def test_decodes_come_first_those_that_blend_before_those_that_do_not() -> None:
    prompt, bare, blended = sequence(50), sequence(20, Blend()), sequence(20)
    scheduler = running(prompt, bare, blended, budget=10)
    bare.computed = blended.computed = 19
    chunks = scheduler.plan()
    assert [(c.sequence, c.count) for c in chunks] == [(blended, 1), (bare, 1), (prompt, 8)]


def test_a_short_common_beginning_does_not_throw_a_long_conversation_away() -> None:
    cache = PrefixCache(4)
    system = list(range(1000, 1020))
    conversations = [system + list(range(k * 100, k * 100 + 80)) for k in range(2)]
    for tokens in conversations:
        reuse = cache.claim(BLEND, tokens)
        cache.contents[reuse.slot].valid = len(tokens)
        cache.release(reuse.slot)
    for tokens in conversations:
        reuse = cache.claim(BLEND, [*tokens, 7])
        assert (reuse.length, reuse.source) == (100, reuse.slot)
        cache.contents[reuse.slot].valid = len(tokens) + 1
        cache.release(reuse.slot)


def test_a_slot_promises_nothing_before_its_prefix_is_copied() -> None:
    cache = PrefixCache(2)
    tokens = list(range(64))
    first = cache.claim(BLEND, tokens)
    cache.contents[first.slot].valid = 64
    second = cache.claim(BLEND, [*tokens, 1])
    assert (second.source, second.length) == (first.slot, 64)
    assert second.slot != first.slot
    assert cache.contents[second.slot].valid == 0


# Fair shares.

TENANTS = st.sampled_from("abc")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), TENANTS, st.just(0)),
        st.tuples(st.just("pop"), TENANTS, st.integers(0, 50)),
        st.tuples(st.just("remove"), TENANTS, st.integers(0, 5)),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_the_queue_loses_nothing_and_keeps_each_tenants_order(
    operations: list[tuple[str, str, int]],
) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    lanes: dict[str, list[tuple[str, int]]] = {tenant: [] for tenant in "abc"}
    for number, (name, tenant, amount) in enumerate(operations):
        if name == "add":
            queue.add(tenant, (tenant, number))
            lanes[tenant].append((tenant, number))
        elif name == "pop" and any(lanes.values()):
            owner, _ = item = queue.pop()
            assert lanes[owner].pop(0) == item
            queue.charge(owner, amount)
        elif name == "remove" and lanes[tenant]:
            item = lanes[tenant].pop(amount % len(lanes[tenant]))
            queue.remove(tenant, item)
        assert sorted(queue) == sorted(item for lane in lanes.values() for item in lane)
        assert {t: queue.waiting(t) for t in "abc"} == {t: len(own) for t, own in lanes.items()}


@given(
    st.lists(st.integers(1, 40), min_size=6, max_size=60),
    st.integers(0, 40),
    st.integers(0, 500),
)
def test_tenants_that_wait_get_the_same_service_within_one_request(
    costs: list[int], head_start: int, used_alone: int
) -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a", "alone")
    queue.charge(queue.pop(), 0)
    queue.charge("a", used_alone)  # while nobody else was there: it counts for nothing
    for tenant, count in (("a", 60), ("b", 60 + head_start)):
        for _ in range(count):
            queue.add(tenant, tenant)
    served: Counter[str] = Counter()
    for cost in costs:
        owner = queue.pop()
        queue.charge(owner, cost)
        served[owner] += cost
        assert abs(served["a"] - served["b"]) <= max(costs)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4))
def test_who_floods_does_not_starve_another(lengths: list[int], slots: int) -> None:
    scheduler = Scheduler(slots=slots, token_budget=512, max_waiting=999)
    for length in lengths:
        scheduler.add(sequence(length, tenant="flood"))
    scheduler.admit(lambda *_: None)
    assert len(scheduler.running) == min(slots, len(lengths))  # no slot is left empty
    other = sequence(5, tenant="other")
    scheduler.add(other)
    scheduler.remove(scheduler.running[0])
    scheduler.admit(lambda *_: None)
    if len(lengths) > slots:  # the flood waits: level with it, at most one goes first
        scheduler.remove(next(s for s in scheduler.running if s is not other or slots == 1))
        scheduler.admit(lambda *_: None)
    assert other not in list(scheduler.waiting)


def test_complaint_16_a_flood_leaves_places_and_turns_for_others() -> None:
    scheduler = Scheduler(slots=1, token_budget=64, max_waiting=8)
    for _ in range(4):
        scheduler.add(sequence(3, tenant="flood"))
    with pytest.raises(QueueFullError, match="4 requests of 'flood' wait"):
        scheduler.add(sequence(3, tenant="flood"))
    for _ in range(2):
        scheduler.add(sequence(3, tenant="other"))
    order = []
    while len(scheduler.waiting):
        scheduler.admit(lambda *_: None)
        order.append(scheduler.running[0].tenant)
        scheduler.remove(scheduler.running[0])
    assert order == ["flood", "other", "flood", "other", "flood", "flood"]


def test_nobody_in_particular_may_fill_the_queue() -> None:
    scheduler = Scheduler(slots=1, token_budget=64, max_waiting=3)
    for _ in range(3):
        scheduler.add(sequence(3))
    with pytest.raises(QueueFullError, match="3 requests wait, the limit is 3") as caught:
        scheduler.add(sequence(3, tenant="late"))
    assert caught.value.retry_s == 1  # nothing has ended yet: nothing is known


def test_the_time_to_try_again_follows_what_ended_of_late() -> None:
    now = [100.0]
    scheduler = Scheduler(slots=1, token_budget=64, max_waiting=30, clock=lambda: now[0])
    for _ in range(26):
        scheduler.add(sequence(3))
    for _ in range(4):  # half a second each
        scheduler.admit(lambda *_: None)
        now[0] += 0.5
        scheduler.remove(scheduler.running[0])
    assert scheduler.turnover_s == 11  # 22 wait
    now[0] += 1000
    assert scheduler.turnover_s == 60
    while len(scheduler.waiting):
        scheduler.admit(lambda *_: None)
        scheduler.remove(scheduler.running[0])
    assert scheduler.turnover_s == 1  # idle: what was is forgotten
