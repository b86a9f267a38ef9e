"""Breaker: a replica that fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_REST_S = 30.0


class Breaker:
    """Whether a replica is tried. After `most` failures in a row it rests for `rest_s` seconds,
    then one request tries it: if that fails too it rests twice as long, at most half a minute.

    Not safe for threads: its owner holds a lock. clock: seconds that never go back.
    """

    def __init__(
        self,
        *,
        most: int = 3,
        rest_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._rest_s = rest_s
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """It is a new process, or it answered."""
        self._failures = 0
        self._rests_until = 0.0
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """Whether it rests, or one request is trying it."""
        if self._failures < self._most:
            return False
        return self._is_tried or self._clock() < self._rests_until

    def begin(self) -> None:
        """A request is sent to it."""
        self._is_tried = self._failures >= self._most

    def succeed(self) -> None:
        """It answered, if only that the request is at fault."""
        self.reset()

    def leave(self) -> None:
        """The request was given up, or its answer has begun: nothing is known, but the trial is
        over.
        """
        self._is_tried = False

    def fail(self) -> None:
        """It did not answer, or with nonsense."""
        self._is_tried = False
        self._failures += 1
        if (over := self._failures - self._most) >= 0:
            rest_s = self._rest_s * 2.0 ** min(over, 16)
            self._rests_until = self._clock() + min(rest_s, _LONGEST_REST_S)
