"""Following running generations: to the end, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from ..runtime.types import FinishReason, TokenEvent
from .choices import Choice
from .errors import ApiError, describe
from .responses.progress import Progress
from .responses.shape import Shape
from .terms import timed_out


async def events_of(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, TokenEvent]]:
    """Events of all choices as they come. Leaving early cancels what still runs."""
    merged: asyncio.Queue[tuple[Choice, TokenEvent]] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        async for event in choice.generation:
            merged.put_nowait((choice, event))

    tasks = [asyncio.create_task(follow(choice)) for choice in choices]
    running = len(choices)
    try:
        while running:
            choice, event = await merged.get()
            running -= event.finish_reason is not None
            yield choice, event
    finally:
        for choice in choices:
            choice.generation.cancel()
        for task in tasks:
            task.cancel()


async def collect(progress: Sequence[Progress]) -> None:
    """Wait for all choices to end.

    progress: one per choice, brought up to date.

    Raises:
        ApiError: the engine failed on a choice, or its time is up.
    """
    async with aclosing(events_of([p.choice for p in progress])) as events:
        async for choice, event in events:
            progress[choice.index].add(event)
            _raise_failure(event)


async def server_sent_events(
    progress: Sequence[Progress], shape: Shape, *, includes_usage: bool
) -> AsyncIterator[str]:
    """The stream's lines. What goes wrong after the first byte becomes an `error` event.

    progress: one per choice, kept up to date for whoever looks on.
    """
    choices = [p.choice for p in progress]
    try:
        for choice in choices:
            if opening := shape.opening(choice):
                yield _line(opening)
        async with aclosing(events_of(choices)) as events:
            async for choice, event in events:
                progress[choice.index].add(event)
                _raise_failure(event)
                if chunk := shape.chunk(choice, event):
                    yield _line(chunk)
        if includes_usage:
            yield _line(shape.closing(progress))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"event: error\n{_line(describe(error)[1])}"


def _raise_failure(event: TokenEvent) -> None:
    if event.finish_reason is FinishReason.ERROR:
        raise ApiError(event.error or "the engine failed", status=500, code="engine_failed")
    if event.finish_reason is FinishReason.TIMEOUT:
        raise timed_out()
    if event.finish_reason is FinishReason.CANCELLED:
        raise ApiError("the server is shutting down: try again", status=503, code="not_ready")


def _line(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
