"""Two vLLM servers under load, one of them killed: `python -m benchmarks.vllm_replicas`.

The gateway is `mergeroute serve` on the demo bank, started by the Python that runs this (make vllm:
.venv-vllm/bin/python). A third of the way through, the engine of one server is killed with SIGKILL,
in the middle of a step, while it holds several requests and streams that have begun. Every request
is told apart: answered; a stream that had begun and ended
with an error; refused or lost before its first byte, of which there must be none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from .machine import describe_machine

ROOT = Path(__file__).parents[1]
STARTS_WITHIN_S = 900
FILLS_WITHIN_S = 120
RECOVERS_WITHIN_S = 600
_READY = re.compile(r"ready: (http://\S+)/v1")
_FAILED = ("refused", "lost")
_FULL = 4
"""Requests that the server to be killed holds at the least."""


@dataclass(frozen=True)
class Ended:
    """One request. at: when it ended, seconds since the start. first_s: to its first byte."""

    at: float
    what: str
    first_s: float
    whole_s: float


@contextmanager
def gateway(bank: Path, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serve with two vLLM servers for the length of a block; the block gets URL and process."""
    command = [sys.executable, "-c", "from mergeroute.serving.cli import main; main()", "serve"]
    command += [str(bank), "--engine", "vllm", "--replicas", "2", "--dtype", "float32"]
    command += ["--port", "0", "--state", "none", "--vllm-option", "max_num_batched_tokens=512"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = folder / "gateway.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stderr=out, env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"}, cwd=ROOT
        )
    try:
        until = time.monotonic() + STARTS_WITHIN_S
        while not (found := _READY.search(log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the gateway did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield found[1], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def engines(process: psutil.Process) -> list[list[psutil.Process]]:
    """The processes of each server, deepest last."""
    return [keeper.children(recursive=True) for keeper in process.children()]


@dataclass
class Load:
    """What clients do, and how it ended for them. streaming: requests whose stream has begun."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)
    streaming: set[int] = field(default_factory=set)
    ended: list[Ended] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began


async def put_load(url: str, prompts: Sequence[str], workers: int, load: Load) -> None:
    """Requests without a pause from so many clients, three of four streamed."""
    limits = httpx.Limits(max_connections=workers)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            body = {
                "model": "auto",
                "messages": [{"role": "user", "content": prompts[number % len(prompts)]}],
                "max_tokens": 48,
                "ignore_eos": True,
                "stream": number % 4 != 0,
            }
            sent, first = time.monotonic(), 0.0
            text = ""
            try:
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for piece in answer.aiter_text():
                        first = first or time.monotonic() - sent
                        text += piece
                        if body["stream"]:
                            load.streaming.add(number)
                what = "answered" if answer.status_code == 200 else "refused"
                if what == "refused":
                    sys.stderr.write(f"{answer.status_code}: {text[:300]}\n")
                elif body["stream"] and not text.endswith("data: [DONE]\n\n"):
                    what = "broken off after its first byte"
            except httpx.HTTPError as error:
                sys.stderr.write(f"{error!r}\n")
                what = "lost"
            load.streaming.discard(number)
            load.ended.append(Ended(load.seconds, what, first, time.monotonic() - sent))

        async def worker(number: int) -> None:
            while not load.stop.is_set():
                await one(number)
                number += workers + 1

        await asyncio.gather(*(worker(number) for number in range(workers)))


async def wait_until_full(url: str, load: Load) -> list[float]:
    """Until the first server holds several requests, and a stream that has begun is one of them:
    more have begun than the other server holds requests. Returns the requests of each.
    """
    until = time.monotonic() + FILLS_WITHIN_S
    while time.monotonic() < until:
        on_each = [
            await _metric(url, "mergeroute_replica_requests{", replica=name)
            for name in ("vllm-0", "vllm-1")
        ]
        if on_each[0] >= _FULL and len(load.streaming) > on_each[1]:
            return on_each
        await asyncio.sleep(0.1)
    raise SystemExit(f"the first server never held {_FULL} requests and a stream of which we know")


async def run(url: str, process: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, a kill, and load until both servers work again, and as long as before."""
    lines = (ROOT / "examples" / "zoo" / "test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    load = Load()
    loading = asyncio.create_task(put_load(url, prompts, arguments.workers, load))
    await asyncio.sleep(arguments.seconds)
    victim = engines(process)[0][-1]
    name = victim.name()
    on_each = await wait_until_full(url, load)
    victim.kill()
    killed: dict[str, Any] = {
        "name": name,
        "at_s": round(load.seconds, 2),
        "requests_on_each": on_each,
        "streams_that_had_begun": len(load.streaming),
    }
    while await _metric(url, "mergeroute_replica_restarts_total{") < 1 or await _ready(url) < 2:
        if load.seconds > RECOVERS_WITHIN_S:
            raise SystemExit("it did not recover")
        await asyncio.sleep(0.5)
    back_at = load.seconds
    await asyncio.sleep(arguments.seconds)
    whole = load.seconds
    load.stop.set()
    await loading
    ended = load.ended
    phases = {
        "before": (0.0, killed["at_s"]),
        "one server": (killed["at_s"], back_at),
        "after": (back_at, whole),
    }
    return {
        "killed": killed,
        "recovered_after_s": round(back_at - killed["at_s"], 1),
        "requests": dict(Counter(one.what for one in ended)),
        "phases": {name: _phase(ended, *times) for name, times in phases.items()},
        "restarts": await _metric(url, "mergeroute_replica_restarts_total{"),
    }


def _phase(ended: Sequence[Ended], start: float, end: float) -> dict[str, Any]:
    own = [one for one in ended if start <= one.at < end]
    firsts = sorted(one.first_s for one in own if one.what == "answered")
    return {
        "seconds": round(end - start, 1),
        "requests": dict(Counter(one.what for one in own)),
        "answered_per_second": round(len(firsts) / (end - start), 2),
        "first_byte_s": {
            "median": round(statistics.median(firsts), 3),
            "p99": round(firsts[int(0.99 * (len(firsts) - 1))], 3),
            "most": round(firsts[-1], 3),
        },
    }


async def _ready(url: str) -> float:
    return await _metric(url, "mergeroute_replica_ready{")


async def _metric(url: str, name: str, *, replica: str = "") -> float:
    async with httpx.AsyncClient(timeout=60) as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(name) and replica in line
    )


def main() -> None:
    """Run it, print it, keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, default=ROOT / "serving" / "demo_bank")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30, help="before the kill, and after")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "vllm_replicas.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with gateway(arguments.bank, Path(folder)) as (url, process):
            started = set(process.children(recursive=True))
            found = asyncio.run(run(url, process, arguments))
            started |= set(process.children(recursive=True))  # those that took the place of others
        left = [one.pid for one in started if one.is_running()]
    command = f"python -m benchmarks.vllm_replicas --workers {arguments.workers}"
    command += f" --seconds {arguments.seconds:g}"
    document = {"command": command, **describe_machine(), **found, "processes_left": len(left)}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if any(found["requests"].get(what) for what in _FAILED) or left:
        sys.exit("a request was lost before its first byte, or a process was left behind")


if __name__ == "__main__":
    main()
