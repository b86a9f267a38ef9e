"""Residency: any number of modules registered with an engine, as many of them in memory as fit.

A request holds its modules from before it is submitted until the engine counts it among their
users. What is neither held nor used is idle, and of the idle ones the least recently used make room
when a cold module is asked for. Cold modules are read in threads of their own, in the order in
which requests ask for them; requests for modules in memory pass by.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from ..adapters.errors import (
    EngineStoppedError,
    MergerouteError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
)
from ..adapters.lora import Module
from .engine import Engine
from .registrations import Registrations, unknown
from .rereading import read_again, unreadable
from .resident_set import Entry, ResidencyStats, ResidentInfo, Source
from .residents import Prepared
from .tickets import Ticket, Tickets

logger = logging.getLogger(__name__)

_READERS = 2
_PATIENCE_S = 1.0
_RETRY_S = 5.0


class Residency:
    """The modules of one engine. Any thread may call anything.

    Without a budget (`EngineOptions.module_bytes`) everything that is registered is resident.

    patience_s: how long a request waits for idle modules; then the least recently used of the busy
    ones take no new requests until they have made room.
    retry_s: how long a module that could not be read is not tried again.
    """

    def __init__(
        self, engine: Engine, *, patience_s: float = _PATIENCE_S, retry_s: float = _RETRY_S
    ) -> None:
        self.engine = engine
        self._registered = Registrations(engine.modules)
        self._tickets = Tickets()
        self._patience_s = patience_s
        self._retry_s = retry_s
        self._max_waiting = engine.options.max_waiting
        self._lock = threading.RLock()
        self._draining: frozenset[Entry] = frozenset()
        self._is_stopped = False
        self._cold_loads = 0
        self._cold_load_s = 0.0
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="mergeroute-modules")
        engine.modules.on_idle = self._on_idle

    def register(
        self, module: Module, source: Source, *, is_pinned: bool = False, is_wanted: bool = True
    ) -> str:
        """Make a module known; returns its digest. Registrations are counted.

        source: reads it again, and is what this registration is undone by. is_pinned: the module
        stays in memory for as long as this registration lasts.
        is_wanted: it goes into memory now if there is room.

        Raises:
            ModuleError: it does not fit the backbone, or not the memory.
        """
        prepared: Prepared = self.engine.modules.prepare(module)
        with self._lock:
            entry = self._registered.register(prepared, source, is_pinned)
            if is_pinned:
                self._refuse_impossible()
            is_new = (is_pinned or is_wanted) and entry not in self._registered.resident
            is_placed = is_new and self._registered.place([entry], evicts=is_pinned)
            if is_placed:
                entry.state = "loading"
        if is_placed:
            try:
                self._put(entry, prepared)
            except BaseException as error:
                self._failed(entry, error)
                self.unregister(entry.digest, source)
                raise
        return prepared.digest

    def unregister(self, digest: str, source: Source) -> None:
        """Undo the registration with this very source; requests that hold the module or run on it
        keep it.

        Raises:
            UnknownModuleError: it is not registered, or not with this source.
        """
        with self._lock:
            entry = self._registered.known(digest)
            if self._registered.unregister(entry, source):
                self._tickets.left(entry, unknown(digest))
            freed = self._pump()
        for done in freed:
            done.result()

    def info(self, digest: str) -> ResidentInfo:
        """What became of a registered module.

        Raises:
            UnknownModuleError: it is not registered.
        """
        with self._lock:
            return self._registered.resident.info(self._registered.known(digest))

    def stats(self) -> ResidencyStats:
        """All modules together, and who waits for some."""
        with self._lock:
            resident = self._registered.resident
            return ResidencyStats(
                registered=len(self._registered),
                resident=sum(entry.state == "resident" for entry in resident),
                bytes=resident.bytes,
                budget=resident.budget,
                evictions=self._registered.evictions,
                cold_loads=self._cold_loads,
                cold_load_s=self._cold_load_s,
                waiting=len(self._tickets),
                awaited=self._tickets.awaited,
            )

    @asynccontextmanager
    async def hold(self, digests: Collection[str]) -> AsyncIterator[tuple[str, ...]]:
        """Keep modules in memory for the length of a block, which begins once they are there. The
        block gets the digests of those that had to be waited for.

        Raises:
            RequestError: they can never be in memory together.
            UnknownModuleError: one is not registered, or was taken away meanwhile.
            ModuleUnavailableError: one cannot be read any more.
            QueueFullError: too many requests wait for modules.
            EngineStoppedError: the engine was stopped.
        """
        ticket = self._ask(digests)
        try:
            if not ticket.future.done():
                await asyncio.shield(asyncio.wrap_future(ticket.future))
            ticket.future.result()
            yield ticket.cold
        finally:
            self._give_back(ticket)

    @contextmanager
    def hold_now(self, digests: Collection[str]) -> Iterator[None]:
        """As `hold`, and blocks the thread."""
        ticket = self._ask(digests)
        try:
            ticket.future.result()
            yield
        finally:
            self._give_back(ticket)

    @contextmanager
    def hold_resident(self, digests: Collection[str]) -> Iterator[bool]:
        """Keep modules where they are; the block gets whether all are in memory. Counts nothing."""
        with self._lock:
            entries = [self._registered.known(digest) for digest in digests]
            is_there = all(entry.state == "resident" for entry in entries)
            for entry in entries:
                entry.holds += 1
        try:
            yield is_there
        finally:
            with self._lock:
                for entry in entries:
                    entry.holds -= 1
                self._pump()

    def stop(self) -> None:
        """Stop the engine; who waits for a module is told so."""
        with self._lock:
            self._is_stopped = True
            waiting = self._tickets.clear()
        for ticket in waiting:
            ticket.future.set_exception(_stopped())
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()

    def _ask(self, digests: Collection[str]) -> Ticket:
        with self._lock:
            if self._is_stopped:
                raise _stopped()
            ticket = Ticket(tuple(map(self._registered.known, dict.fromkeys(digests))))
            self._registered.check_possible(ticket.entries)
            self._check_readable(ticket.entries)
            for entry in ticket.entries:
                entry.hits += 1
                entry.last_used = time.time()
            if self._is_ready(ticket):
                self._grant(ticket)
                return ticket
            if (waiting := len(self._tickets.waiting)) >= self._max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait for modules to be read, the limit is "
                    f"{self._max_waiting} (max_waiting): try again later"
                )
            self._tickets.waiting.append(ticket)
            self._pump()
            return ticket

    def _give_back(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.discard(ticket)
            if ticket.is_granted:
                for entry in ticket.entries:
                    entry.holds -= 1
            self._pump()

    def _on_idle(self) -> None:
        """A request has ended; on the engine's thread."""
        if self._tickets.waiting or self._registered.is_leaving:
            with self._lock:
                self._pump()

    # What follows is called with the lock held, but for `_read_in` and `_put`.

    def _check_readable(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.state == "failed" and time.monotonic() - entry.failed_at < self._retry_s:
                raise ModuleUnavailableError(unreadable(entry))

    def _refuse_impossible(self) -> None:
        """What is pinned since they came may leave waiting requests no room for ever."""
        for ticket in list(self._tickets.waiting):
            try:
                self._registered.check_possible(ticket.entries)
            except RequestError as error:
                self._tickets.waiting.remove(ticket)
                ticket.future.set_exception(error)

    def _is_ready(self, ticket: Ticket) -> bool:
        """Whether all its modules are in memory or on their way there, and take requests."""
        resident = self._registered.resident
        return all(entry in resident and entry not in self._draining for entry in ticket.entries)

    def _pump(self) -> list[Future[None]]:
        """Give every waiting request what it can have now, in order of arrival: those behind one
        that waits for room get only what is in memory. Returns what is waited for to be freed.
        """
        waiting = self._tickets.waiting
        try:
            freed = self._registered.free_left()
            self._draining = frozenset()
            blocked: Ticket | None = None
            for ticket in list(waiting):
                if self._is_ready(ticket) or (
                    blocked is None and self._registered.place(ticket.entries)
                ):
                    waiting.remove(ticket)
                    self._grant(ticket)
                elif blocked is None:
                    blocked = ticket
                    self._draining = self._drained_for(ticket)
            return freed
        except EngineStoppedError as error:
            while waiting:
                waiting.popleft().future.set_exception(error)
            return []

    def _grant(self, ticket: Ticket) -> None:
        ticket.is_granted = True
        ticket.cold = tuple(e.digest for e in ticket.entries if e.state != "resident")
        for entry in ticket.entries:
            entry.holds += 1
            self._registered.resident.add(entry)
            if entry.state == "cold":
                entry.state = "loading"
                entry.cold_loads += 1
                self._readers.submit(self._read_in, entry)
        if ticket.cold:
            self._tickets.granted.append(ticket)
        else:
            ticket.future.set_result(None)

    def _drained_for(self, ticket: Ticket) -> frozenset[Entry]:
        """The modules that take no new requests, for the sake of one that waited too long."""
        if time.monotonic() - ticket.arrived < self._patience_s:
            return frozenset()
        return frozenset(self._registered.resident.victims(ticket.entries, lambda _: True) or ())

    def _read_in(self, entry: Entry) -> None:
        """Read a module's files and put it into memory; on a reader's thread."""
        began = time.monotonic()
        try:
            self._put(entry, self.engine.modules.prepare(read_again(entry)))
            with self._lock:
                self._cold_loads += 1
                self._cold_load_s += time.monotonic() - began
        except Exception as error:  # whatever it is, requests wait to be told
            if not isinstance(error, MergerouteError):
                logger.exception("module %r could not be read", entry.name)
            self._failed(entry, error)

    def _put(self, entry: Entry, prepared: Prepared) -> None:
        self.engine.modules.put(prepared)
        with self._lock:
            entry.state = "resident"
            self._tickets.arrived(entry)
            self._pump()

    def _failed(self, entry: Entry, error: BaseException) -> None:
        logger.error("%s: %s", unreadable(entry), error)
        told = _stopped() if self._is_stopped else ModuleUnavailableError(unreadable(entry))
        with self._lock:
            entry.state, entry.error, entry.failed_at = "failed", str(error), time.monotonic()
            self._registered.resident.discard(entry)
            self._tickets.failed(entry, told)
            self._pump()


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine is shutting down: try another replica")
