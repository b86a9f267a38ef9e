"""Tickets: the claims of requests on modules, and which of them wait."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from .resident_set import Entry


@dataclass(eq=False)
class Ticket:
    """A request's claim on modules. cold: digests of those that it waits for to be read.

    is_granted: its modules are held, in memory or on their way there.
    """

    entries: tuple[Entry, ...]
    future: Future[None] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    is_granted: bool = False
    cold: tuple[str, ...] = ()


class Tickets:
    """The tickets that wait. Not thread-safe: whoever holds the lock of the residency changes them.

    waiting: for room, in order of arrival. granted: for files to be read.
    """

    def __init__(self) -> None:
        self.waiting: deque[Ticket] = deque()
        self.granted: list[Ticket] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.granted)

    @property
    def awaited(self) -> frozenset[str]:
        """Digests of all their modules."""
        tickets = [*self.waiting, *self.granted]
        return frozenset(entry.digest for ticket in tickets for entry in ticket.entries)

    def discard(self, ticket: Ticket) -> None:
        """It waits no more."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        if ticket in self.granted:
            self.granted.remove(ticket)

    def arrived(self, entry: Entry) -> None:
        """A module is in memory: those that had all others go on."""
        for ticket in [ticket for ticket in self.granted if entry in ticket.entries]:
            if all(other.state == "resident" for other in ticket.entries):
                self.granted.remove(ticket)
                ticket.future.set_result(None)

    def failed(self, entry: Entry, error: Exception) -> None:
        """A module could not be read: those that wait for that are told."""
        for ticket in [ticket for ticket in self.granted if entry in ticket.entries]:
            self.granted.remove(ticket)
            ticket.future.set_exception(error)

    def left(self, entry: Entry, error: Exception) -> None:
        """A module was unregistered: those that wait for room are told."""
        for ticket in [ticket for ticket in self.waiting if entry in ticket.entries]:
            self.waiting.remove(ticket)
            ticket.future.set_exception(error)

    def clear(self) -> list[Ticket]:
        """None waits any more; returns those that did."""
        tickets = [*self.waiting, *self.granted]
        self.waiting.clear()
        self.granted.clear()
        return tickets
