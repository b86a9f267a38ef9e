"""ResidentSet: which modules are in memory, by their last use, and which must make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..adapters.lora import Module
from .footprint import Footprint
from .residents import Space

Source = Callable[[], Module]
"""Reads a module's files again."""

State = Literal["resident", "cold", "loading", "failed"]


@dataclass(frozen=True)
class ResidentInfo:
    """What became of a registered module.

    bytes: that it takes in memory while it is there. hits: requests that asked for it.
    cold_loads: how often it was read because a request asked. last_used: Unix time in seconds, 0
    before the first. error: why it could not be read, where state is "failed".
    """

    is_resident: bool
    is_pinned: bool
    rank: int
    bytes: int
    hits: int
    cold_loads: int
    last_used: float
    state: State
    error: str | None = None


@dataclass(frozen=True)
class ResidencyStats:
    """The modules of an engine, now and since the start.

    bytes: that the resident ones take. budget: that they may take; None: any. evictions: to make
    room. cold_loads: that requests asked for, cold_load_s: the time they took together.
    waiting: requests that wait for modules, awaited: digests of these.
    """

    registered: int
    resident: int
    bytes: int
    budget: int | None
    evictions: int = 0
    cold_loads: int = 0
    cold_load_s: float = 0.0
    waiting: int = 0
    awaited: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Registration:
    """One of a module's registrations. source: where to read it, and what the registration is
    undone by. is_pinned: as long as it lasts the module stays in memory.
    """

    source: Source
    is_pinned: bool = False


@dataclass(eq=False)
class Entry:
    """A registered module. registered: its registrations, the newest last. left: the source of the
    last one that went, for requests that were there before.

    holds: how many keep it from being evicted. failed_at: when it could not be read, on the
    monotonic clock.
    """

    name: str
    digest: str
    footprint: Footprint
    registered: tuple[Registration, ...] = ()
    left: Source | None = None
    state: State = "cold"
    holds: int = 0
    hits: int = 0
    cold_loads: int = 0
    last_used: float = 0.0
    error: str | None = None
    failed_at: float = 0.0

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where to read it, the newest last."""
        sources = tuple(one.source for one in self.registered)
        return sources or ((self.left,) if self.left else ())

    @property
    def is_pinned(self) -> bool:
        """Whether one of its registrations keeps it in memory."""
        return any(one.is_pinned for one in self.registered)


class ResidentSet:
    """The modules in memory or on their way there, the least recently used first, and those that
    are pinned, wherever they are.
    """

    def __init__(self, room: Space) -> None:
        self._room = room
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._pinned: dict[str, Entry] = {}

    def __contains__(self, entry: Entry) -> bool:
        return entry.digest in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def add(self, entry: Entry) -> None:
        """It takes memory now, and was used last."""
        self._entries[entry.digest] = entry
        self._entries.move_to_end(entry.digest)

    def discard(self, entry: Entry) -> bool:
        """It takes no memory any more; returns whether it did."""
        return self._entries.pop(entry.digest, None) is not None

    def pin(self, entry: Entry) -> None:
        """It is never chosen to make room."""
        self._pinned[entry.digest] = entry

    def forget(self, entry: Entry) -> None:
        """It is pinned no more."""
        self._pinned.pop(entry.digest, None)

    def info(self, entry: Entry) -> ResidentInfo:
        """What became of it."""
        return ResidentInfo(
            is_resident=entry.state == "resident",
            is_pinned=entry.is_pinned,
            rank=entry.footprint.rank,
            bytes=self._room.needed([entry.footprint]),
            hits=entry.hits,
            cold_loads=entry.cold_loads,
            last_used=entry.last_used,
            state=entry.state,
            error=entry.error,
        )

    @property
    def bytes(self) -> int:
        """That they take."""
        return self._room.needed(entry.footprint for entry in self)

    @property
    def budget(self) -> int | None:
        """Most bytes that they may take."""
        return self._room.budget

    def victims(
        self,
        wanted: Collection[Entry],
        is_victim: Callable[[Entry], bool],
    ) -> list[Entry] | None:
        """The least recently used that must go for all that is wanted to be in memory; None: that
        is not enough. None of them is wanted or pinned.
        """
        kept = {**self._entries, **{entry.digest: entry for entry in wanted}}
        victims: list[Entry] = []
        candidates = iter(list(self._entries.values()))
        while not self._fits(kept.values()):
            entry = next(candidates, None)
            if entry is None:
                return None
            if not entry.is_pinned and entry not in wanted and is_victim(entry):
                victims.append(kept.pop(entry.digest))
        return victims

    def can_hold(self, entries: Iterable[Entry]) -> bool:
        """Whether entries can be in memory together, beside what is pinned."""
        return self._fits({**self._pinned, **{entry.digest: entry for entry in entries}}.values())

    def too_large(self, entries: Sequence[Entry]) -> str:
        """Why they cannot, in words."""
        own = self._room.needed([entry.footprint for entry in entries])
        rest = [entry.footprint for entry in self._pinned.values() if entry not in entries]
        beside = f", those that are pinned {self._room.needed(rest):,}" if rest else ""
        return (
            f"takes {own:,} bytes of memory{beside}; the budget is {self._room.budget or 0:,} "
            f"bytes ({self._room.setting})"
        )

    def _fits(self, entries: Iterable[Entry]) -> bool:
        return self._room.fits(entry.footprint for entry in entries)
