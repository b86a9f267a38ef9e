"""Calls: bodies on their way to a server, and answers on their way back.

A call is tried on another server as long as nothing of an answer was passed on. One that a server
had accepted is tried only once more: it may be what brought the server down.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from ...adapters.blend import Blend
from ...adapters.errors import (
    EngineError,
    EngineStoppedError,
    EngineTimeoutError,
    MergerouteError,
    ModuleUnavailableError,
)
from .affinity import Affinity
from .blends import lora_name, module_key
from .events import data_of
from .refusals import Refusal
from .replicas import Lease, Replica, ReplicaLostError, Replicas

_MOST_DELIVERIES = 2
_MOST_BYTES = 256 << 20
_DONE = b"[DONE]"
_BACKBONE = "backbone"
_BLEND = re.compile(r"blend:\S*")

Document = dict[str, Any]


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for, in seconds; see `VllmOptions`."""

    first_s: float
    next_s: float
    whole_s: float


@dataclass(frozen=True)
class Call:
    """A body for a server.

    path: the route. body: without a model. blend: weights by module digest. prompt_ids: what is
    looked for in the prefix cache. request_id: for the server's log. deadline: as of the request.
    """

    path: str
    body: Mapping[str, Any]
    blend: Blend = field(default_factory=Blend)
    prompt_ids: tuple[int, ...] = ()
    request_id: str = ""
    deadline: float | None = None

    @property
    def model(self) -> str:
        """What the modules are asked for by; empty where the backbone alone answers."""
        return lora_name(self.blend) if self.blend else ""

    @property
    def streams(self) -> bool:
        """Whether the answer comes in chunks."""
        return bool(self.body.get("stream"))

    def within(self, seconds: float) -> float:
        """At most so long, and no longer than the deadline."""
        if self.deadline is None:
            return seconds
        return min(seconds, max(0.0, self.deadline - time.monotonic()))

    @property
    def is_late(self) -> bool:
        """Whether the request's own time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class _Elsewhere(Exception):
    """A server did not answer, and another may. was_accepted: it may have worked on the call."""

    def __init__(self, error: MergerouteError, *, was_accepted: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.was_accepted = was_accepted


class Reply:
    """An answer that has begun. Close it, whatever becomes of it.

    replica: who answers. document: the whole answer, where it is not streamed; else None, and
    `chunks` holds its chunks.
    """

    def __init__(
        self,
        call: Call,
        lease: Lease,
        replicas: Replicas,
        patience: Patience,
    ) -> None:
        self.replica = lease.replica
        self.document: Document | None = None
        self._first: Document | None = None
        self._call = call
        self._lease = lease
        self._replicas = replicas
        self._patience = patience
        self._response: httpx.Response | None = None
        self._events: AsyncGenerator[bytes] | None = None
        self._is_closed = False

    async def chunks(self) -> AsyncGenerator[Document]:
        """All chunks of a stream.

        Raises:
            EngineError: the server failed, or sent what is no chunk.
            EngineTimeoutError: the next chunk did not come in time.
        """
        chunk = self._first
        try:
            while chunk is not None:
                yield chunk
                chunk = await self._next(self._patience.next_s)
            self._replicas.succeeded(self._lease)
        except _Refused as refused:
            if refused.refusal.is_of_the_server:  # else any client could have it put to rest
                self._replicas.failed(self._lease)
            raise refused.refusal.error from refused
        except (httpx.HTTPError, ReplicaLostError) as error:
            self._replicas.failed(self._lease)
            raise EngineError("the vLLM server broke off its answer") from error
        except EngineError:
            if not self._call.is_late:
                self._replicas.failed(self._lease)
            raise

    def close(self) -> asyncio.Task[None]:
        """Let go of the server; it stops working on what has not ended. Connections may be waited
        for to be given back.
        """
        if not self._is_closed:
            self._is_closed = True
            self._replicas.leave(self._lease)
        return self.replica.clients.finish(self._hang_up())

    async def _hang_up(self) -> None:
        for open_end in (self._events, self._response):
            with suppress(httpx.HTTPError, RuntimeError):
                if open_end is not None:
                    await open_end.aclose()

    async def begin(self) -> None:
        """Send the call; returns once the whole answer or its first chunk is here.

        Raises:
            _Elsewhere: another server may do it.
            MergerouteError: none will.
        """
        try:
            await self._send()
            if self.document is None:
                self._replicas.began(self._lease)
            else:
                self._replicas.succeeded(self._lease)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._replicas.failed(self._lease)
            raise _not_there(self.replica, was_accepted=False) from error
        except (httpx.HTTPError, ReplicaLostError) as error:
            self._replicas.failed(self._lease)
            raise _not_there(self.replica, was_accepted=True) from error
        except EngineTimeoutError as error:
            if self._call.is_late:
                raise
            self._replicas.failed(self._lease)
            raise _Elsewhere(error, was_accepted=True) from error
        except _Refused as refused:
            self._refused(refused.refusal)
        except EngineError as error:
            self._replicas.failed(self._lease)
            raise _Elsewhere(error, was_accepted=True) from error

    async def _send(self) -> None:
        call, patience = self._call, self._patience
        client = self.replica.clients.here()
        request = client.build_request(
            "POST",
            call.path,
            json={**call.body, "model": call.model or self._backbone},
            headers={"x-request-id": call.request_id} if call.request_id else None,
        )
        seconds = call.within(patience.first_s if call.streams else patience.whole_s)
        self._response = await self._lease.wait(client.send(request, stream=True), seconds)
        status = self._response.status_code
        if status >= 400:
            content = await self._lease.wait(_whole(self._response), seconds)
            raise _Refused(Refusal.read(status, content))
        if not call.streams:
            content = await self._lease.wait(_whole(self._response), call.within(patience.whole_s))
            self.document = _parsed(content)
            if not self.document["choices"]:
                raise EngineError("the vLLM server sent an answer without choices")
            return
        self._events = data_of(self._response.aiter_bytes())
        self._first = await self._next(patience.first_s)
        if self._first is None:
            raise EngineError("the vLLM server sent an empty stream")

    async def _next(self, seconds: float) -> Document | None:
        """The next chunk; None after the last.

        Raises:
            EngineError: it is none, or the stream broke off.
        """
        assert self._events is not None
        try:
            data = await self._lease.wait(anext(self._events), self._call.within(seconds))
        except StopAsyncIteration:
            raise EngineError("the vLLM server broke off its answer") from None
        return None if data == _DONE else _parsed(data)

    @property
    def _backbone(self) -> str:
        return self.replica.served.model if self.replica.served else _BACKBONE

    def _refused(self, refusal: Refusal) -> None:
        if refusal.is_of_a_module and self._call.blend:
            asked = tuple(self._call.blend)
            told = _BLEND.sub("", refusal.message)  # which names them all
            named = [module for module in asked if module_key(module) in told]
            self._replicas.lacks(self.replica, named or asked, refusal.message)
            raise _Elsewhere(refusal.error, was_accepted=False)
        if refusal.is_of_the_request:
            self._replicas.succeeded(self._lease)
            raise refusal.error
        if refusal.is_of_the_server:
            self._replicas.failed(self._lease)
        raise _Elsewhere(refusal.error, was_accepted=refusal.status >= 500)


class _Refused(Exception):
    """A server answered with an error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


async def send(call: Call, replicas: Replicas, patience: Patience) -> Reply:
    """Send a call to a server, and to another one where that does not answer. Close the reply.

    Raises:
        RequestError, ContextLengthError: the request is at fault.
        EngineStoppedError: no server is ready.
        ModuleUnavailableError: none that is serves the blend.
        QueueFullError: they are full.
        EngineTimeoutError: they took too long.
        EngineError: they failed.
    """
    affinity = Affinity.of(call.model, call.prompt_ids)
    tried: list[Replica] = []
    deliveries = 0
    last: _Elsewhere | None = None
    while deliveries < _MOST_DELIVERIES:
        try:
            lease = replicas.take(affinity, tuple(call.blend), avoiding=tried)
        except (EngineStoppedError, ModuleUnavailableError) as error:
            raise (last.error if last else error) from last
        reply = Reply(call, lease, replicas, patience)
        try:
            await reply.begin()
            return reply
        except _Elsewhere as failure:
            last = failure
            deliveries += failure.was_accepted
            tried.append(reply.replica)
            await reply.close()
        except BaseException:
            await reply.close()
            raise
    assert last is not None
    raise last.error from last


async def _whole(response: httpx.Response) -> bytes:
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _MOST_BYTES:
            raise EngineError(f"the vLLM server sent over {_MOST_BYTES:,} bytes")
    return bytes(content)


def _parsed(content: bytes) -> Document:
    """A whole answer, or one chunk.

    Raises:
        EngineError: it is nonsense. _Refused: it tells of an error.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EngineError("the vLLM server sent what is no JSON") from error
    if isinstance(document, dict) and "error" in document:
        raise _Refused(Refusal.of(document))
    if not (isinstance(document, dict) and isinstance(document.get("choices"), list)):
        raise EngineError("the vLLM server sent an answer without choices")
    if not (all(map(_is_choice, document["choices"])) and _is_usage(document.get("usage"))):
        raise EngineError("the vLLM server sent choices or a usage that are none")
    return document


def _is_choice(value: object) -> bool:
    """Whether what is read of a choice, whole or a piece of it, is as vLLM writes it."""
    if not isinstance(value, dict):
        return False
    said = [value.get(name) or {} for name in ("message", "delta")]
    texts = [value.get(name) or "" for name in ("text", "finish_reason")]
    return (
        type(value.get("index")) is int
        and value["index"] >= 0
        and all(isinstance(one, dict) for one in said)
        and all(isinstance(one, str) for one in texts)
        and isinstance(value.get("token_ids") or [], list)
    )


def _is_usage(value: object) -> bool:
    """Whether tokens are counted by whole numbers, or not at all."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    details = value.get("prompt_tokens_details") or {}
    counts = [value.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    counts += [details.get("cached_tokens") or 0] if isinstance(details, dict) else [None]
    return all(type(count) is int for count in counts)


def _not_there(replica: Replica, *, was_accepted: bool) -> _Elsewhere:
    error = EngineStoppedError(f"the vLLM server {replica.name} does not answer: try again later")
    return _Elsewhere(error, was_accepted=was_accepted)
