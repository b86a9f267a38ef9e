"""A request's way: it is assigned, then started. The preview stops before the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.errors import UnknownModuleError
from ..routers.conversation import Stickiness
from ..runtime.torch_engine import TorchEngine
from . import choices
from .access.limits import DEFAULT_LIMITS, Limits
from .assigning import Assigner, Assignment
from .choices import Choice
from .context import NO_CONTEXT, Context
from .errors import ApiError
from .formats.tool_parsers import ParserName
from .hosting import HostedBank
from .modules.live import LiveModules
from .modules.sources import Sources
from .modules.state import StateFolder
from .pressure import DEFAULT_PRESSURE, Pressure
from .responses.decisions import route_object
from .schemas.completions import GenerationBody
from .sessions import Sessions
from .targets import Targets
from .terms import NO_TERMS, Terms, in_time, terms_of

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServiceOptions:
    """What is done beside answering.

    stickiness: when a conversation gives up its blend. sessions: most conversations whose last
    decision is remembered by their id. idle_s: seconds after which an unused one is forgotten.
    module_roots: folders that modules may be loaded from while the server runs; none: no loading.
    limits: of what a request may ask for. pressure: how long things may take.
    tool_parser: how models spell tool calls.
    hub: whether modules may be loaded from the hub. uploads: whether clients may send them.
    """

    stickiness: Stickiness = field(default_factory=Stickiness)
    sessions: int = 10_000
    idle_s: float = 3600.0
    module_roots: tuple[Path, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    pressure: Pressure = DEFAULT_PRESSURE
    tool_parser: ParserName = "auto"
    hub: bool = False
    uploads: bool = False


class Service:
    """Everything between HTTP and the engines.

    modules: those that can be asked for now. folder: where their loads and unloads are kept, so
    that they outlive the process; closed by `stop`.
    """

    def __init__(
        self,
        hosted: Sequence[HostedBank],
        options: ServiceOptions = ServiceOptions(),
        folder: StateFolder | None = None,
    ) -> None:
        self._options = options
        self.modules = LiveModules(hosted, _sources(options, folder), folder)
        self.is_draining = False
        self._sessions = Sessions(options.sessions, options.idle_s)
        self._assigner = Assigner(
            options.limits, options.stickiness, options.tool_parser, self._sessions
        )

    @property
    def targets(self) -> Targets:
        """What can be asked for now."""
        return self.modules.targets

    @property
    def hosted(self) -> tuple[HostedBank, ...]:
        """The banks that answer now."""
        return self.targets.hosted

    async def start(self, body: GenerationBody, context: Context = NO_CONTEXT) -> list[Choice]:
        """Assign a body's prompts, start all their choices, and remember what was decided.

        Raises:
            MergerouteError: as `assign`; or an engine refuses a choice; or its time is up.
        """
        terms = terms_of(context, self.pressure.request_timeout_seconds)

        async def attempt(targets: Targets) -> list[Choice]:
            assignments = await asyncio.to_thread(self._assigner.assign, body, context, targets)
            return await choices.start(body, assignments, terms)

        started = await in_time(self._settled(attempt), terms)
        for choice in started:
            if choice.assignment.session:
                self._sessions.record(choice.assignment.session, choice.assignment.decision)
        return started

    async def assign(self, body: GenerationBody, context: Context = NO_CONTEXT) -> list[Assignment]:
        """Decide for every prompt of a body what serves it; off the event loop, since routing runs
        a part of the backbone.

        Raises:
            MergerouteError: the target, the blend, the routing or the prompt is at fault.
        """

        async def attempt(targets: Targets) -> list[Assignment]:
            return await asyncio.to_thread(self._assigner.assign, body, context, targets)

        return await self._settled(attempt)

    def submit(
        self, body: GenerationBody, assignments: Sequence[Assignment], terms: Terms = NO_TERMS
    ) -> list[Choice]:
        """Start all choices, or none; their modules are in memory.

        Raises:
            MergerouteError: an engine refuses a choice.
        """
        return choices.submit(body, assignments, terms)

    async def preview(self, body: GenerationBody, context: Context = NO_CONTEXT) -> dict[str, Any]:
        """What `body` would be served by: the response of /v1/route. Nothing is remembered.

        Raises:
            MergerouteError: as serving would.
        """
        terms = terms_of(context, self.pressure.request_timeout_seconds)
        assignments = await in_time(self.assign(body, context), terms)
        if len(assignments) > 1:
            raise ApiError("a preview takes one prompt at a time", param="prompt")
        return route_object(assignments[0])

    async def _settled(self, attempt: Callable[[Targets], Awaitable[_Result]]) -> _Result:
        """Attempt again where a module was taken away or replaced between two steps."""
        while True:
            targets = self.targets
            try:
                return await attempt(targets)
            except UnknownModuleError:
                if targets is self.targets:
                    raise

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return self._options.limits

    @property
    def pressure(self) -> Pressure:
        """How long things may take."""
        return self._options.pressure

    @property
    def unready(self) -> str | None:
        """Why no requests should be sent here; None: they should."""
        if self.is_draining:
            return "the server is shutting down"
        return _ailment((h.engine for h in self.hosted), self.pressure.watchdog_seconds)

    def drain(self) -> None:
        """Be ready for no more requests; those that run go on."""
        self.is_draining = True

    def stop(self) -> None:
        """End all generations and free the engines."""
        for residency in {id(h.residency): h.residency for h in self.hosted}.values():
            residency.stop()
        self.modules.close()


def _sources(options: ServiceOptions, folder: StateFolder | None) -> Sources:
    """Where modules may come from."""
    return Sources(
        tuple(root.resolve() for root in options.module_roots),
        options.limits,
        hub=options.hub,
        uploads=folder.uploads if folder and options.uploads else None,
    )


def _ailment(engines: Iterable[TorchEngine], watchdog_s: float) -> str | None:
    """Why the engines cannot be relied on; None where they can."""
    for engine in engines:
        silent_s = engine.stats().silent_s
        if not engine.is_running:
            return "an engine has stopped: restart the server"
        if silent_s > watchdog_s:
            return (
                f"an engine has been in one step for {silent_s:.0f} s, the limit is "
                f"{watchdog_s:g} s (pressure.watchdog_seconds): wait, or restart the server"
            )
    return None
