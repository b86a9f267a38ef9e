"""The Engine protocol, and the handle a caller follows a generation with."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..adapters.lora import Module
from .options import EngineOptions
from .residents import Modules
from .types import GenerationRequest, Grammar, ScoredToken, TokenEvent, TokenGate


class Generation:
    """A running generation: iterate over its events, in a thread or in asyncio, from one place.

    cached_tokens: prompt tokens whose keys and values were reused; known at the first event.
    prompt_scores: of each prompt token but the first, where asked for; known at the first event.
    submitted_at, admitted_at: by `time.perf_counter`; None: no slot was given to it yet.
    """

    def __init__(self) -> None:
        self.cached_tokens = 0
        self.prompt_scores: list[ScoredToken] = []
        self.submitted_at = time.perf_counter()
        self.admitted_at: float | None = None
        self._is_over = False
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()

    def cancel(self) -> None:
        """Ask the engine to stop; the last event is delivered all the same."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def deliver(self, event: TokenEvent) -> None:
        """Called by the engine, from its own thread."""
        self._events.put(event)
        if self._loop is not None:
            with suppress(RuntimeError):  # the consumer's loop was closed: nobody waits
                self._loop.call_soon_threadsafe(self._arrived.set)

    def __iter__(self) -> Iterator[TokenEvent]:
        while not self._is_over:
            event = self._events.get()
            self._is_over = event.finish_reason is not None
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        self._loop = asyncio.get_running_loop()
        while not self._is_over:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                self._arrived.clear()
                if self._events.empty():
                    await self._arrived.wait()
                continue
            self._is_over = event.finish_reason is not None
            yield event


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the load of this moment.

    rows: requests in all steps, each once a step. admitted: requests that got a slot, reused: of
    them, those that found a part of their prompt computed. slots: most requests in the batch.
    silent_s: since the engine's loop last came round: the time of the step that it is in, or half a
    second at most when it is idle.
    """

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    running: int = 0
    waiting: int = 0
    modules: int = 0
    silent_s: float = 0.0
    rows: int = 0
    admitted: int = 0
    reused: int = 0
    slots: int = 0


class Engine(Protocol):
    """Blend and request in, tokens out.

    options: its limits. tokenizer: the backbone's; None: there is none. vocabulary: how many token
    ids there are. width: of hidden states.
    """

    options: EngineOptions
    tokenizer: Any

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""

    @property
    def width(self) -> int:
        """Of hidden states."""

    @property
    def modules(self) -> Modules:
        """What is loaded, as a residency sees it."""

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together."""

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot run, before anything is spent on it; the blend is not looked
        at.

        Raises:
            ContextLengthError, RequestError: as `submit`.
        """

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request into the running batch.

        Raises:
            ContextLengthError: prompt, or prompt plus `max_tokens`, is over `max_length`.
            RequestError: another fault of the request; a module that cannot be weighed by token.
            UnknownModuleError: the blend or the gate names a digest that is not loaded.
            QueueFullError: too many requests wait.
            EngineStoppedError: the engine was stopped.
        """

    def prepare_gate(self, gate: TokenGate) -> None:
        """Compute what a gate needs of its modules, in the caller's thread and once: seconds on a
        large model. Where it was not called, `submit` does it, and takes the longer.

        Raises:
            RequestError, UnknownModuleError, EngineStoppedError: as `submit`.
        """

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar in the caller's thread, and keep it: seconds on a large one. Where it
        was not called, `submit` does it, and takes the longer.

        Raises:
            RequestError: the grammar is at fault, or the tokenizer cannot be constrained.
        """

    def load_module(self, module: Module) -> str:
        """Make a module resident while requests run; returns its digest. Loads are counted.

        Raises:
            ModuleError: it does not fit the backbone.
        """

    def unload_module(self, digest: str) -> None:
        """Undo one load. Requests that run on the module keep it until they end.

        Raises:
            UnknownModuleError: no such module is loaded.
        """

    def encode(self, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], /) -> list[Tensor]:
        """Hidden states of prompts after the layers asked for, counted from 1, before any final
        norm: [layers, t, hidden] a prompt, float32, of the backbone without modules.

        Raises:
            RouterError: the backbone has no such layer.
        """

    def embed(self, prompts: Sequence[tuple[int, ...]], /) -> Tensor:
        """Mean hidden states of prompts after the backbone's final norm, [n, width], float32.

        Raises:
            RequestError: the engine has not got all layers at hand.
        """

    def stats(self) -> EngineStats:
        """Counters and load."""

    def modules_asked(self) -> tuple[frozenset[str], frozenset[str]]:
        """Digests of the modules of running requests, and of those that wait for a slot."""

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""

    def ailment(self, watchdog_s: float) -> str | None:
        """Why it cannot be relied on now; None: it can. watchdog_s: how long a step may take."""

    def stop(self) -> None:
        """End every generation and free what the engine holds."""
