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
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from ..adapters.digest import short
from ..adapters.errors import (
    EngineStoppedError,
    MergerouteError,
    ModuleError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
    UnknownModuleError,
)
from ..adapters.lora import Module
from .module_stack import PreparedModule
from .resident_set import Entry, ResidencyStats, ResidentInfo, ResidentSet, Source
from .torch_engine import TorchEngine

logger = logging.getLogger(__name__)

_READERS = 2
_PATIENCE_S = 1.0
_RETRY_S = 5.0


@dataclass(eq=False)
class _Ticket:
    """A request's claim on modules. cold: digests of those that it waits for to be read.

    is_granted: its modules are held, in memory or on their way there.
    """

    entries: tuple[Entry, ...]
    future: Future[None] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    is_granted: bool = False
    cold: tuple[str, ...] = ()


class Residency:
    """The modules of one engine. Any thread may call anything.

    Without a budget (`EngineOptions.module_bytes`) everything that is registered is resident.

    patience_s: how long a request waits for idle modules; then the least recently used of the busy
    ones take no new requests until they have made room.
    retry_s: how long a module that could not be read is not tried again.
    """

    def __init__(
        self, engine: TorchEngine, *, patience_s: float = _PATIENCE_S, retry_s: float = _RETRY_S
    ) -> None:
        self.engine = engine
        self._resident = ResidentSet(engine.room)
        self._patience_s = patience_s
        self._retry_s = retry_s
        self._max_waiting = engine.options.max_waiting
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._waiting: deque[_Ticket] = deque()
        self._granted: list[_Ticket] = []  # that wait for files to be read
        self._draining: frozenset[Entry] = frozenset()
        self._leaving: list[Entry] = []
        self._is_stopped = False
        self._evictions = self._cold_loads = 0
        self._cold_load_s = 0.0
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="mergeroute-modules")
        engine.on_idle = self._on_idle

    def register(
        self, module: Module, source: Source, *, is_pinned: bool = False, is_wanted: bool = True
    ) -> str:
        """Make a module known; returns its digest. Registrations are counted.

        source: reads it again. is_pinned: it stays in memory for as long as it is registered.
        is_wanted: it goes into memory now if there is room.

        Raises:
            ModuleError: it does not fit the backbone, or not the memory.
        """
        prepared = self.engine.prepare_module(module)
        with self._lock:
            entry = self._registered(prepared, source, is_pinned)
            is_new = (is_pinned or is_wanted) and entry not in self._resident
            is_placed = is_new and self._place([entry], evicts=is_pinned)
            if is_placed:
                entry.state = "loading"
        if is_placed:
            try:
                self._put(entry, prepared)
            except BaseException as error:
                self._failed(entry, error)
                self.unregister(entry.digest)
                raise
        return prepared.digest

    def unregister(self, digest: str) -> None:
        """Undo one registration; requests that hold the module or run on it keep it.

        Raises:
            UnknownModuleError: it is not registered.
        """
        with self._lock:
            entry = self._known(digest)
            entry.registrations -= 1
            if entry.registrations:
                return
            self._leaving.append(entry)
            for ticket in [ticket for ticket in self._waiting if entry in ticket.entries]:
                self._waiting.remove(ticket)
                ticket.future.set_exception(_unknown(digest))
            freed = self._pump()
        for done in freed:
            done.result()

    def info(self, digest: str) -> ResidentInfo:
        """What became of a registered module.

        Raises:
            UnknownModuleError: it is not registered.
        """
        with self._lock:
            return self._resident.info(self._known(digest))

    def stats(self) -> ResidencyStats:
        """All modules together, and who waits for some."""
        with self._lock:
            tickets = [*self._waiting, *self._granted]
            return ResidencyStats(
                registered=len(self._entries),
                resident=sum(entry.state == "resident" for entry in self._resident),
                bytes=self._resident.bytes,
                budget=self._resident.budget,
                evictions=self._evictions,
                cold_loads=self._cold_loads,
                cold_load_s=self._cold_load_s,
                waiting=len(tickets),
                awaited=frozenset(entry.digest for t in tickets for entry in t.entries),
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
            entries = [self._known(digest) for digest in digests]
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
            waiting = [*self._waiting, *self._granted]
            self._waiting.clear()
            self._granted.clear()
        for ticket in waiting:
            ticket.future.set_exception(_stopped())
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()

    def _ask(self, digests: Collection[str]) -> _Ticket:
        with self._lock:
            if self._is_stopped:
                raise _stopped()
            ticket = _Ticket(tuple(self._known(digest) for digest in dict.fromkeys(digests)))
            self._check_possible(ticket.entries)
            self._check_readable(ticket.entries)
            for entry in ticket.entries:
                entry.hits += 1
                entry.last_used = time.time()
            if self._is_ready(ticket):
                self._grant(ticket)
                return ticket
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait for modules to be read, the limit is "
                    f"{self._max_waiting} (max_waiting): try again later"
                )
            self._waiting.append(ticket)
            self._pump()
            return ticket

    def _give_back(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if ticket in self._granted:
                self._granted.remove(ticket)
            if ticket.is_granted:
                for entry in ticket.entries:
                    entry.holds -= 1
            self._pump()

    def _on_idle(self) -> None:
        """A request has ended; on the engine's thread."""
        if self._waiting or self._leaving:
            with self._lock:
                self._pump()

    # What follows is called with the lock held, but for `_read_in` and `_put`.

    def _registered(self, prepared: PreparedModule, source: Source, is_pinned: bool) -> Entry:
        entry = self._entries.get(prepared.digest)
        if entry is None:
            entry = Entry(prepared.name, prepared.digest, prepared.footprint)
        if (is_pinned or not entry.registrations) and not self._resident.can_hold([entry]):
            raise ModuleError(
                f"module {entry.name!r} {self._resident.too_large([entry])}: raise it, or pin fewer"
            )
        self._entries[entry.digest] = entry
        if entry in self._leaving:
            self._leaving.remove(entry)
        entry.registrations += 1
        entry.sources = [*entry.sources, source][-entry.registrations :]
        if is_pinned:
            self._resident.pin(entry)
        return entry

    def _known(self, digest: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None or not entry.registrations:
            raise _unknown(digest)
        return entry

    def _check_possible(self, entries: Sequence[Entry]) -> None:
        if not self._resident.can_hold(entries):
            names = ", ".join(sorted(entry.name for entry in entries))
            raise RequestError(
                f"the blend of {names} {self._resident.too_large(entries)}: blend fewer modules, "
                "or raise it",
                parameter="model",
            )

    def _check_readable(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.state == "failed" and time.monotonic() - entry.failed_at < self._retry_s:
                raise ModuleUnavailableError(_unreadable(entry))

    def _is_ready(self, ticket: _Ticket) -> bool:
        """Whether all its modules are in memory or on their way there, and take requests."""
        return all(
            entry in self._resident and entry not in self._draining for entry in ticket.entries
        )

    def _pump(self) -> list[Future[None]]:
        """Give every waiting request what it can have now, in order of arrival: those behind one
        that waits for room get only what is in memory. Returns what is waited for to be freed.
        """
        try:
            freed = self._free([entry for entry in self._leaving if self._is_idle(entry)])
            self._draining = frozenset()
            blocked: _Ticket | None = None
            for ticket in list(self._waiting):
                if self._is_ready(ticket) or (blocked is None and self._place(ticket.entries)):
                    self._waiting.remove(ticket)
                    self._grant(ticket)
                elif blocked is None:
                    blocked = ticket
                    self._draining = self._drained_for(ticket)
            return freed
        except EngineStoppedError as error:
            while self._waiting:
                self._waiting.popleft().future.set_exception(error)
            return []

    def _grant(self, ticket: _Ticket) -> None:
        ticket.is_granted = True
        ticket.cold = tuple(e.digest for e in ticket.entries if e.state != "resident")
        for entry in ticket.entries:
            entry.holds += 1
            self._resident.add(entry)
            if entry.state == "cold":
                entry.state = "loading"
                entry.cold_loads += 1
                self._readers.submit(self._read_in, entry)
        if ticket.cold:
            self._granted.append(ticket)
        else:
            ticket.future.set_result(None)

    def _place(self, entries: Sequence[Entry], *, evicts: bool = True) -> bool:
        """Reckon modules to the resident ones, all or none, and evict what is in the way."""
        victims = self._resident.victims(entries, self._is_idle if evicts else _never)
        if victims is None:
            return False
        self._free(victims)
        self._evictions += len(victims)
        for entry in entries:
            if entry not in self._resident:
                entry.state, entry.error = "cold", None
                self._resident.add(entry)
        return True

    def _drained_for(self, ticket: _Ticket) -> frozenset[Entry]:
        """The modules that take no new requests, for the sake of one that waited too long."""
        if time.monotonic() - ticket.arrived < self._patience_s:
            return frozenset()
        return frozenset(self._resident.victims(ticket.entries, lambda _: True) or ())

    def _is_idle(self, entry: Entry) -> bool:
        return (
            not entry.holds
            and entry.state != "loading"
            and not self.engine.uses_module(entry.digest)
        )

    def _free(self, entries: Iterable[Entry]) -> list[Future[None]]:
        """Take modules out of memory, before anything that is put in from now on."""
        freed = []
        for entry in entries:
            if self._resident.discard(entry):
                freed.append(self.engine.drop_module(entry.digest))
                entry.state = "cold"
            if not entry.registrations:
                self._leaving.remove(entry)
                self._resident.forget(entry)
                del self._entries[entry.digest]
        return freed

    def _read_in(self, entry: Entry) -> None:
        """Read a module's files and put it into memory; on a reader's thread."""
        began = time.monotonic()
        try:
            self._put(entry, self._read(entry))
            with self._lock:
                self._cold_loads += 1
                self._cold_load_s += time.monotonic() - began
        except Exception as error:  # whatever it is, requests wait to be told
            if not isinstance(error, MergerouteError):
                logger.exception("module %r could not be read", entry.name)
            self._failed(entry, error)

    def _read(self, entry: Entry) -> PreparedModule:
        """The module as it was registered, from the newest source that has it."""
        problem: Exception | None = None
        for source in reversed(entry.sources):
            try:
                module = source()
            except (MergerouteError, OSError) as error:
                problem = problem or error
                continue
            if module.digest == entry.digest:
                return self.engine.prepare_module(module)
            problem = problem or ModuleError(
                f"its files changed since it was registered: they hold {short(module.digest)} now"
            )
        raise ModuleError(str(problem)) from problem

    def _put(self, entry: Entry, prepared: PreparedModule) -> None:
        self.engine.put_module(prepared)
        with self._lock:
            entry.state = "resident"
            for ticket in [ticket for ticket in self._granted if entry in ticket.entries]:
                if all(other.state == "resident" for other in ticket.entries):
                    self._granted.remove(ticket)
                    ticket.future.set_result(None)
            self._pump()

    def _failed(self, entry: Entry, error: BaseException) -> None:
        logger.error("%s: %s", _unreadable(entry), error)
        told = _stopped() if self._is_stopped else ModuleUnavailableError(_unreadable(entry))
        with self._lock:
            entry.state, entry.error, entry.failed_at = "failed", str(error), time.monotonic()
            self._resident.discard(entry)
            for ticket in [ticket for ticket in self._granted if entry in ticket.entries]:
                self._granted.remove(ticket)
                ticket.future.set_exception(told)
            self._pump()


def _never(_: Entry) -> bool:
    return False


def _unknown(digest: str) -> UnknownModuleError:
    return UnknownModuleError(f"module {digest} is not loaded: load it first")


def _unreadable(entry: Entry) -> str:
    return (
        f"module {entry.name!r} ({short(entry.digest)}) cannot be read any more: the server's log "
        "says why"
    )


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine is shutting down: try another replica")
