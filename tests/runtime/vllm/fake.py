"""A small server that speaks as vLLM does and can be told to fail: as a process it takes the place
of `vllm`, in a thread that of a server of others.

    python -m tests.runtime.vllm.fake serve BACKBONE --uds PATH ...

Its tokens are words that depend on model, prompt and place alone. `POST /fake {"fault": NAME,
"count": N}` spoils the next N completions.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mergeroute.adapters.errors import BlendError
from mergeroute.runtime.vllm.blends import read_name

SEPARATOR = "\u2028"  # a line to Python, not to server-sent events


@dataclass
class Fake:
    """What one server does. seen: bodies and headers that came. folder: of modules; None: any.
    loading: what goes wrong when a module is first asked for, 429 or hang.
    streams: that are open. aborted: those that were left before their end.
    """

    name: str = "backbone"
    folder: Path | None = None
    token_s: float = 0.0
    max_length: int = 256
    fault: str = ""
    count: int = 0
    loading: str = ""
    is_ill: bool = False
    is_silent: bool = False
    is_over: bool = False
    lacks: set[str] = field(default_factory=set)
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    streams: int = 0
    aborted: int = 0

    def reset(self) -> None:
        """As new, once nobody streams any more: a stream that was left ends a moment later."""
        deadline = time.monotonic() + 10
        while self.streams:
            assert time.monotonic() < deadline, "a stream was left open"
            time.sleep(0.01)
        self.fault, self.count, self.token_s, self.aborted = "", 0, 0.0, 0
        self.loading = ""
        self.is_ill = self.is_silent = False
        for kept in (self.lacks, self.seen, self.headers):
            kept.clear()

    def take_fault(self) -> str:
        """What is to go wrong with the next answer."""
        if self.count <= 0:
            return ""
        self.count -= 1
        return self.fault

    @property
    def app(self) -> Starlette:
        """The server's application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/openapi.json", self.openapi),
                Route("/fake", self.spoil, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    async def health(self, _: Request) -> Response:
        while self.is_silent:
            await asyncio.sleep(0.01)
        return Response(status_code=503 if self.is_ill else 200)

    async def models(self, _: Request) -> Response:
        entry = {"id": self.name, "object": "model", "max_model_len": self.max_length}
        return JSONResponse({"object": "list", "data": [entry]})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(_OPENAPI)

    async def spoil(self, request: Request) -> Response:
        for name, value in (await request.json()).items():
            setattr(self, name, value)
        return JSONResponse({})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if body.get("max_tokens") != 1 or body.get("prompt") != [0]:
            self.seen.append(body)
            self.headers.append(dict(request.headers))
        elif body["model"] != self.name:  # a module's first look
            while self.loading == "hang" and not self.is_over:
                await asyncio.sleep(0.01)
            if self.loading.isdigit():
                return _error(int(self.loading), "told to load nothing")
        if refusal := self.refusal(body):
            return refusal
        fault = self.take_fault() if self.seen and self.seen[-1] is body else ""
        if fault in ("500", "503", "429", "401"):
            return _error(int(fault), f"told to answer {fault}")
        if fault == "too long":
            return _error(400, "This model's maximum context length is 256 tokens.", "prompt")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            await self.pause(60)
        if fault == "html":
            return Response("<html>proxy</html>", media_type="text/html")
        if fault == "other":
            return JSONResponse({"hello": 1})
        answer = Answer(self, body, "chat" in request.url.path, fault)
        if body.get("stream"):
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        await self.pause(self.token_s * answer.count)
        return JSONResponse(answer.whole())

    async def pause(self, seconds: float) -> None:
        """It ends with the server."""
        until = time.monotonic() + seconds
        while not self.is_over and time.monotonic() < until:
            await asyncio.sleep(min(0.02, seconds))

    def refusal(self, body: dict[str, Any]) -> Response | None:
        model = body["model"]
        if model == self.name:
            return None
        try:
            keys = set(read_name(model))
        except BlendError as error:
            return _error(404, f"The model `{model}` does not exist: {error}", "model")
        there = set(os.listdir(self.folder)) if self.folder else keys
        if missing := sorted((keys - there) | (keys & self.lacks)):
            told = f"{model!r} names modules that are not registered: {', '.join(missing)}"
            return _error(404, told, "model")
        return None


@dataclass
class Answer:
    """One body's. fault: what goes wrong on the way."""

    fake: Fake
    body: dict[str, Any]
    is_chat: bool
    fault: str

    @property
    def count(self) -> int:
        """Tokens of each choice."""
        asked = self.body.get("max_tokens") or self.body.get("max_completion_tokens") or 16
        return int(asked)

    @property
    def prompts(self) -> list[Any]:
        """One by one."""
        given = self.body.get("prompt")
        if self.is_chat:
            return [self.body["messages"]]
        is_several = isinstance(given, list) and not isinstance((given or [0])[0], int)
        return list(given) if isinstance(given, list) and is_several else [given]

    def words(self, choice: int) -> list[str]:
        """The tokens of a choice: the same wherever and whenever they are asked for."""
        n = self.body.get("n") or 1
        said = json.dumps([self.body["model"], self.prompts[choice // n], choice % n])
        rng = hashlib.sha256(said.encode()).hexdigest()
        return [
            f"{rng[i % 60 : i % 60 + 3]}{SEPARATOR if i == 1 else ' '}" for i in range(self.count)
        ]

    @property
    def choices(self) -> range:
        """Their numbers."""
        return range(len(self.prompts) * (self.body.get("n") or 1))

    @property
    def usage(self) -> dict[str, Any]:
        """Of all choices."""
        prompt = sum(len(p) if isinstance(p, list) else 5 for p in self.prompts)
        total = self.count * len(self.choices)
        details = {"cached_tokens": 2}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": total,
            "total_tokens": prompt + total,
            "prompt_tokens_details": details,
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": "cmpl-1", "object": kind, "created": 1, "model": self.body["model"]}

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for number in self.choices:
            text = "".join(self.words(number))
            said = (
                {"message": {"role": "assistant", "content": text}}
                if self.is_chat
                else {"text": text}
            )
            choices.append({"index": number, **said, "logprobs": None, "finish_reason": "length"})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            **self.head(kind),
            "choices": {"empty": [], "fewer": choices[:-1]}.get(self.fault, choices),
            "usage": self.usage,
            "kv_transfer_params": None,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece; two choices take turns."""
        is_over = False
        self.fake.streams += 1
        try:
            for place in range(self.count * (self.fault != "empty")):
                await self.fake.pause(self.fake.token_s)
                if (broken := self.broken(place)) is not None:
                    yield broken
                    if self.fault in ("break", "end early", "die later"):
                        return
                for number in self.choices:
                    yield _event(self.chunk(number, place))
            if (self.body.get("stream_options") or {}).get("include_usage"):
                yield _event({**self.head(self.kind), "choices": [], "usage": self.usage})
            yield b"data: [DONE]\n\n"
            is_over = True
        finally:
            self.fake.aborted += not is_over
            self.fake.streams -= 1

    def broken(self, place: int) -> bytes | None:
        """What is sent in a chunk's place."""
        if place != 2:
            return None
        if self.fault == "die later":
            os.kill(os.getpid(), signal.SIGKILL)
        return {
            "break": b"",
            "end early": b"data: [DONE]\n\n",
            "garbage": b"data: {nonsense\n\n",
            "choices": _event({**self.head(self.kind), "choices": [{"text": "x"}]}),
            "usage": _event(
                {**self.head(self.kind), "choices": [], "usage": {"prompt_tokens": "x"}}
            ),
            "stranger": _event({**self.head(self.kind), "choices": [{"index": 99, "text": "x"}]}),
            "refusal": _event({"error": {"message": "told to refuse", "code": 400}}),
            "error event": _event({"error": {"message": "out of KV", "code": 500}}),
        }.get(self.fault)

    @property
    def kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def chunk(self, number: int, place: int) -> dict[str, Any]:
        word = self.words(number)[place]
        reason = "length" if place == self.count - 1 else None
        role = {"role": "assistant"} if place == 0 else {}
        said: dict[str, Any] = (
            {"delta": {**role, "content": word}} if self.is_chat else {"text": word}
        )
        ids = {"token_ids": [place + 1]} if self.body.get("return_token_ids") else {}
        choice = {"index": number, **said, "logprobs": None, "finish_reason": reason, **ids}
        return {**self.head(self.kind), "choices": [choice]}


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def _error(status: int, message: str, param: str | None = None) -> Response:
    told = {"message": message, "type": "Error", "param": param, "code": status}
    return JSONResponse({"error": told}, status_code=status)


_FIELDS = (
    "model messages prompt max_tokens max_completion_tokens temperature top_p n seed stop stream "
    "stream_options logprobs top_logprobs tools tool_choice response_format structured_outputs "
    "cache_salt user return_token_ids"
)
_OPENAPI: dict[str, Any] = {
    "paths": {
        path: {
            "post": {
                "requestBody": {
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Body"}}
                    }
                }
            }
        }
        for path in ("/v1/chat/completions", "/v1/completions")
    },
    "components": {"schemas": {"Body": {"properties": {name: {} for name in _FIELDS.split()}}}},
}


@contextmanager
def upstream(fake: Fake) -> Iterator[str]:
    """Serve in a thread for the length of a block; the block gets the URL."""
    server = uvicorn.Server(
        uvicorn.Config(
            fake.app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        fake.is_silent, fake.is_over = False, True
        server.should_exit = True
        thread.join()


def main(arguments: Sequence[str]) -> None:
    """As `vllm serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("path")
    parser.add_argument("--uds")
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--fail", action="store_true")
    asked, _ = parser.parse_known_args(arguments)
    print("starting with", *arguments, flush=True)  # noqa: T201 - its log
    if asked.fail:
        sys.exit("mergeroute: told to fail")
    time.sleep(asked.start_s)
    fake = Fake(
        name=asked.served_model_name,
        folder=Path(os.environ["MERGEROUTE_VLLM_MODULES"]),
        token_s=asked.token_s,
        max_length=asked.max_model_len,
    )
    uvicorn.run(fake.app, uds=asked.uds, log_config=None, access_log=False)


if __name__ == "__main__":
    main(sys.argv[1:])
