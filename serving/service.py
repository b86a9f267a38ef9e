"""A request's way: target, prompt, route, blend, engine. The preview stops before the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.blend import Blend
from ..adapters.errors import RequestError, UnknownModuleError
from ..routers.base import Decision, Query
from ..routers.conversation import Stickiness, route_conversation
from ..routers.router import token_decision
from ..runtime.engine import Generation
from ..runtime.torch_engine import TorchEngine
from ..runtime.types import GenerationRequest
from .access.callers import Caller
from .access.checks import check_generation, check_load
from .access.limits import DEFAULT_LIMITS, Limits
from .access.permissions import names_hidden, resolve_for
from .chat import Prompt, chat_prompt, text_prompt
from .context import NO_CONTEXT, Context
from .dialects import asked_for
from .errors import ApiError
from .formats.forms import Form, form_of
from .formats.tool_parsers import ParserName
from .hosting import HostedBank
from .modules.changes import Change, load, unload
from .modules.listing import module_entries, module_entry
from .modules.restoring import restore
from .modules.sources import Sources
from .modules.state import State, StateFolder
from .modules.uploads import remove_unused
from .pressure import DEFAULT_PRESSURE, Pressure
from .schemas import ChatRequest, GenerationBody, LoadModuleRequest, UnloadModuleRequest
from .sessions import SessionKey, Sessions, conversation_of, labels_of
from .targets import Target, Targets
from .terms import NO_TERMS, Terms, in_time, terms_of

_Result = TypeVar("_Result")
MAX_PROMPT_LOGPROBS = 1 << 21
"""Of one request: every token of every choice's prompt, times what is told of it."""


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


@dataclass(frozen=True)
class Assignment:
    """One prompt, where it goes and why. session: of the conversation that remembers it.
    form: of the answer.
    """

    target: Target
    prompt: Prompt
    decision: Decision
    session: SessionKey | None = None
    form: Form = field(default_factory=Form)

    @property
    def hosted(self) -> HostedBank:
        """The bank that answers."""
        return self.target.hosted


@dataclass(frozen=True)
class Choice:
    """A running generation.

    index: its place in the response. top_logprobs: alternatives asked for; None: no logprobs.
    body: what it is a part of the answer to. cold: modules that had to be read for it.
    """

    index: int
    assignment: Assignment
    generation: Generation
    top_logprobs: int | None
    body: GenerationBody
    cold: tuple[str, ...] = ()


class Service:
    """Everything between HTTP and the engines.

    targets: what can be asked for now. They are replaced as a whole when modules come or go; a
    request is assigned within those that it finds. sources: where modules may come from.
    folder: where loads and unloads are kept, so that they outlive the process; closed by `stop`.
    """

    def __init__(
        self,
        hosted: Sequence[HostedBank],
        options: ServiceOptions = ServiceOptions(),
        folder: StateFolder | None = None,
    ) -> None:
        self.targets = Targets(hosted)
        self._options = options
        self._folder = folder
        self._state = State()
        self.sources = Sources(
            tuple(root.resolve() for root in options.module_roots),
            options.limits,
            hub=options.hub,
            uploads=folder.uploads if folder and options.uploads else None,
        )
        if folder:
            self.targets, self._state = restore(self.targets, folder.read(), self.sources)
            remove_unused(folder.uploads, self._state)
        self.is_draining = False
        self._sessions = Sessions(options.sessions, options.idle_s)
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="mergeroute-changes")
        self._downloads = ThreadPoolExecutor(2, thread_name_prefix="mergeroute-downloads")

    @property
    def hosted(self) -> tuple[HostedBank, ...]:
        """The banks that answer now."""
        return self.targets.hosted

    async def assign(self, body: GenerationBody, context: Context = NO_CONTEXT) -> list[Assignment]:
        """Decide for every prompt of a body what serves it; off the event loop, since routing runs
        a part of the backbone.

        Raises:
            MergerouteError: the target, the blend, the routing or the prompt is at fault.
        """

        async def attempt(targets: Targets) -> list[Assignment]:
            return await asyncio.to_thread(self._assign, body, context, targets)

        return await self._settled(attempt)

    async def start(self, body: GenerationBody, context: Context = NO_CONTEXT) -> list[Choice]:
        """Assign a body's prompts, start all their choices, and remember what was decided.

        Raises:
            MergerouteError: as `assign`; or an engine refuses a choice; or its time is up.
        """
        terms = terms_of(context, self.pressure.request_timeout_seconds)

        async def attempt(targets: Targets) -> list[Choice]:
            assignments = await asyncio.to_thread(self._assign, body, context, targets)
            return await self._started(body, assignments, terms)

        choices = await in_time(self._settled(attempt), terms)
        for choice in choices:
            if choice.assignment.session:
                self._sessions.record(choice.assignment.session, choice.assignment.decision)
        return choices

    async def _settled(self, attempt: Callable[[Targets], Awaitable[_Result]]) -> _Result:
        """Attempt again where a module was taken away or replaced between two steps."""
        while True:
            targets = self.targets
            try:
                return await attempt(targets)
            except UnknownModuleError:
                if targets is self.targets:
                    raise

    def _assign(self, body: GenerationBody, context: Context, targets: Targets) -> list[Assignment]:
        check_generation(body, self.limits)
        target = _target(body, targets, context.caller)
        prompts = _prompts(body, target.hosted.tokenizer)
        for prompt in prompts:
            _check(body, prompt, target.hosted)
        check_scores(body, prompts, target.hosted)
        form = self._form(body, target.hosted)
        session = self._session(body, context, target, prompts)
        labels = labels_of(body, context.headers)
        return [
            Assignment(
                target, prompt, self._decide(body, target, prompt, labels, session), session, form
            )
            for prompt in prompts
        ]

    def _form(self, body: GenerationBody, hosted: HostedBank) -> Form:
        """What the answer must look like, compiled here: it may take long."""
        form = form_of(body, hosted.tokenizer, self._options.tool_parser)
        if form.grammar is not None:
            hosted.engine.prepare_grammar(form.grammar)
        return form

    def _session(
        self,
        body: GenerationBody,
        context: Context,
        target: Target,
        prompts: Sequence[Prompt],
    ) -> SessionKey | None:
        """Of a routed prompt that belongs to a conversation with an id."""
        conversation = conversation_of(body, context.headers)
        if len(prompts) > 1 and body.conversation is not None:
            raise ApiError(
                f"conversation goes with one prompt, not with {len(prompts)}: leave it out",
                param="conversation",
            )
        router = target.hosted.router
        if conversation is None or len(prompts) > 1 or router is None:
            return None
        if target.blend is not None or body.routing is not None:
            return None
        bank = target.hosted.opened.digest
        return SessionKey(bank, router.digest, conversation, context.caller.name)

    def _decide(
        self,
        body: GenerationBody,
        target: Target,
        prompt: Prompt,
        labels: Mapping[str, str],
        session: SessionKey | None,
    ) -> Decision:
        decision = _fixed(body, target)
        if decision is None:
            assert target.hosted.router is not None
            stickiness = self._options.stickiness
            decision = route_conversation(
                target.hosted.router,
                Query(prompt.turns, labels),
                replace(stickiness, mode="each-turn") if body.reroute else stickiness,
                before=self._sessions.last(session) if session else None,
            )
        if gate := target.hosted.gate(decision):
            with target.hosted.residency.hold_resident(gate.modules) as are_resident:
                if are_resident:  # else it is told of when it is served: nothing is read to route
                    target.hosted.engine.prepare_gate(gate)
        return decision

    async def _started(
        self, body: GenerationBody, assignments: Sequence[Assignment], terms: Terms
    ) -> list[Choice]:
        """Start all choices, or none, each prompt's as soon as its modules are in memory."""
        tasks = [asyncio.ensure_future(self._start_held(body, one, terms)) for one in assignments]
        try:
            started = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(ended, BaseException):
                    _cancel(ended)
            raise
        choices = [choice for own in started for choice in own]
        return [replace(choice, index=index) for index, choice in enumerate(choices)]

    async def _start_held(
        self, body: GenerationBody, assignment: Assignment, terms: Terms
    ) -> list[Choice]:
        hosted, decision = assignment.hosted, assignment.decision
        async with hosted.residency.hold(hosted.needed(decision)) as cold:
            if gate := hosted.gate(decision):
                await asyncio.to_thread(hosted.engine.prepare_gate, gate)
            choices = self.submit(body, [assignment], terms)
        return [replace(choice, cold=hosted.names(cold)) for choice in choices] if cold else choices

    def submit(
        self, body: GenerationBody, assignments: Sequence[Assignment], terms: Terms = NO_TERMS
    ) -> list[Choice]:
        """Start all choices, or none; their modules are in memory.

        Raises:
            MergerouteError: an engine refuses a choice.
        """
        choices: list[Choice] = []
        try:
            for assignment in assignments:
                for number in range(body.n):
                    started = _start(body, assignment, number=number, terms=terms)
                    choices.append(replace(started, index=len(choices)))
        except BaseException:
            _cancel(choices)
            raise
        return choices

    async def preview(self, body: GenerationBody, context: Context = NO_CONTEXT) -> dict[str, Any]:
        """What `body` would be served by: the response of /v1/route. Nothing is remembered.

        Raises:
            MergerouteError: as serving would.
        """
        assignments = await self.assign(body, context)
        if len(assignments) > 1:
            raise ApiError("a preview takes one prompt at a time", param="prompt")
        return _route_object(assignments[0])

    async def load_module(self, body: LoadModuleRequest) -> Change:
        """Load a module while requests run; what it comes to has been done and kept.

        Raises:
            MergerouteError: it cannot be loaded; nothing has changed.
        """
        check_load(body, self.limits)
        await self._run(self._downloads, lambda: self.sources.download(body.lora_path))
        return await self._change(lambda t, state: load(t, state, body, self.sources))

    async def unload_module(self, body: UnloadModuleRequest) -> Change:
        """Take a module away; requests that run on it keep it.

        Raises:
            MergerouteError: it cannot be unloaded; nothing has changed.
        """
        return await self._change(lambda targets, state: unload(targets, state, body))

    def modules(self) -> list[dict[str, Any]]:
        """What is known of every module."""
        return module_entries(self.targets, self._state)

    def module(self, name: str) -> dict[str, Any]:
        """What is known of one module.

        Raises:
            ApiError: there is none.
        """
        return module_entry(self.targets, self._state, name)

    async def _change(self, make: Callable[[Targets, State], Change]) -> Change:
        """One change at a time, on a thread of their own: many that wait take none from routing.
        Who reads the targets sees all of a change, or nothing; it is kept before it is seen.
        """

        def run() -> Change:
            change = make(self.targets, self._state)
            try:
                if self._folder:
                    self._folder.write(change.state)
            except BaseException:
                _unregister(change.added)
                raise
            self._state = change.state
            self.targets = change.targets
            _unregister(change.retired)
            return change

        return await self._run(self._changes, run)

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

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
        if self._folder:
            self._folder.close()


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


def _cancel(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.generation.cancel()


def _unregister(loaded: tuple[HostedBank, str] | None) -> None:
    if loaded:
        host, digest = loaded
        host.residency.unregister(digest)


def _prompts(body: GenerationBody, tokenizer: Any) -> list[Prompt]:  # noqa: ANN401
    if isinstance(body, ChatRequest):
        return [chat_prompt(tokenizer, body.messages, body.template_arguments)]
    return [text_prompt(tokenizer, prompt) for prompt in body.prompts]


def _check(body: GenerationBody, prompt: Prompt, hosted: HostedBank) -> None:
    """Refuse what the engine would refuse before a part of the backbone is run to route it."""
    try:
        sampling = body.sampling(hosted.defaults, 0)
        hosted.engine.check(GenerationRequest(prompt.token_ids, sampling=sampling))
    except RequestError as error:
        if error.parameter == "prompt" and isinstance(body, ChatRequest):
            error.parameter = "messages"
        raise


def check_scores(body: GenerationBody, prompts: Sequence[Prompt], hosted: HostedBank) -> None:
    """Refuse to tell of more log-probabilities of prompts than can be held.

    Raises:
        ApiError: it says how many they would be.
    """
    count = body.sampling(hosted.defaults, 0).prompt_logprobs
    if count is None:
        return
    total = sum(len(prompt.token_ids) for prompt in prompts) * body.n * (count + 1)
    if total > MAX_PROMPT_LOGPROBS:
        raise ApiError(
            f"the prompts' log-probabilities would be {total:,}, the limit is "
            f"{MAX_PROMPT_LOGPROBS:,}: send fewer prompts at a time, or ask for fewer per token",
            param="prompt_logprobs" if body.prompt_logprobs is not None else "echo",
        )


def _target(body: GenerationBody, targets: Targets, caller: Caller) -> Target:
    """What the body asks for, if the caller may ask for it.

    Raises:
        ApiError: its routing goes with no such target.
    """
    with names_hidden(caller, body.model):
        asked = asked_for(body, targets)
    target = resolve_for(caller, targets, asked.model, asked.weights, param=asked.field)
    if body.routing is not None and target.blend is not None:
        rival = asked.field if asked.weights is not None else f"model {body.model!r}"
        raise ApiError(
            f"routing goes with model 'auto' or a bank alone, not with {rival}: leave one of the "
            "two out",
            param="routing",
        )
    return target


def _fixed(body: GenerationBody, target: Target) -> Decision | None:
    """The decision where nothing is to be routed; None: the bank's router decides."""
    if body.routing is not None:
        return token_decision(body.routing)
    if target.blend is not None:
        return Decision(blend=target.blend, reason=target.reason)
    if target.hosted.router is None:
        return Decision(blend=Blend(), reason="the bank has no router: the backbone answers")
    return None


def _start(body: GenerationBody, assignment: Assignment, *, number: int, terms: Terms) -> Choice:
    """Submit choice `number` of a prompt."""
    hosted = assignment.hosted
    sampling = body.sampling(hosted.defaults, number)
    request = hosted.request(assignment.prompt.token_ids, assignment.decision, sampling)
    generation = hosted.engine.submit(
        replace(
            request,
            grammar=assignment.form.grammar,
            tenant=terms.tenant,
            deadline=terms.deadline,
        )
    )
    return Choice(number, assignment, generation, sampling.top_logprobs, body)


def _route_object(assignment: Assignment) -> dict[str, Any]:
    decision, bank = assignment.decision, assignment.hosted.bank
    return {
        "object": "route",
        "target": assignment.target.name,
        "bank": bank.name,
        "bank_digest": bank.digest,
        "blend": dict(decision.blend),
        "abstained": decision.abstained,
        "confidence": decision.confidence,
        "scores": dict(decision.scores),
        "distance": decision.distance,
        "typicality": decision.typicality,
        "threshold": decision.threshold,
        "runner_up": decision.runner_up,
        "router": decision.router,
        "reason": decision.reason,
        "basis": dict(decision.basis),
        "routing": decision.token_routing.settings if decision.token_routing else None,
        "milliseconds": round(decision.milliseconds, 3),
        "experiment": None,
        "variant": None,
    }
