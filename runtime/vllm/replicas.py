"""Replicas: what is known of each server, and which of them takes a request."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ...adapters.digest import short
from ...adapters.errors import EngineStoppedError, EngineTimeoutError, ModuleUnavailableError
from .affinity import Affinity, preferred
from .breaker import Breaker
from .endpoint import Clients, Endpoint
from .process import ServerProcess

State = Literal["starting", "ready", "lost", "stopped"]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ReplicaState:
    """What metrics and health tell of a server. modules: how many it serves."""

    name: str
    state: State
    in_flight: int
    restarts: int
    modules: int

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == "ready"


class ReplicaLostError(Exception):
    """The server went while a request ran on it."""


@dataclass(frozen=True)
class Served:
    """What a server told of itself.

    model: the name of its backbone. max_length: most tokens. fields: of bodies by path; empty: it
    does not tell.
    """

    model: str
    max_length: int
    fields: Mapping[str, frozenset[str]]


class Replica:
    """One server. What changes is guarded by the lock of its `Replicas`.

    process: of a server of ours. modules: digests of those that it is known to serve.
    served: what it told when it became ready. faults: why modules could not be loaded, by digest.
    """

    def __init__(self, endpoint: Endpoint, process: ServerProcess | None = None) -> None:
        self.endpoint = endpoint
        self.process = process
        self.clients = Clients(endpoint)
        self.breaker = Breaker()
        self.state: State = "starting"
        self.served: Served | None = None
        self.modules: frozenset[str] = frozenset()
        self.faults: dict[str, str] = {}
        self.leases: set[Lease] = set()
        self.restarts = 0

    @property
    def name(self) -> str:
        """What clients and metrics see of it."""
        return self.endpoint.name


class Lease:
    """A request's place on a replica, in the event loop that took it.

    has_told: whether it showed if the replica works, or else is no trial of it any more.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.has_told = False
        self._loop = asyncio.get_running_loop()
        self._limit: asyncio.Timeout | None = None
        self._is_lost = False

    async def wait(self, work: Awaitable[_Result], seconds: float) -> _Result:
        """Wait for the server.

        Raises:
            ReplicaLostError: it went meanwhile. EngineTimeoutError: it took too long.
        """
        try:
            async with asyncio.timeout(seconds) as self._limit:
                if self._is_lost:
                    self._limit.reschedule(0)
                return await work
        except TimeoutError as error:
            if self._is_lost:
                raise ReplicaLostError(f"{self.replica.name} went") from error
            if self._limit and self._limit.expired():
                raise EngineTimeoutError(
                    f"the server {self.replica.name} did not answer within {seconds:g} s"
                ) from error
            raise
        finally:
            self._limit = None

    def lose(self) -> None:
        """The server has gone; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._interrupt)
        except RuntimeError:  # the loop has ended, and nobody waits
            return

    def _interrupt(self) -> None:
        self._is_lost = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(0)


class Replicas:
    """The servers of one backbone. Any thread may use it.

    on_idle: called, without the lock, when a request that ran on modules has left.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._all = tuple(replicas)
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()
        self.on_idle: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    # Requests.

    def take(
        self, affinity: Affinity, modules: Collection[str], *, avoiding: Collection[Replica]
    ) -> Lease:
        """A place on the replica that a request with this affinity goes to; `leave` is to follow.
        modules: digests that it must serve.

        Raises:
            EngineStoppedError: no server is ready, but those to be avoided.
            ModuleUnavailableError: those that are lack a module.
        """
        with self._lock:
            ready = [r for r in self._all if r.state == "ready" and r not in avoiding]
            awake = [replica for replica in ready if not replica.breaker.is_open]
            if not awake:
                raise EngineStoppedError(self._why_none(ready))
            able = {r.name: r for r in awake if r.modules.issuperset(modules)}
            if not able:
                raise ModuleUnavailableError(_why_unable(awake, modules))
            loads = {name: len(replica.leases) for name, replica in able.items()}
            replica = able[preferred(affinity, loads)[0]]
            lease = Lease(replica)
            replica.leases.add(lease)
            replica.breaker.begin()
            return lease

    def began(self, lease: Lease) -> None:
        """The server began to answer; `succeeded` or `failed` is to follow, if it is seen."""
        with self._lock:
            lease.has_told = True
            lease.replica.breaker.leave()

    def succeeded(self, lease: Lease) -> None:
        """The server answered to the end, if only that the request is at fault."""
        with self._lock:
            lease.has_told = True
            lease.replica.breaker.succeed()

    def failed(self, lease: Lease) -> None:
        """It did not, or with nonsense."""
        with self._lock:
            lease.has_told = True
            lease.replica.breaker.fail()

    def leave(self, lease: Lease) -> None:
        """The request is over."""
        with self._lock:
            lease.replica.leases.discard(lease)
            if not lease.has_told:
                lease.replica.breaker.leave()

    def begin_use(self, modules: Collection[str]) -> None:
        """A request is about to run on modules; `end_use` is to follow."""
        with self._lock:
            self._users.update(modules)

    def end_use(self, modules: Collection[str]) -> None:
        """It has ended."""
        with self._lock:
            self._users.subtract(modules)
            self._users += Counter()  # without zeros
        if modules:
            self.on_idle()

    def is_used(self, module: str) -> bool:
        """Whether a request runs on a module."""
        with self._lock:
            return self._users[module] > 0

    @property
    def in_use(self) -> frozenset[str]:
        """Digests of the modules of requests that run."""
        with self._lock:
            return frozenset(self._users)

    @property
    def in_flight(self) -> int:
        """Requests on all servers."""
        with self._lock:
            return sum(len(replica.leases) for replica in self._all)

    # What is learned of servers.

    def became(self, replica: Replica, state: State, served: Served | None = None) -> None:
        """A server is in another state. One that is not ready serves nothing, and requests on it
        are told.
        """
        with self._lock:
            replica.state = state
            replica.served = served or replica.served
            replica.breaker.reset()
            leases = set() if state == "ready" else set(replica.leases)
            if state != "ready":
                replica.modules, replica.faults = frozenset(), {}
        for lease in leases:
            lease.lose()

    def serves(self, replica: Replica, module: str) -> None:
        """A server was seen to serve a module."""
        with self._lock:
            replica.modules |= {module}
            replica.faults.pop(module, None)

    def lacks(self, replica: Replica, modules: Collection[str], why: str = "") -> None:
        """A server does not serve modules, or is not to any more."""
        with self._lock:
            replica.modules -= frozenset(modules)
            for module in modules:
                replica.faults.pop(module, None)
                if why:
                    replica.faults[module] = why

    @property
    def ready(self) -> list[Replica]:
        """Those that can be asked."""
        with self._lock:
            return [replica for replica in self._all if replica.state == "ready"]

    def snapshot(self) -> list[ReplicaState]:
        """What is known of each, now."""
        with self._lock:
            return [
                ReplicaState(r.name, r.state, len(r.leases), r.restarts, len(r.modules))
                for r in self._all
            ]

    def _why_none(self, ready: Sequence[Replica]) -> str:
        states = Counter("resting after failures" if r in ready else r.state for r in self._all)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        return f"no vLLM server can take the request ({told}): try again later"


def _why_unable(replicas: Sequence[Replica], modules: Collection[str]) -> str:
    """What the servers that are ready lack."""
    missing = {m for replica in replicas for m in modules if m not in replica.modules}
    faults = {replica.faults[m] for replica in replicas for m in missing if m in replica.faults}
    because = f" ({'; '.join(sorted(faults))})" if faults else ""
    named = ", ".join(sorted(map(short, missing)))
    return f"no vLLM server has loaded all modules of the blend, {named} among them{because}"
