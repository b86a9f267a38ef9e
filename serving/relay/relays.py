"""Relays: bodies on their way through an engine that takes them as they are.

A body whose prompts have different blends becomes several calls, whose answers become one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ...adapters.blend import Blend
from ...adapters.errors import EngineError, EngineTimeoutError, MergerouteError
from ...runtime.engine import Generation
from ...runtime.vllm.calls import Call, Document, Reply
from ...runtime.vllm.engine import VllmEngine
from ..assigning import Assignment
from ..choices import Choice
from ..errors import describe
from ..responses.progress import Progress
from ..terms import Terms, timed_out
from .bodies import CHAT_PATH, TEXT_PATH, RelayedBody, RelayedChat, RelayedText, passed_on

_REASONS = {"tool_calls": "stop", "function_call": "stop", "abort": "cancelled"}
"""The engine's, as what is counted."""


@dataclass(frozen=True)
class Leg:
    """One call. places: of its answer's choices in the whole answer. digests: of its modules."""

    engine: VllmEngine
    call: Call
    places: tuple[int, ...]
    digests: tuple[str, ...]
    assignments: tuple[Assignment, ...]


class Relay:
    """One body's way there and back. `release` is to follow, whatever becomes of it.

    legs: at least one.
    """

    def __init__(self, body: RelayedBody, legs: Sequence[Leg], fingerprint: str) -> None:
        self._body = body
        self._legs = legs
        self._told = {"model": body.model, "system_fingerprint": fingerprint}
        self._replies: list[Reply] = []
        self._held: list[Leg] = []

    async def hold(self) -> list[tuple[str, ...]]:
        """Have all modules in memory, and keep them there; digests of those that had to be read,
        by leg.

        Raises:
            MergerouteError: one cannot be had.
        """
        cold = []
        async with AsyncExitStack() as stack:
            for leg in self._legs:
                residency = leg.assignments[0].hosted.residency
                cold.append(await stack.enter_async_context(residency.hold(leg.digests)))
            for leg in self._legs:
                leg.engine.replicas.begin_use(leg.digests)
                self._held.append(leg)
        return cold

    async def open(self) -> None:
        """Send the body; returns once whole answers, or all first chunks, are here.

        Raises:
            MergerouteError: as `VllmEngine.forward`.
        """
        tasks = [asyncio.ensure_future(leg.engine.forward(leg.call)) for leg in self._legs]
        try:
            self._replies = list(await asyncio.gather(*tasks))
        except BaseException as error:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Reply):
                    ended.close()
            if isinstance(error, MergerouteError):
                raise self._in_our_words(error) from error
            raise

    def whole(self, progress: Sequence[Progress]) -> Document:
        """The whole answer. progress: one per choice, brought up to date.

        Raises:
            EngineError: a choice is missing, or was not asked for.
        """
        documents = [reply.document or {} for reply in self._replies]
        choices = [
            _placed(leg, choice)
            for leg, document in zip(self._legs, documents, strict=True)
            for choice in document["choices"]
        ]
        choices.sort(key=lambda choice: choice["index"])
        for choice in choices:
            _follow(progress[choice["index"]], choice, is_whole=True)
        if missing := sum(one.finish_reason is None for one in progress):
            raise EngineError(f"the vLLM server left out {missing} of {len(progress)} choices")
        usages = [document.get("usage") for document in documents]
        for leg, used in zip(self._legs, usages, strict=True):
            _account(leg, used, progress)
        return {**documents[0], **self._told, "choices": choices, "usage": _sum(usages)}

    async def lines(self, progress: Sequence[Progress]) -> AsyncIterator[str]:
        """The stream's lines. What goes wrong after the first byte becomes an `error` event.

        progress: one per choice, kept up to date for whoever looks on.
        """
        usages: dict[int, Document] = {}
        last: Document = {}
        try:
            async with aclosing(self._chunks()) as chunks:
                async for number, chunk in chunks:
                    last = chunk
                    told = self._chunk(self._legs[number], chunk, progress, usages)
                    if told is not None:
                        yield _line(told)
            if any(one.finish_reason is None for one in progress):
                raise EngineError("the vLLM server ended a stream without saying why")
            for number, leg in enumerate(self._legs):
                _account(leg, usages.get(number), progress)
            if self._body.includes_usage:
                summed = _sum([usages.get(number) for number in range(len(self._legs))])
                yield _line({**last, **self._told, "choices": [], "usage": summed})
            yield "data: [DONE]\n\n"
        except MergerouteError as error:
            _fail(progress, error)
            yield f"event: error\n{_line(describe(self._in_our_words(error))[1])}"

    def release(self) -> None:
        """Let go of servers and modules; what has not ended is stopped. In the loop of `open`."""
        for reply in self._replies:
            reply.close()
        self._replies = []
        for leg in self._held:
            leg.engine.replicas.end_use(leg.digests)
        self._held = []

    def _chunk(
        self,
        leg: Leg,
        chunk: Document,
        progress: Sequence[Progress],
        usages: dict[int, Document],
    ) -> Document | None:
        """A chunk as the client sees it; None of one that only tells the usage."""
        if used := chunk.get("usage"):
            usages[self._legs.index(leg)] = used
        if not chunk["choices"]:
            return None
        choices = [_placed(leg, choice) for choice in chunk["choices"]]
        for choice in choices:
            _follow(progress[choice["index"]], choice, is_whole=False)
        told = {**chunk, **self._told, "choices": choices}
        if self._body.includes_usage:
            return {"usage": None, **told}
        told.pop("usage", None)
        return told

    async def _chunks(self) -> AsyncGenerator[tuple[int, Document]]:
        """Chunks of all legs as they come, with the leg's number."""
        if len(self._replies) == 1:
            async with aclosing(self._replies[0].chunks()) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
            return
        arrived: asyncio.Queue[tuple[int, Document | BaseException | None]] = asyncio.Queue()

        async def follow(number: int, reply: Reply) -> None:
            try:
                async with aclosing(reply.chunks()) as chunks:
                    async for chunk in chunks:
                        arrived.put_nowait((number, chunk))
                arrived.put_nowait((number, None))
            except MergerouteError as error:
                arrived.put_nowait((number, error))

        tasks = [asyncio.ensure_future(follow(*one)) for one in enumerate(self._replies)]
        running = len(tasks)
        try:
            while running:
                number, found = await arrived.get()
                if isinstance(found, BaseException):
                    raise found
                running -= found is None
                if found is not None:
                    yield number, found
        finally:
            for task in tasks:
                task.cancel()

    def _in_our_words(self, error: MergerouteError) -> MergerouteError:
        """The same without the engine's own names of blends."""
        if isinstance(error, EngineTimeoutError) and any(leg.call.is_late for leg in self._legs):
            return timed_out()
        text = str(error)
        for leg in self._legs:
            text = text.replace(leg.call.model, self._body.model) if leg.call.model else text
        error.args = (text,)
        return error


async def start(body: RelayedBody, assignments: Sequence[Assignment], terms: Terms) -> list[Choice]:
    """Choices that wait for their relay to be opened; their modules are held.

    Raises:
        MergerouteError: a module cannot be had.
    """
    legs = _legs(body, assignments, terms)
    relay = Relay(body, legs, assignments[0].hosted.fingerprint)
    cold = await relay.hold()
    read = {
        place: leg.assignments[0].hosted.names(digests)
        for leg, digests in zip(legs, cold, strict=True)
        for place in leg.places
    }
    return [
        Choice(index, assignment, Generation(), None, body, read[index], relay)
        for index, assignment in enumerate(a for a in assignments for _ in range(body.n))
    ]


def _legs(body: RelayedBody, assignments: Sequence[Assignment], terms: Terms) -> list[Leg]:
    """The calls of a body: one per blend."""
    by_blend: dict[tuple[int, Blend], list[int]] = {}
    for number, assignment in enumerate(assignments):
        hosted = assignment.hosted
        if gate := hosted.gate(assignment.decision):
            hosted.engine.prepare_gate(gate)  # which refuses it
        blend = hosted.request((), assignment.decision, hosted.defaults).blend
        by_blend.setdefault((id(hosted.engine), blend), []).append(number)
    legs = []
    for (_, blend), numbers in by_blend.items():
        own = tuple(assignments[number] for number in numbers)
        engine = own[0].hosted.upstream
        assert engine is not None
        call = Call(
            path=CHAT_PATH if isinstance(body, RelayedChat) else TEXT_PATH,
            body=_body(body, numbers, is_all=len(numbers) == len(assignments), seed=own[0].seed),
            blend=blend,
            prompt_ids=own[0].prompt.token_ids,
            request_id=f"{terms.request_id}-{uuid4().hex[:8]}",  # a client may send one twice
            deadline=terms.deadline,
        )
        places = tuple(number * body.n + k for number in numbers for k in range(body.n))
        legs.append(Leg(engine, call, places, tuple(blend), own))
    return legs


def _body(body: RelayedBody, numbers: Sequence[int], *, is_all: bool, seed: int | None) -> Document:
    passed = passed_on(body)
    if seed is not None and passed.get("seed") is None:
        passed["seed"] = seed
    if is_all or not isinstance(body, RelayedText):
        return passed
    return {**passed, "prompt": [body.prompts[number] for number in numbers]}


def _placed(leg: Leg, choice: Document) -> Document:
    """A choice of one call as one of the whole answer.

    Raises:
        EngineError: it was not asked for.
    """
    if choice["index"] >= len(leg.places):
        raise EngineError(f"the vLLM server sent choice {choice['index']} of {len(leg.places)}")
    return {**choice, "index": leg.places[choice["index"]]}


def _follow(progress: Progress, choice: Document, *, is_whole: bool) -> None:
    """Take in what is told of one choice, by a chunk or at once."""
    said = choice.get("message" if is_whole else "delta") or {}
    text = choice.get("text") or said.get("content") or ""
    progress.text += text if isinstance(text, str) else ""
    is_something = text or said.get("tool_calls") or said.get("reasoning")
    ids = choice.get("token_ids")
    progress.completion_tokens += len(ids) if ids else bool(is_something)
    if is_something:
        progress.arrivals.append(time.perf_counter())
    if reason := choice.get("finish_reason"):
        progress.finish_reason = _REASONS.get(reason, reason)


def _account(leg: Leg, used: Document | None, progress: Sequence[Progress]) -> None:
    """Take in a leg's tokens, where the engine tells of them: what it counts is true."""
    if not used:
        return
    own = [progress[place] for place in leg.places]
    generated = int(used.get("completion_tokens") or 0)
    own[0].completion_tokens += generated - sum(one.completion_tokens for one in own)
    details = used.get("prompt_tokens_details") or {}
    cached, prompt = int(details.get("cached_tokens") or 0), int(used.get("prompt_tokens") or 0)
    for one in own:
        one.told_prompt_tokens = 0
    own[0].told_prompt_tokens = prompt
    own[0].choice.generation.cached_tokens = cached
    leg.engine.count(prompt=prompt, cached=cached, generated=generated)


def _fail(progress: Sequence[Progress], error: MergerouteError) -> None:
    reason = "timeout" if isinstance(error, EngineTimeoutError) else "error"
    for one in progress:
        one.finish_reason = one.finish_reason or reason


def _sum(usages: Sequence[Any]) -> Any:  # noqa: ANN401 - numbers by name, at any depth
    """Usages added up."""
    told = [used for used in usages if used is not None]
    if len(told) < 2:
        return told[0] if told else None
    if all(isinstance(used, dict) for used in told):
        names = dict.fromkeys(name for used in told for name in used)
        return {name: _sum([used.get(name) for used in told]) for name in names}
    return sum(used for used in told if isinstance(used, int | float))


def _line(document: Document) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
