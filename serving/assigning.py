"""From a body to what serves it: target, prompts, checks, conversation, decision. Serving and the
preview share all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..adapters.blend import Blend
from ..adapters.errors import MergerouteError, RequestError
from ..routers.base import Decision, Query
from ..routers.conversation import Stickiness, route_conversation
from ..routers.router import token_decision
from ..runtime.types import GenerationRequest
from .access.callers import Caller
from .access.checks import check_generation
from .access.limits import Limits
from .access.permissions import names_hidden, resolve_for
from .chat import Prompt, chat_prompt, text_prompt
from .context import Context
from .dialects import asked_for
from .errors import ApiError
from .experiments.plan import NO_PLAN, Plan
from .formats.forms import Form, form_of
from .formats.tool_parsers import ParserName
from .hosted import HostedBank
from .relay.bodies import RelayedChat, relayed_prompt
from .schemas.completions import ChatRequest, GenerationBody
from .schemas.generation import MAX_CHOICES
from .sessions import SessionKey, Sessions, conversation_of, labels_of
from .targets import AUTO, Target, Targets

if TYPE_CHECKING:
    from .experiments.enrolment import Enrolment

logger = logging.getLogger(__name__)

MAX_PROMPT_LOGPROBS = 1 << 18
"""Of one request: every token of every choice's prompt, times what is told of it."""


@dataclass(frozen=True)
class Assignment:
    """One prompt, where it goes and why. session: of the conversation that remembers it.
    form: of the answer. enrolment: in the experiment that chose the target. seed: of its first
    choice, where the body states none; None: whatever the engine draws.
    """

    target: Target
    prompt: Prompt
    decision: Decision
    session: SessionKey | None = None
    form: Form = field(default_factory=Form)
    enrolment: Enrolment | None = None
    seed: int | None = None

    @property
    def hosted(self) -> HostedBank:
        """The bank that answers."""
        return self.target.hosted


@dataclass(frozen=True)
class Assigner:
    """Decides what serves a body.

    limits: of what it may ask for. stickiness: when a conversation gives up its blend.
    tool_parser: how models spell tool calls. sessions: the last decisions of conversations, which
    are read and never written.
    """

    limits: Limits
    stickiness: Stickiness
    tool_parser: ParserName
    sessions: Sessions

    def assign(
        self, body: GenerationBody, context: Context, targets: Targets, plan: Plan = NO_PLAN
    ) -> list[Assignment]:
        """Decide for every prompt of a body which of the targets serves it, and how. It takes a
        while: routing runs a part of the backbone.

        plan: what experiments make of the request.

        Raises:
            MergerouteError: the target, the blend, the routing or the prompt is at fault.
        """
        check_generation(body, self.limits)
        target = _target(body, targets, context.caller, plan)
        prompts = _prompts(body, target.hosted.tokenizer)
        for prompt in prompts:
            _check(body, prompt, target.hosted)
        check_scores(body, prompts, target.hosted)
        form = self._form(body, target.hosted)
        session = self._session(body, context, target, prompts)
        labels = labels_of(body, context.headers)
        decisions = plan.decisions or [
            self._decide(body, target, prompt, labels, session) for prompt in prompts
        ]
        return [
            Assignment(
                target,
                prompt,
                decision,
                session,
                form,
                plan.enrolment,
                None if plan.seed is None else plan.seed + MAX_CHOICES * number,
            )
            for number, (prompt, decision) in enumerate(zip(prompts, decisions, strict=True))
        ]

    def _form(self, body: GenerationBody, hosted: HostedBank) -> Form:
        """What the answer must look like, compiled here: it may take long."""
        form = form_of(body, hosted.tokenizer, self.tool_parser)
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
            decision = route_conversation(
                target.hosted.router,
                Query(prompt.turns, labels),
                replace(self.stickiness, mode="each-turn") if body.reroute else self.stickiness,
                before=self.sessions.last(session) if session else None,
            )
        if gate := target.hosted.gate(decision):
            with target.hosted.residency.hold_resident(gate.modules) as are_resident:
                if are_resident:  # else it is told of when it is served: nothing is read to route
                    target.hosted.engine.prepare_gate(gate)
        return decision


def _target(body: GenerationBody, targets: Targets, caller: Caller, plan: Plan) -> Target:
    """What the plan says, else what the body asks for, if the caller may ask for it.

    Raises:
        ApiError: its routing goes with no such target; or that of a variant is gone.
    """
    if plan.target is not None:
        return _planned(plan, plan.target, targets)
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


def _planned(plan: Plan, name: str, targets: Targets) -> Target:
    """The target of a plan, which has seen to it that the caller may have it. A promoted one that
    is gone leaves the server's own default; a variant's is told of, lest another be counted.

    Raises:
        ApiError: a variant's target is gone.
    """
    try:
        return targets.resolve(name)
    except MergerouteError as error:
        if plan.promoted_by is not None:
            own = targets.resolve(AUTO)
            return replace(own, warning=f"the promoted target {name} is gone: default answers")
        logger.error("the target of an experiment is gone: %s", error)
        raise ApiError(
            "what the experiment's variant answers from is gone: ask for another model, and tell "
            "whoever runs the experiment",
            status=503,
            code="variant_unavailable",
        ) from error


def _prompts(body: GenerationBody, tokenizer: Any) -> list[Prompt]:  # noqa: ANN401
    if isinstance(body, RelayedChat):
        return [relayed_prompt(body, tokenizer)]
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


def _fixed(body: GenerationBody, target: Target) -> Decision | None:
    """The decision where nothing is to be routed; None: the bank's router decides."""
    if body.routing is not None:
        return token_decision(body.routing)
    if target.blend is not None:
        return Decision(blend=target.blend, reason=target.reason)
    if target.hosted.router is None:
        return Decision(blend=Blend(), reason="the bank has no router: the backbone answers")
    return None
