"""EngineModules: what is loaded into an engine, who runs on it, and how gates know it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Any

from ..adapters.errors import UnknownModuleError
from ..adapters.lora import Module
from .directions import GateTables
from .footprint import Room
from .gating import GateTable
from .module_stack import ModuleStack, ResidentModule
from .prepared import PreparedModule
from .tasks import Tasks
from .types import TokenGate


class EngineModules:
    """The modules of one engine. Each lies in the stack for as long as a load of it is not undone
    or a request runs on it or waits; the stack changes on the engine's thread alone.

    budget: most bytes of the stack; None: as much as the modules need.
    lock: the engine's: it guards the counts of loads and users together with the queue of requests.
    tasks: what the engine's thread runs between two steps.
    on_moved: called on the engine's thread when modules have moved to other ranks.
    on_idle: called on the engine's thread when a request has ended that ran on modules.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        budget: int | None,
        *,
        lock: threading.Lock,
        tasks: Tasks,
    ) -> None:
        self.stack = ModuleStack(model, budget)
        self._device = model.device
        self._tables = GateTables(self._resident, device=model.device)
        self._lock = lock
        self._tasks = tasks
        self.on_moved: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] = lambda: None
        self._loads: Counter[str] = Counter()
        self._users: Counter[str] = Counter()

    # Any thread, without the lock.

    @property
    def room(self) -> Room:
        """The memory that modules may take."""
        return self.stack.room

    def prepare(self, module: Module) -> PreparedModule:
        """Check a module and make it ready to be put in, in the caller's thread.

        Raises:
            ModuleError: it does not fit the backbone.
        """
        return self.stack.prepare(module)

    def put(self, prepared: PreparedModule) -> None:
        """Make a module resident; loads are counted. Between two steps it is only copied.

        Raises:
            EngineError: there is no room.
        """
        staged = prepared.to(self._device)
        self._tasks.between_steps(lambda: self._load(staged))

    def drop(self, digest: str) -> Future[None]:
        """Undo one load, before whatever is put in or dropped later, without waiting."""
        return self._tasks.soon(lambda: self._unload(digest))

    def is_used(self, digest: str) -> bool:
        """Whether a request that runs or waits needs the module."""
        with self._lock:
            return self._users[digest] > 0

    def table(self, gate: TokenGate) -> GateTable:
        """How a gate weighs its modules; computed where it is the first over them.

        Raises:
            RequestError, UnknownModuleError: as `GateTables.table`.
        """
        return self._tables.table(gate)

    def _resident(self, digest: str) -> ResidentModule:
        """A copy of what is resident of a module, taken between two steps."""
        with self._lock:
            self.check_loaded([digest])  # nobody waits for a step to be told so
        found: list[ResidentModule] = []
        self._tasks.between_steps(lambda: found.append(self.stack.resident(digest)))
        return found[0]

    # Any thread, with the lock held.

    def check_loaded(self, digests: Iterable[str]) -> None:
        """Refuse modules that are not loaded.

        Raises:
            UnknownModuleError: one is not.
        """
        for digest in digests:
            if not self._loads[digest]:
                raise UnknownModuleError(f"module {digest} is not loaded: load it first")

    def begin_use(self, digests: Iterable[str]) -> None:
        """A request runs on modules, or waits to."""
        self._users.update(digests)

    def end_use(self, digests: Iterable[str]) -> None:
        """It does no more; `evict_unused` is to follow, without the lock."""
        self._users.subtract(digests)

    # The engine's thread, without the lock.

    def evict_unused(self, digests: Collection[str]) -> None:
        """A request has ended: take those of its modules out of the stack that nothing needs."""
        for digest in digests:
            self._evict_if_unused(digest)
        if digests:
            self.on_idle()

    def _load(self, prepared: PreparedModule) -> None:
        if prepared.digest not in self.stack:
            before = self.stack.layout
            self.stack.add(prepared)
            if self.stack.layout != before:
                self.on_moved()
        with self._lock:
            self._loads[prepared.digest] += 1

    def _unload(self, digest: str) -> None:
        with self._lock:
            if not self._loads[digest]:
                raise UnknownModuleError(f"module {digest} is not loaded")
            self._loads[digest] -= 1
        self._evict_if_unused(digest)

    def _evict_if_unused(self, digest: str) -> None:
        with self._lock:
            is_used = self._loads[digest] > 0 or self._users[digest] > 0
            if not is_used:
                del self._loads[digest], self._users[digest]
        if not is_used:
            self.stack.remove(digest)
            self._tables.forget(digest)
