"""A request's way: target, prompt, route, blend, engine. The preview stops before the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from ..runtime.types import GenerationRequest
from .chat import Prompt, chat_prompt, text_prompt
from .context import NO_CONTEXT, Context
from .errors import ApiError
from .hosting import HostedBank
from .modules.changes import Change, load, unload
from .schemas import ChatRequest, GenerationBody, LoadModuleRequest, UnloadModuleRequest
from .sessions import SessionKey, Sessions, conversation_of, labels_of
from .targets import Target, Targets

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServiceOptions:
    """What is done beside answering.

    stickiness: when a conversation gives up its blend. sessions: most conversations whose last
    decision is remembered by their id. idle_s: seconds after which an unused one is forgotten.
    module_roots: folders that modules may be loaded from while the server runs; none: no loading.
    """

    stickiness: Stickiness = field(default_factory=Stickiness)
    sessions: int = 10_000
    idle_s: float = 3600.0
    module_roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """One prompt, where it goes and why. session: of the conversation that remembers it."""

    target: Target
    prompt: Prompt
    decision: Decision
    session: SessionKey | None = None

    @property
    def hosted(self) -> HostedBank:
        """The bank that answers."""
        return self.target.hosted


@dataclass(frozen=True)
class Choice:
    """A running generation.

    index: its place in the response. top_logprobs: alternatives asked for; None: no logprobs.
    """

    index: int
    assignment: Assignment
    generation: Generation
    top_logprobs: int | None


class Service:
    """Everything between HTTP and the engines.

    targets: what can be asked for now. They are replaced as a whole when modules come or go; a
    request is assigned within those that it finds.
    """

    def __init__(
        self, hosted: Sequence[HostedBank], options: ServiceOptions = ServiceOptions()
    ) -> None:
        self.targets = Targets(hosted)
        self._options = options
        self._roots = tuple(root.resolve() for root in options.module_roots)
        self._sessions = Sessions(options.sessions, options.idle_s)
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="mergeroute-changes")

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
            MergerouteError: as `assign`; or an engine refuses a choice.
        """

        async def attempt(targets: Targets) -> list[Choice]:
            assignments = await asyncio.to_thread(self._assign, body, context, targets)
            return self.submit(body, assignments)

        choices = await self._settled(attempt)
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
        target = _target(body, targets)
        prompts = _prompts(body, target.hosted.tokenizer)
        for prompt in prompts:
            _check(body, prompt, target.hosted)
        session = self._session(body, context.headers, target, prompts)
        labels = labels_of(body, context.headers)
        return [
            Assignment(target, prompt, self._decide(body, target, prompt, labels, session), session)
            for prompt in prompts
        ]

    def _session(
        self,
        body: GenerationBody,
        headers: Mapping[str, str],
        target: Target,
        prompts: Sequence[Prompt],
    ) -> SessionKey | None:
        """Of a routed prompt that belongs to a conversation with an id."""
        conversation = conversation_of(body, headers)
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
        return SessionKey(target.hosted.opened.digest, router.digest, conversation)

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
            target.hosted.engine.prepare_gate(gate)
        return decision

    def submit(self, body: GenerationBody, assignments: Sequence[Assignment]) -> list[Choice]:
        """Start all choices, or none.

        Raises:
            MergerouteError: an engine refuses a choice.
        """
        choices: list[Choice] = []
        try:
            for assignment in assignments:
                for number in range(body.n):
                    choices.append(_start(body, assignment, index=len(choices), number=number))
        except BaseException:
            for started in choices:
                started.generation.cancel()
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

    async def load_module(self, body: LoadModuleRequest) -> str:
        """Load a module while requests run; returns what the router knows it by, in a sentence.

        Raises:
            MergerouteError: it cannot be loaded; nothing has changed.
        """
        change = await self._change(lambda targets: load(targets, body, self._roots))
        return change.basis

    async def unload_module(self, body: UnloadModuleRequest) -> None:
        """Take a module away; requests that run on it keep it.

        Raises:
            MergerouteError: it cannot be unloaded; nothing has changed.
        """
        await self._change(lambda targets: unload(targets, body))

    async def _change(self, make: Callable[[Targets], Change]) -> Change:
        """One change at a time, on a thread of their own: many that wait take none from routing.
        Who reads the targets sees all of a change, or nothing.
        """

        def run() -> Change:
            change = make(self.targets)
            self.targets = change.targets
            if change.retired:
                host, digest = change.retired
                host.engine.unload_module(digest)
            return change

        return await asyncio.get_running_loop().run_in_executor(self._changes, run)

    @property
    def is_running(self) -> bool:
        """Whether every engine accepts requests."""
        return all(hosted.engine.is_running for hosted in self.hosted)

    def stop(self) -> None:
        """End all generations and free the engines."""
        for engine in {id(h.engine): h.engine for h in self.hosted}.values():
            engine.stop()


def _prompts(body: GenerationBody, tokenizer: Any) -> list[Prompt]:  # noqa: ANN401
    if isinstance(body, ChatRequest):
        return [chat_prompt(tokenizer, body.messages)]
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


def _target(body: GenerationBody, targets: Targets) -> Target:
    """What the body asks for.

    Raises:
        ApiError: its routing goes with no such target.
    """
    target = targets.resolve(body.model, body.blend)
    if body.routing is not None and target.blend is not None:
        rival = "blend" if body.blend is not None else f"model {body.model!r}"
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


def _start(body: GenerationBody, assignment: Assignment, *, index: int, number: int) -> Choice:
    """Submit choice `number` of a prompt."""
    hosted = assignment.hosted
    sampling = body.sampling(hosted.defaults, number)
    request = hosted.request(assignment.prompt.token_ids, assignment.decision, sampling)
    generation = hosted.engine.submit(request)
    return Choice(index, assignment, generation, sampling.top_logprobs)


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
