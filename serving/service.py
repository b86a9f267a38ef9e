"""A request's way: it is assigned, then started. The preview stops before the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..adapters.errors import UnknownModuleError
from ..routers.conversation import Stickiness
from . import choices
from .access.callers import Caller
from .access.checks import check_generation
from .access.limits import DEFAULT_LIMITS, Limits
from .assigning import Assigner, Assignment
from .choices import Choice
from .context import NO_CONTEXT, Context
from .errors import ApiError
from .experiments.listing import experiment_entries
from .experiments.plan import NO_PLAN, Plan
from .experiments.planning import plan_of
from .experiments.snapshots import NO_EXPERIMENTS
from .formats.tool_parsers import ParserName
from .hosted import HostedBank
from .modules.live import LiveModules
from .modules.sources import Sources
from .modules.state import StateFolder
from .pressure import DEFAULT_PRESSURE, Pressure
from .relay import relays
from .relay.bodies import RelayedChat, RelayedText
from .responses.decisions import route_object
from .schemas.completions import GenerationBody
from .sessions import Sessions
from .targets import Targets
from .terms import NO_TERMS, Terms, in_time, terms_of

if TYPE_CHECKING:
    from .experiments.live import LiveExperiments
    from .telemetry.record import RequestRecord

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
    that they outlive the process; closed by `stop`. experiments: None: there can be none.
    """

    def __init__(
        self,
        hosted: Sequence[HostedBank],
        options: ServiceOptions = ServiceOptions(),
        folder: StateFolder | None = None,
        experiments: LiveExperiments | None = None,
    ) -> None:
        self._options = options
        self.modules = LiveModules(hosted, _sources(options, folder), folder)
        self.experiments = experiments
        if experiments:
            from .experiments.monitor import Monitor
            from .experiments.shadow import Shadows

            experiments.watch(Monitor(experiments, lambda: self.targets).look)
            self._shadows = Shadows(self, experiments)
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

    def plan(self, body: GenerationBody, context: Context = NO_CONTEXT) -> Plan:
        """What experiments make of a request; nothing is recorded.

        Raises:
            ApiError: it asks for an experiment in a way that it cannot be asked for.
        """
        if self.experiments is None:
            return plan_of(body, context, NO_EXPERIMENTS)
        check_generation(body, self.limits)
        return self.experiments.plan(body, context)

    async def start(
        self, body: GenerationBody, context: Context = NO_CONTEXT, plan: Plan = NO_PLAN
    ) -> list[Choice]:
        """Assign a body's prompts, start all their choices, and remember what was decided.

        plan: what experiments make of the request.

        Raises:
            MergerouteError: as `assign`; or an engine refuses a choice; or its time is up.
        """
        terms = terms_of(context, self.pressure.request_timeout_seconds)

        async def attempt(targets: Targets) -> list[Choice]:
            assignments = await asyncio.to_thread(
                self._assigner.assign, body, context, targets, plan
            )
            if isinstance(body, RelayedChat | RelayedText):
                return await relays.start(body, assignments, terms)
            return await choices.start(body, assignments, terms)

        started = await in_time(self._settled(attempt), terms)
        for choice in started:
            if choice.assignment.session:
                self._sessions.record(choice.assignment.session, choice.assignment.decision)
        return started

    async def assign(
        self, body: GenerationBody, context: Context = NO_CONTEXT, plan: Plan = NO_PLAN
    ) -> list[Assignment]:
        """Decide for every prompt of a body what serves it; off the event loop, since routing runs
        a part of the backbone.

        Raises:
            MergerouteError: the target, the blend, the routing or the prompt is at fault.
        """

        async def attempt(targets: Targets) -> list[Assignment]:
            return await asyncio.to_thread(self._assigner.assign, body, context, targets, plan)

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
        assignments = await in_time(self.assign(body, context, self.plan(body, context)), terms)
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
    def relays(self) -> bool:
        """Whether bodies are passed on to engines as they are."""
        return self.hosted[0].upstream is not None

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
        ailments = (h.engine.ailment(self.pressure.watchdog_seconds) for h in self.hosted)
        return next(filter(None, ailments), None)

    def listed_experiments(self, caller: Caller) -> list[dict[str, Any]]:
        """The experiments that a key may ask for, in the shape of /v1/models."""
        snapshot = self.experiments.snapshot if self.experiments else NO_EXPERIMENTS
        return list(experiment_entries(snapshot, self.targets, caller))

    def is_experiment(self, name: str) -> bool:
        """Whether an experiment has this name."""
        return self.experiments is not None and name in self.experiments.snapshot.by_name

    @property
    def warnings(self) -> list[str]:
        """What is not as it should be, though requests are answered."""
        return self.experiments.warnings(self.targets) if self.experiments else []

    def finish(self, record: RequestRecord) -> None:
        """A request is over."""
        if self.experiments:
            self.experiments.finish(record)
            self._shadows.offer(record)

    def drain(self) -> None:
        """Be ready for no more requests; those that run go on."""
        self.is_draining = True
        if self.experiments:
            self._shadows.stop()

    def stop(self) -> None:
        """End all generations and free the engines."""
        if self.experiments:
            self._shadows.stop()
        for residency in {id(h.residency): h.residency for h in self.hosted}.values():
            residency.stop()
        self.modules.close()

    def close(self) -> None:
        """Stop, and bring what was recorded of requests, which have all ended by now, to safety."""
        self.stop()
        if self.experiments:
            self.experiments.close()


def _sources(options: ServiceOptions, folder: StateFolder | None) -> Sources:
    """Where modules may come from."""
    return Sources(
        tuple(root.resolve() for root in options.module_roots),
        options.limits,
        hub=options.hub,
        uploads=folder.uploads if folder and options.uploads else None,
    )
