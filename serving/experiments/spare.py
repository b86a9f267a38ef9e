"""Capacity that nobody asks for: what shadows may take of engines, and when they give it up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...adapters.errors import MergerouteError
from ...runtime.engine import Engine
from ..hosted import HostedBank
from ..responses.progress import Progress

SPARE_SHARE = 0.25
"""Of an engine's slots: where more are taken by others, there is no capacity to spare."""

OWN_SHARE = 0.5
"""Of an engine's slots: most that shadows take."""


class BusyError(MergerouteError):
    """There is no capacity to spare."""


class Spare:
    """What of a server's engines is free, and what of it is taken here. hosted: what answers."""

    def __init__(self, hosted: Callable[[], Sequence[HostedBank]]) -> None:
        self._hosted = hosted
        self._taken: list[Progress] = []

    @contextmanager
    def taking(self, progress: Sequence[Progress]) -> Iterator[None]:
        """Know choices for ours for the length of a block."""
        self._taken += progress
        try:
            yield
        finally:
            ended = set(map(id, progress))
            self._taken = [each for each in self._taken if id(each) not in ended]

    def check(self, rows: int = 0) -> None:
        """See that nobody waits, that most slots are free of others, and that so many rows more
        are not too many of ours. Of every engine: they may share a device.

        Raises:
            BusyError: it is not so.
        """
        engines = {id(host.engine): host.engine for host in self._hosted()}
        if not all(self._is_spare(engine, rows) for engine in engines.values()):
            raise BusyError("others need the slots")

    def others(self, engine: Engine) -> int:
        """Choices of others, those that wait among them."""
        stats = engine.stats()
        return stats.running + stats.waiting - len(self._own(engine))

    def _is_spare(self, engine: Engine, rows: int) -> bool:
        stats, own = engine.stats(), self._own(engine)
        queued = sum(each.choice.generation.admitted_at is None for each in own)
        is_free = stats.waiting <= queued and self.others(engine) <= SPARE_SHARE * stats.slots
        return is_free and (not rows or len(own) + rows <= max(1, OWN_SHARE * stats.slots))

    def _own(self, engine: Engine) -> list[Progress]:
        own = [each for each in self._taken if each.choice.assignment.hosted.engine is engine]
        return [each for each in own if each.finish_reason is None]
