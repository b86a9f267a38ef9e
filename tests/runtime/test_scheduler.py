"""Order and slots: nobody starves, and a slot's content is not thrown away for little."""

from __future__ import annotations

from mergeroute.adapters.blend import Blend
from mergeroute.runtime.engine import Generation
from mergeroute.runtime.prefix_cache import PrefixCache
from mergeroute.runtime.sampling import SamplingState
from mergeroute.runtime.scheduler import Scheduler, Sequence
from mergeroute.runtime.types import SamplingParams

BLEND = Blend({"m": 1.0})


def sequence(length: int, blend: Blend = BLEND) -> Sequence:
    state = SamplingState(SamplingParams(), list(range(length)), length)
    return Sequence(Generation(), blend, state, limit=10, end_tokens=frozenset())


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
