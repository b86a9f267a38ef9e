"""An engine on fake servers: processes of ours, or servers of others in threads."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mergeroute.adapters.backbone import Backbone
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.calls import Call, Document
from mergeroute.runtime.vllm.engine import VllmEngine
from mergeroute.runtime.vllm.options import VllmOptions

from ...tiny import make_model, make_tokenizer
from .fake import Fake, upstream

_Result = TypeVar("_Result")
ROOT = Path(__file__).parents[3]
QUICK: dict[str, Any] = {
    "probe_s": 0.05,
    "silent_s": 0.4,
    "hung_s": 0.8,
    "start_s": 20,
    "again_s": 0.2,
    "grace_s": 0.5,
}


PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 6}
STREAM = {**BODY, "stream": True}


def write_backbone(folder: Path) -> Backbone:
    """A tiny checkpoint."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Backbone.open(folder)


def fake_command(folder: Path) -> str:
    """A program that takes the place of `vllm`."""
    program = folder / "vllm"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.runtime.vllm.fake "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


def make_engine(
    backbone: Backbone, servers: VllmOptions, *, options: EngineOptions | None = None
) -> VllmEngine:
    """Not started yet."""
    return VllmEngine(
        backbone.path,
        backbone.shapes,
        servers,
        dtype="float32",
        options=options or EngineOptions(),
    )


@contextmanager
def engine_on(
    backbone: Backbone, folder: Path, fakes: Sequence[Fake], **changes: Any
) -> Iterator[VllmEngine]:
    """An engine on servers of others, all of them ready. folder: of modules."""
    options = changes.pop("options", None)
    with ExitStack() as stack:
        urls = tuple(stack.enter_context(upstream(fake)) for fake in fakes)
        servers = VllmOptions(urls=urls, modules_folder=folder, **{**QUICK, **changes})
        engine = make_engine(backbone, servers, options=options)
        engine.start()
        try:
            wait_for(lambda: len(engine.replicas.ready) == len(fakes))
            yield engine
        finally:
            engine.stop()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} seconds"
        time.sleep(0.01)


def run(engine: VllmEngine, body: Document, **more: Any) -> Document | list[Document]:
    """A body's whole answer, or its chunks."""

    async def answered() -> Document | list[Document]:
        reply = await engine.forward(Call(PATH, body, **more))
        try:
            if reply.document is not None:
                return reply.document
            return [chunk async for chunk in reply.chunks()]
        finally:
            await reply.close()

    return asyncio.run(closing(engine, answered))


async def closing(engine: VllmEngine, work: Callable[[], Awaitable[_Result]]) -> _Result:
    """A loop that ends here closes its connections."""
    try:
        return await work()
    finally:
        for replica in engine.replicas:
            await replica.clients.here().aclose()
