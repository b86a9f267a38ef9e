"""A request's way: target, prompt, route, blend, engine. The preview stops before the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.blend import Blend
from ..adapters.errors import RequestError
from ..routers.base import Decision, Query
from ..runtime.engine import Generation
from ..runtime.types import GenerationRequest
from .chat import Prompt, chat_prompt, text_prompt
from .errors import ApiError
from .hosting import HostedBank
from .schemas import ChatRequest, GenerationBody
from .targets import Target, Targets


@dataclass(frozen=True)
class Assignment:
    """One prompt, where it goes and why."""

    target: Target
    prompt: Prompt
    decision: Decision

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
    """Everything between HTTP and the engines."""

    def __init__(self, hosted: Sequence[HostedBank]) -> None:
        self.hosted = tuple(hosted)
        self.targets = Targets(hosted)

    async def assign(self, body: GenerationBody) -> list[Assignment]:
        """Decide for every prompt of a body what serves it; off the event loop, since routing runs
        a part of the backbone.

        Raises:
            MergerouteError: the target, the blend or the prompt is at fault.
        """
        return await asyncio.to_thread(self._assign, body)

    def _assign(self, body: GenerationBody) -> list[Assignment]:
        target = self.targets.resolve(body.model, body.blend)
        prompts = _prompts(body, target.hosted.tokenizer)
        for prompt in prompts:
            _check(body, prompt, target.hosted)
        return [Assignment(target, prompt, _decide(target, prompt)) for prompt in prompts]

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

    async def preview(self, body: GenerationBody) -> dict[str, Any]:
        """What `body` would be served by: the response of /v1/route.

        Raises:
            MergerouteError: as serving would.
        """
        assignments = await self.assign(body)
        if len(assignments) > 1:
            raise ApiError("a preview takes one prompt at a time", param="prompt")
        return _route_object(assignments[0])

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


def _decide(target: Target, prompt: Prompt) -> Decision:
    if target.blend is not None:
        return Decision(blend=target.blend, reason=target.reason)
    if target.hosted.router is None:
        return Decision(blend=Blend(), reason="the bank has no router: the backbone answers")
    return target.hosted.router.route(Query(prompt.routed_ids(), prompt.routed_text))


def _start(body: GenerationBody, assignment: Assignment, *, index: int, number: int) -> Choice:
    """Submit choice `number` of a prompt."""
    hosted = assignment.hosted
    sampling = body.sampling(hosted.defaults, number)
    blend = hosted.by_digest(assignment.decision.blend)
    request = GenerationRequest(assignment.prompt.token_ids, blend, sampling)
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
        "threshold": decision.threshold,
        "runner_up": decision.runner_up,
        "router": decision.router,
        "reason": decision.reason,
        "milliseconds": round(decision.milliseconds, 3),
        "experiment": None,
        "variant": None,
    }
