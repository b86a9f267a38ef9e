"""Questions to a service: many examples in flight, each answer scored; the server's own code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..adapters.blend import Blend
from ..adapters.errors import ContextLengthError, DataError, EngineStoppedError, RequestError
from ..routers.base import Decision
from ..routers.data import Example
from ..routers.token_routing import TokenRouting
from ..runtime.types import FinishReason
from .assigning import Assignment
from .errors import ApiError
from .schemas.completions import ChatRequest, CompletionRequest, GenerationBody
from .scoring import Answer, Metric
from .service import Service

IN_FLIGHT = 32
"""Twice what an engine runs at once, so that prompts are routed while others are answered."""


_Asked = tuple[tuple[int, ...], Blend, TokenRouting | None]
"""A prompt, and what answers it."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Outcome:
    """What came of one example.

    score: in [0, 1]. decision: what answered, and why. is_failed: the engine gave up on it; the
    score is 0.
    """

    example: Example
    score: float
    decision: Decision
    is_failed: bool = False


class Asker:
    """Asks one service, greedily. One prompt under one blend is answered once, whoever asks.

    max_tokens: most tokens of an answer; less where the context leaves less.
    """

    def __init__(self, service: Service, metric: Metric, *, max_tokens: int) -> None:
        self._service = service
        self._metric = metric
        self._max_tokens = max_tokens
        self._answers: dict[_Asked, Answer | None] = {}

    def ask(
        self,
        examples: Sequence[Example],
        target: Callable[[Example], str],
        *,
        step: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Ask every example of the target that it names. step: called after each.

        Raises:
            DataError: a prompt cannot be asked; it names the line.
            EngineError: the engine failed.
        """

        return _in_flight(lambda e: self._outcome(e, target(e)), examples, step)

    def decide(
        self,
        examples: Sequence[Example],
        target: Callable[[Example], str],
        *,
        step: Callable[[], None] = lambda: None,
    ) -> list[Decision]:
        """What the service decides for every example, without an answer; see `ask`."""

        async def decision(example: Example) -> Decision:
            return (await self._assigned(example, target(example)))[1].decision

        return _in_flight(decision, examples, step)

    async def _outcome(self, example: Example, model: str) -> Outcome:
        body, assignment = await self._assigned(example, model)
        decision = assignment.decision
        key = (assignment.prompt.token_ids, decision.blend, decision.token_routing)
        if key not in self._answers:
            self._answers[key] = await self._answer(body, assignment)
        answer = self._answers[key]
        if answer is None:
            return Outcome(example, 0.0, decision, is_failed=True)
        return Outcome(example, self._metric(answer, example), decision)

    async def _assigned(self, example: Example, model: str) -> tuple[GenerationBody, Assignment]:
        """What will be asked, and what the service decides for it."""
        try:
            body = self._body(example, model, max_tokens=self._max_tokens)
            try:
                (assignment,) = await self._service.assign(body)
            except ContextLengthError as error:
                if error.parameter != "max_tokens":
                    raise
                body = self._body(example, model, max_tokens=None)
                (assignment,) = await self._service.assign(body)
        except (ApiError, RequestError) as error:
            raise DataError(f"{example.where}: {error}") from error
        return body, assignment

    async def _answer(self, body: GenerationBody, assignment: Assignment) -> Answer | None:
        """The whole answer; None when the engine gave up on it."""
        (choice,) = self._service.submit(body, [assignment])
        texts = []
        async for event in choice.generation:
            texts.append(event.text)
            reason = event.finish_reason
        if reason is FinishReason.CANCELLED:
            raise EngineStoppedError("the engine stopped while it was asked: see its log")
        is_failed = reason is FinishReason.ERROR
        return None if is_failed else Answer("".join(texts), reason is FinishReason.STOP)

    def _body(self, example: Example, model: str, *, max_tokens: int | None) -> GenerationBody:
        """A lone prompt goes as a user's message, or as a text where there is no chat template."""
        tokenizer = self._service.targets.resolve(model).hosted.tokenizer
        is_lone = [message.role for message in example.messages] == ["user"]
        fields = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        if is_lone and not tokenizer.chat_template:
            return CompletionRequest.model_validate({**fields, "prompt": example.prompt})
        return ChatRequest.model_validate({**fields, "messages": example.conversation})


def _in_flight(
    do: Callable[[Example], Awaitable[_Result]],
    examples: Sequence[Example],
    step: Callable[[], None],
) -> list[_Result]:
    """Do it for every example, some at once. step: called after each."""

    async def all_of_them() -> list[_Result]:
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def one(example: Example) -> _Result:
            async with gate:
                result = await do(example)
            step()
            return result

        return await asyncio.gather(*map(one, examples))

    return asyncio.run(all_of_them())
