"""A server process, and clients of it: so many requests at once, each one's times."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

_MERGEROUTE = Path(sys.executable).parent / "mergeroute"
_PATIENCE_S = 600


@dataclass(frozen=True)
class Ask:
    """One request: what is named, the prompt, and how many tokens come back."""

    model: str
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """Seconds by `time.perf_counter`: when it was sent, and when each token came."""

    sent: float
    arrivals: tuple[float, ...]

    @property
    def first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        return self.arrivals[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Load:
    """What came of requests. cpu: seconds of the process that answered, on all its threads.
    seconds: from the first one sent to the last token.
    """

    answers: tuple[Answer, ...]
    cpu: float

    @property
    def seconds(self) -> float:
        return max(a.arrivals[-1] for a in self.answers) - min(a.sent for a in self.answers)

    @property
    def figures(self) -> dict[str, float]:
        """Requests and tokens a second; percentiles in milliseconds."""
        tokens = sum(len(answer.arrivals) for answer in self.answers)
        times = {
            "first_token": [answer.first_token for answer in self.answers],
            "between_tokens": [gap for answer in self.answers for gap in answer.gaps],
            "latency": [answer.latency for answer in self.answers],
        }
        return {
            "requests": len(self.answers),
            "requests_per_second": len(self.answers) / self.seconds,
            "tokens_per_second": tokens / self.seconds,
            **{
                f"{name}_p{percent}": 1e3 * percentile(values, percent)
                for name, values in times.items()
                for percent in (50, 99)
            },
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


class Server:
    """`mergeroute serve` on a free port for the length of a block. Its log goes to a file that is
    shown where it does not start.
    """

    def __init__(self, bank: Path, threads: int, *arguments: str) -> None:
        options = ["--port", "0", "--state", "none", *arguments]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [str(_MERGEROUTE), "serve", str(bank), *options],
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.url = ""

    def __enter__(self) -> Server:
        while self._process.poll() is None:
            if match := re.search(r"ready: (http://\S+)/v1", self._printed()):
                self.url = match[1]
                return self
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self._printed()}")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        finally:
            self._process.kill()
            self._log.close()

    def _printed(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def ask(self, asks: Sequence[Ask], *, clients: int) -> Load:
        """Streamed chats, so many at a time; each client sends its next when one has ended."""
        before = self._cpu()
        answers = asyncio.run(_ask_all(self.url, asks, clients))
        return Load(answers, self._cpu() - before)

    def _cpu(self) -> float:
        """Seconds since its start. Linux only."""
        stat = Path("/proc", str(self._process.pid), "stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def cold_loads(self) -> int:
        """Modules that were read from disk for requests, since the start."""
        listed = httpx.get(f"{self.url}/v1/modules", timeout=60).json()["data"]
        return sum(module["cold_loads"] for module in listed)


async def _ask_all(url: str, asks: Sequence[Ask], clients: int) -> tuple[Answer, ...]:
    left = iter(asks)
    answers: list[Answer] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limits) as http:

        async def client() -> None:
            for ask in left:
                answers.append(await _answer(http, ask))

        await asyncio.gather(*(client() for _ in range(clients)))
    return tuple(answers)


async def _answer(http: httpx.AsyncClient, ask: Ask) -> Answer:
    body: dict[str, Any] = {
        "model": ask.model,
        "messages": [{"role": "user", "content": ask.prompt}],
        "max_tokens": ask.tokens,
        "temperature": 0,
        "stream": True,
    }
    sent, arrivals = time.perf_counter(), []
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{ask.model}: {response.status_code} {response.text}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    arrivals.append(time.perf_counter())
    if len(arrivals) != ask.tokens:
        raise RuntimeError(f"{ask.model}: {len(arrivals)} tokens came, {ask.tokens} were asked for")
    return Answer(sent, tuple(arrivals))
