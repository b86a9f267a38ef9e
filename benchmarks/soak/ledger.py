"""What was asked, how it ended, and what went wrong."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Counts of a soak.

    requests: by kind. statuses: answers by status. answers: that were checked against the merged
    model, whole ones and the beginnings of those that were left. changes: of modules, by kind.
    seconds: of whole answers, by kind. first_s: to a stream's first text. violations: the first of
    each kind are described.
    """

    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_s: list[float] = field(default_factory=list)
    wrong: int = 0
    violations: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Reckon the length of a block to a kind."""
        began = time.monotonic()
        yield
        self.seconds[kind].append(time.monotonic() - began)

    def check(self, holds: bool, message: str) -> None:
        """Record a violation unless something holds."""
        if not holds:
            self.violations.append(message)

    def check_answer(self, kind: str, said: object, allowed: Sequence[object], about: str) -> None:
        """Record an answer, which is to be one of those that are right. kind: whole or begun."""
        self.answers[kind] += 1
        if said not in allowed:
            self.wrong += 1
            self.violations.append(f"wrong answer to {about}: {said!r} instead of {allowed!r}")
