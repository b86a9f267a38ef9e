"""Registrations: which modules an engine is to have, and which of them are in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from ..adapters.errors import ModuleError, RequestError, UnknownModuleError
from .resident_set import Entry, Registration, ResidentSet, Source
from .residents import Modules, Prepared


class Registrations:
    """Registered modules, and room made for them by evicting the least recently used idle ones.
    Not thread-safe: whoever holds the lock of the residency changes it.

    resident: in memory or on their way there. evictions: to make room.
    """

    def __init__(self, modules: Modules) -> None:
        self.resident = ResidentSet(modules.room)
        self.evictions = 0
        self._modules = modules
        self._entries: dict[str, Entry] = {}
        self._leaving: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_leaving(self) -> bool:
        """Whether modules that are registered no more wait for their requests to end."""
        return bool(self._leaving)

    def register(self, prepared: Prepared, source: Source, is_pinned: bool) -> Entry:
        """Count a registration.

        Raises:
            ModuleError: it does not fit the memory.
        """
        entry = self._entries.get(prepared.digest)
        if entry is None:
            entry = Entry(prepared.name, prepared.digest, prepared.footprint)
        if (is_pinned or not entry.registered) and not self.resident.can_hold([entry]):
            raise ModuleError(
                f"module {entry.name!r} {self.resident.too_large([entry])}: raise it, or pin fewer"
            )
        self._entries[entry.digest] = entry
        if entry in self._leaving:
            self._leaving.remove(entry)
        entry.registered = (*entry.registered, Registration(source, is_pinned))
        if is_pinned:
            self.resident.pin(entry)
        return entry

    def known(self, digest: str) -> Entry:
        """A registered module.

        Raises:
            UnknownModuleError: it is not registered.
        """
        entry = self._entries.get(digest)
        if entry is None or not entry.registered:
            raise unknown(digest)
        return entry

    def unregister(self, entry: Entry, source: Source) -> bool:
        """Undo the registration with this source; returns whether it was the last. Then `free_left`
        is to follow.

        Raises:
            UnknownModuleError: there is none.
        """
        gone = next((one for one in entry.registered if one.source is source), None)
        if gone is None:
            raise unknown(entry.digest)
        entry.registered = tuple(one for one in entry.registered if one is not gone)
        if not entry.is_pinned:
            self.resident.forget(entry)
        if not entry.registered:
            entry.left = source
            self._leaving.append(entry)
        return not entry.registered

    def check_possible(self, entries: Sequence[Entry]) -> None:
        """Refuse a blend whose modules are never in memory together.

        Raises:
            RequestError: they are too large, beside what is pinned.
        """
        if not self.resident.can_hold(entries):
            names = ", ".join(sorted(entry.name for entry in entries))
            raise RequestError(
                f"the blend of {names} {self.resident.too_large(entries)}: blend fewer modules, "
                "or raise it",
                parameter="model",
            )

    def place(self, entries: Sequence[Entry], *, evicts: bool = True) -> bool:
        """Reckon modules to the resident ones, all or none, and evict what is in the way."""
        victims = self.resident.victims(entries, self._is_idle if evicts else _never)
        if victims is None:
            return False
        self._free(victims)
        self.evictions += len(victims)
        for entry in entries:
            if entry not in self.resident:
                entry.state, entry.error = "cold", None
                self.resident.add(entry)
        return True

    def _is_idle(self, entry: Entry) -> bool:
        """Whether no request holds it or runs on it."""
        return (
            not entry.holds and entry.state != "loading" and not self._modules.is_used(entry.digest)
        )

    def free_left(self) -> list[Future[None]]:
        """Take what is registered no more out of memory, as far as it is idle."""
        return self._free([entry for entry in self._leaving if self._is_idle(entry)])

    def _free(self, entries: Iterable[Entry]) -> list[Future[None]]:
        """Take modules out of memory, before anything that is put in from now on."""
        freed = []
        for entry in entries:
            if self.resident.discard(entry):
                freed.append(self._modules.drop(entry.digest))
                entry.state = "cold"
            if not entry.registered:
                self._leaving.remove(entry)
                del self._entries[entry.digest]
        return freed


def _never(_: Entry) -> bool:
    return False


def unknown(digest: str) -> UnknownModuleError:
    """The error for a module that is not registered."""
    return UnknownModuleError(f"module {digest} is not loaded: load it first")
