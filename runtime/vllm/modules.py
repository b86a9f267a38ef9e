"""The modules that all servers of a backbone are to serve, as a residency sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from ...adapters.errors import EngineError, ModuleError, ModuleUnavailableError
from ...adapters.lora import Module
from ...adapters.shapes import Shapes
from ..footprint import Footprint
from .blends import module_key
from .greetings import load
from .replicas import Replica, Replicas
from .store import ModuleStore, check_inner

_LOADING_S = 300.0


@dataclass(frozen=True)
class SlotRoom:
    """Room counted in slots: each takes the memory of the largest rank, whatever lies in it.

    slot_bytes: on each server.
    """

    slots: int
    slot_bytes: int
    setting: str = "engine.module_slots"

    @classmethod
    def of(cls, shapes: Shapes, store: ModuleStore, itemsize: int) -> SlotRoom:
        """The room that servers on a store's folder have. itemsize: bytes of a number."""
        width = sum(out + into for out, into in shapes.linear.values())
        return cls(store.slots, width * store.rank * itemsize)

    @property
    def budget(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes

    def needed(self, footprints: Iterable[Footprint]) -> int:
        """Bytes that modules take together."""
        return self.slot_bytes * sum(1 for _ in footprints)

    def fits(self, footprints: Iterable[Footprint]) -> bool:
        """Whether each finds a slot."""
        return sum(1 for _ in footprints) <= self.slots


@dataclass(frozen=True)
class ReadModule:
    """A module that the servers could serve."""

    module: Module
    footprint: Footprint

    @property
    def name(self) -> str:
        """What it is called."""
        return self.module.name

    @property
    def digest(self) -> str:
        """Of its content."""
        return self.module.digest


class VllmModules:
    """What lies in the servers' folder. Any thread may use it.

    A module is put into the folder, then every server that is ready loads it; the others do when
    they become ready.
    """

    def __init__(
        self, store: ModuleStore, shapes: Shapes, replicas: Replicas, *, itemsize: int
    ) -> None:
        self.room = SlotRoom.of(shapes, store, itemsize)
        self._store = store
        self._shapes = shapes
        self._replicas = replicas
        self._lock = threading.Lock()
        self._wanted: tuple[str, ...] = ()
        left = store.keys()  # by a gateway before this one
        for key in left:
            store.remove(key)

    @property
    def on_idle(self) -> Callable[[], None]:
        """Called when a request has ended that ran on modules."""
        return self._replicas.on_idle

    @on_idle.setter
    def on_idle(self, call: Callable[[], None]) -> None:
        self._replicas.on_idle = call

    @property
    def wanted(self) -> tuple[str, ...]:
        """Digests of what every server is to serve."""
        return self._wanted

    def prepare(self, module: Module) -> ReadModule:
        """Check a module; changes nothing.

        Raises:
            ModuleError: it does not fit the backbone, or what blends inside vLLM, or a slot.
        """
        module.check(self._shapes)
        check_inner(module, self._shapes)
        if module.rank > self._store.rank:
            raise ModuleError(
                f"module {module.name!r} has rank {module.rank}, the servers were started for at "
                f"most {self._store.rank} (engine.module_rank): raise it, or compact the module"
            )
        return ReadModule(module, Footprint(max(1, module.rank), frozenset(module.deltas)))

    def put(self, read: ReadModule) -> None:
        """Have all servers serve a module; one that is not there now will when it is.

        Raises:
            ModuleError: a server cannot; then none does.
            ModuleUnavailableError: none of those that are ready has loaded it.
        """
        self._store.add(read.module, self._shapes)
        with self._lock:
            self._wanted = (*self._wanted, read.digest)
        try:
            faults = [self._load(replica, read) for replica in self._replicas.ready]
            if faults and None not in faults:
                raise ModuleUnavailableError(
                    f"no vLLM server has loaded the module {read.name!r} ({faults[0]}): try again "
                    "later"
                )
        except BaseException:
            self.drop(read.digest)
            raise

    def drop(self, digest: str) -> Future[None]:
        """Have no server serve a module that no request runs on."""
        done: Future[None] = Future()
        with self._lock:
            self._wanted = tuple(one for one in self._wanted if one != digest)
        for replica in self._replicas:
            self._replicas.lacks(replica, [digest])
        self._store.remove(digest)
        done.set_result(None)
        return done

    def is_used(self, digest: str) -> bool:
        """Whether a request runs on a module."""
        return self._replicas.is_used(digest)

    def _load(self, replica: Replica, read: ReadModule) -> str | None:
        """On one server; why it could not now, if so. It is told again when it can."""
        try:
            with replica.endpoint.client(_LOADING_S) as client:
                refusal = load(client, read.digest)
        except EngineError as error:
            return str(error)
        if refusal is None:
            self._replicas.serves(replica, read.digest)
            return None
        if refusal.is_of_a_module:
            key = module_key(read.digest)
            raise ModuleError(
                f"module {read.name!r} cannot be served by {replica.name}: "
                f"{refusal.message.replace(key, read.name)}"
            )
        return refusal.message
