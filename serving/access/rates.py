"""Rates: how much each key has used in the last minute, in this process's memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .keys import Key

WINDOW_S = 60


@dataclass(frozen=True)
class Allowance:
    """What a key may still use of something.

    limit: in a minute. reset_s: until all of it is free again. retry_s: until some is; 0: it is.
    """

    limit: int
    remaining: int
    reset_s: int
    retry_s: int


class Window:
    """A moving window of a minute, in buckets of a second that count until the last that came into
    them is out of it: never more in any minute than was let in, freed at most a second late, and
    never later than a minute from now.

    Its clock never goes back, unlike that of the `limits` library (5.8, memory storage: time.time):
    a jump of the wall clock neither locks a key out nor lets it through.
    """

    def __init__(self) -> None:
        self._used: dict[int, tuple[int, float]] = {}  # amount and last time, the oldest first

    def add(self, amount: int, now: float) -> None:
        """Count what was used."""
        second = math.floor(now)
        before, _ = self._used.get(second, (0, now))
        self._used[second] = (before + amount, now)

    def look(self, limit: int, now: float) -> Allowance:
        """What is left of a limit."""
        self._used = {s: used for s, used in self._used.items() if now - used[1] < WINDOW_S}
        left = retry = reset = 0
        for amount, moment in reversed(self._used.values()):
            wait = math.ceil(WINDOW_S - (now - moment))
            left, reset = left + amount, max(reset, wait)
            if left >= limit and not retry:
                retry = wait
        return Allowance(limit, max(0, limit - left), reset, retry)


@dataclass
class Account:
    """What one key has used. Of one thread: the event loop's."""

    clock: Callable[[], float]
    key: Key
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)

    def allowances(self) -> dict[str, Allowance]:
        """What the key may still use, of that which is limited."""
        now, said = self.clock(), self.key
        limited = {
            "requests": (self.requests, said.requests_per_minute),
            "tokens": (self.tokens, said.tokens_per_minute),
        }
        return {name: w.look(limit, now) for name, (w, limit) in limited.items() if limit}

    def count_request(self) -> None:
        """A request was let in."""
        if self.key.requests_per_minute:
            self.requests.add(1, self.clock())

    def charge(self, tokens: int) -> None:
        """A request has used tokens: those of its prompts, and those it was answered with."""
        if self.key.tokens_per_minute:
            self.tokens.add(tokens, self.clock())


class Accounts:
    """An account per name of a key, which a change of the key's limits leaves as it is."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_name: dict[str, Account] = {}

    def of(self, key: Key) -> Account:
        """The account of a key, held to the limits that it states now."""
        account = self._by_name.setdefault(key.name, Account(self._clock, key))
        account.key = key
        return account


def headers(allowances: dict[str, Allowance]) -> Iterator[tuple[str, str]]:
    """OpenAI's headers."""
    for name, allowance in allowances.items():
        yield f"x-ratelimit-limit-{name}", str(allowance.limit)
        yield f"x-ratelimit-remaining-{name}", str(allowance.remaining)
        yield f"x-ratelimit-reset-{name}", f"{allowance.reset_s}s"
