"""Generations: prompts' tokens continued by servers, for callers that have no body to pass on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...adapters.errors import (
    EngineError,
    EngineStoppedError,
    EngineTimeoutError,
    MergerouteError,
    RequestError,
)
from ..engine import Generation
from ..types import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from .calls import Call, Document

if TYPE_CHECKING:
    from .engine import VllmEngine

_PATH = "/v1/completions"
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_LOOK_S = 0.2
"""How often a generation that waits for its server sees whether it is wanted still."""


class Generations:
    """Runs generations in an event loop of its own, which begins with the first."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, request: GenerationRequest) -> Generation:
        """Begin one; its events come from the loop's thread.

        Raises:
            RequestError: it asks for what only bodies can. EngineStoppedError: `stop` was called.
        """
        call = Call(_PATH, _body(request), request.blend, request.prompt_ids, "", request.deadline)
        generation = Generation()
        with self._lock:  # what is spawned before `stop` is ended by it
            loop = self._running()
            self._engine.replicas.begin_use(tuple(request.blend))
            loop.call_soon_threadsafe(self._spawn, generation, call)
        return generation

    def stop(self) -> None:
        """End all as cancelled."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            self._is_stopped = True
        if loop and thread:
            asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._is_stopped:
            raise EngineStoppedError("the engine has stopped: restart the server")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="mergeroute-generations", daemon=True
            )
            self._thread.start()
        return self._loop

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self._engine.replicas:
            await replica.clients.here().aclose()

    def _spawn(self, generation: Generation, call: Call) -> None:
        task = asyncio.get_running_loop().create_task(self._run(generation, call))
        watcher = asyncio.get_running_loop().create_task(_cancelled(generation, task))
        self._tasks |= {task, watcher}
        for each in (task, watcher):
            each.add_done_callback(self._tasks.discard)

    async def _run(self, generation: Generation, call: Call) -> None:
        reason, error = FinishReason.ERROR, ""
        try:
            await self._follow(generation, call)
            return
        except asyncio.CancelledError:
            reason = FinishReason.CANCELLED
        except EngineTimeoutError as late:
            reason, error = (FinishReason.TIMEOUT if call.is_late else reason), str(late)
        except MergerouteError as failure:
            error = str(failure)
        except Exception as failure:  # whatever it is, the generation ends
            error = f"{type(failure).__name__}: {failure}"
        finally:
            self._engine.replicas.end_use(tuple(call.blend))
        generation.deliver(TokenEvent(finish_reason=reason, error=error or None))

    async def _follow(self, generation: Generation, call: Call) -> None:
        reply = await self._engine.forward(call)
        try:
            count = 0
            reason: FinishReason | None = None
            usage: dict[str, Any] = {}
            async for chunk in reply.chunks():
                usage = chunk.get("usage") or usage
                for event in _events(chunk):
                    count += 1
                    reason = event.finish_reason or reason
                    generation.deliver(event)
            if reason is None:
                raise EngineError("the vLLM server ended a stream without saying why")
            details = usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or 0
            self._engine.count(prompt=len(call.prompt_ids), cached=cached, generated=count)
        finally:
            await reply.close()


async def _cancelled(generation: Generation, task: asyncio.Task[None]) -> None:
    while not task.done():
        if generation.is_cancelled:
            task.cancel()
        await asyncio.wait({task}, timeout=_LOOK_S)


def _body(request: GenerationRequest) -> dict[str, Any]:
    sampling = request.sampling
    if sampling.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs are for bodies that are passed to vLLM: leave it out",
            parameter="prompt_logprobs",
        )
    told = {name: getattr(sampling, name) for name in _SAMPLING}
    asked = {name: value for name, value in told.items() if value != getattr(_PLAIN, name)}
    return {
        **asked,
        "prompt": list(request.prompt_ids),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "logprobs": sampling.top_logprobs,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


_PLAIN = SamplingParams()
_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
)


def _events(chunk: Document) -> Iterator[TokenEvent]:
    """A chunk's tokens: its text comes with the last of them."""
    for choice in chunk["choices"]:
        ids = choice.get("token_ids") or []
        reason = _REASONS.get(choice.get("finish_reason") or "")
        scores = list(_scores(choice.get("logprobs"))) or [(None, ())] * len(ids)
        if not ids and (choice.get("text") or reason):
            yield TokenEvent(None, choice.get("text") or "", finish_reason=reason)
        for number, (token_id, (logprob, tops)) in enumerate(zip(ids, scores, strict=True)):
            is_last = number == len(ids) - 1
            text = choice.get("text") or "" if is_last else ""
            yield TokenEvent(token_id, text, logprob, tops, reason if is_last else None)


def _scores(
    logprobs: dict[str, Any] | None,
) -> Iterator[tuple[TokenLogprob | None, tuple[TokenLogprob, ...]]]:
    if logprobs is None:
        return
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
    ):
        best = sorted((top or {}).items(), key=lambda item: -item[1])
        yield _scored(token, logprob), tuple(_scored(name, value) for name, value in best)


def _scored(token: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(int(token.removeprefix("token_id:")), logprob)
