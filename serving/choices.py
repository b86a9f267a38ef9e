"""From assignments to running generations: all of a body's start, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..runtime.engine import Generation
from .assigning import Assignment
from .schemas.completions import GenerationBody
from .terms import NO_TERMS, Terms

if TYPE_CHECKING:
    from .relay.relays import Relay


@dataclass(frozen=True)
class Choice:
    """A running generation.

    index: its place in the response. top_logprobs: alternatives asked for; None: no logprobs.
    body: what it is a part of the answer to. cold: modules that had to be read for it.
    relay: what brings the whole answer, where the body is passed on as it is.
    """

    index: int
    assignment: Assignment
    generation: Generation
    top_logprobs: int | None
    body: GenerationBody
    cold: tuple[str, ...] = ()
    relay: Relay | None = None


async def start(
    body: GenerationBody, assignments: Sequence[Assignment], terms: Terms
) -> list[Choice]:
    """Start all choices, or none, each prompt's as soon as its modules are in memory.

    Raises:
        MergerouteError: a module cannot be read, or an engine refuses a choice.
    """
    tasks = [asyncio.ensure_future(_start_held(body, one, terms)) for one in assignments]
    try:
        started = await asyncio.gather(*tasks)
    except BaseException:
        await asyncio.shield(_end(tasks))  # to its end, even where this is cancelled once more
        raise
    choices = [choice for own in started for choice in own]
    return [replace(choice, index=index) for index, choice in enumerate(choices)]


async def _end(tasks: Sequence[asyncio.Task[list[Choice]]]) -> None:
    """Cancel what starts, and what has started."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(ended, BaseException):
            _cancel(ended)


async def _start_held(body: GenerationBody, assignment: Assignment, terms: Terms) -> list[Choice]:
    hosted, decision = assignment.hosted, assignment.decision
    async with hosted.residency.hold(hosted.needed(decision)) as cold:
        if gate := hosted.gate(decision):
            await asyncio.to_thread(hosted.engine.prepare_gate, gate)
        if cold and (grammar := assignment.form.grammar):  # others may have displaced it meanwhile
            await asyncio.to_thread(hosted.engine.prepare_grammar, grammar)
        choices = submit(body, [assignment], terms)
    return [replace(choice, cold=hosted.names(cold)) for choice in choices] if cold else choices


def submit(
    body: GenerationBody, assignments: Sequence[Assignment], terms: Terms = NO_TERMS
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


def _start(body: GenerationBody, assignment: Assignment, *, number: int, terms: Terms) -> Choice:
    """Submit choice `number` of a prompt."""
    hosted = assignment.hosted
    sampling = body.sampling(hosted.defaults, number)
    if sampling.seed is None and assignment.seed is not None:
        sampling = replace(sampling, seed=assignment.seed + number)
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


def _cancel(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.generation.cancel()
