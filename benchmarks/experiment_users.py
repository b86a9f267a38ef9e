"""Synthetic users of a server with an experiment: they ask, score what they get, ask again when the
server has died under them, and remember all that it acknowledged.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import openai

from mergeroute.routers.data import Example

MERGEROUTE = Path(sys.executable).parent / "mergeroute"
METRIC = "correct"
_PATIENCE_S = 120.0
_START_S = 180.0
_DRAIN_S = 20.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Crowd:
    """requests: most of one user; most users ask once. wrong: share of scores that are wrong.
    silent: share of answers that nobody scores. clients: users at a time.
    """

    users: int
    requests: int
    wrong: float = 0.1
    silent: float = 0.1
    clients: int = 12
    seed: int = 0


@dataclass
class Ledger:
    """What users know. delivered: the variant, by request id of an answer that began to arrive.
    acknowledged: scores, by request id. variants: all that a user met. right: answers that are
    right, whatever was scored. interrupted: requests that broke off.
    """

    delivered: dict[str, str] = field(default_factory=dict)
    acknowledged: dict[str, float] = field(default_factory=dict)
    variants: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    right: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    interrupted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def shares(self) -> dict[str, float]:
        """Of right answers, by variant."""
        return {variant: self.right[variant] / n for variant, n in sorted(self.answered.items())}


@dataclass(frozen=True)
class Lost:
    """What users know and the database does not."""

    exposures: list[str]
    feedback: list[str]


class Serving:
    """`mergeroute serve` in a process that may be killed and started again, on one port."""

    def __init__(self, banks: Sequence[Path], state: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--state", str(state), "--port", str(self.port), "--dtype", "float32"]
        self._command = [str(MERGEROUTE), "serve", *map(str, banks), *options]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def start(self) -> None:
        """Until it is ready."""
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            self._command, stderr=self._log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        until = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until:
            if re.search(r"ready: http://\S+/v1", self._printed()):
                return
            time.sleep(0.1)
        self._process.kill()
        raise RuntimeError(f"the server did not start: {self._printed()}")

    def kill(self) -> None:
        """As kill -9 does."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As an operator does."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=60)
        finally:
            self._process.kill()

    def command(self, *arguments: str) -> str:
        """What `mergeroute experiment` prints."""
        command = [str(MERGEROUTE), "experiment", *arguments, "--url", self.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _printed(self) -> str:
        self._log.seek(0)
        return self._log.read()


@dataclass(frozen=True)
class World:
    """What all users share. step: called after each request."""

    crowd: Crowd
    examples: Sequence[Example]
    ledger: Ledger
    step: Callable[[], None]


def live(url: str, model: str, world: World) -> None:
    """Let all users live."""
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(world.crowd.clients) as pool,
    ):
        names = [f"user-{number}" for number in range(world.crowd.users)]
        for life in [pool.submit(_live, name, client, model, world) for name in names]:
            life.result()


def _live(user: str, client: openai.OpenAI, model: str, world: World) -> None:
    """One user, whose doings depend on name and seed alone."""
    crowd, ledger = world.crowd, world.ledger
    chance = random.Random(f"{crowd.seed}-{user}")
    for _ in range(1 + int(crowd.requests * chance.random() ** 4)):
        example, is_streamed = chance.choice(world.examples), chance.random() < 0.5
        is_silent, is_mistaken = (chance.random() < each for each in (crowd.silent, crowd.wrong))
        ask = partial(_ask, client, model, user, example, ledger, is_streamed)
        request_id, is_right = _patiently(ask, ledger)
        if not is_silent:
            score = float(is_right is not is_mistaken)
            _patiently(partial(_give, client, request_id, score, ledger), ledger)
        world.step()


def _ask(
    client: openai.OpenAI, model: str, user: str, example: Example, ledger: Ledger, streams: bool
) -> tuple[str, bool]:
    """The request's id, and whether the answer is right."""
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": example.prompt}],
        user=user,
        temperature=0,
        max_tokens=64,
        stream=streams,
    )
    request_id = raw.headers["x-request-id"]
    variant = raw.headers["x-mergeroute-variant"]
    with ledger.lock:  # from here on the server must know of it, whatever comes
        ledger.delivered[request_id] = variant
        ledger.variants[user].add(variant)
    answer = raw.parse()
    if isinstance(answer, openai.Stream):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content or ""
    is_right = text.strip() == (example.answer or "").strip()
    with ledger.lock:
        ledger.answered[variant] += 1
        ledger.right[variant] += is_right
    return request_id, is_right


def _give(client: openai.OpenAI, request_id: str, score: float, ledger: Ledger) -> None:
    """Feedback; given again after a failure, it counts once."""
    body = {"request_id": request_id, "metric": METRIC, "value": score}
    headers = {"Idempotency-Key": f"{request_id}-{METRIC}"}
    client.post("/feedback", body=body, cast_to=object, options={"headers": headers})
    with ledger.lock:
        ledger.acknowledged[request_id] = score


def _patiently(do: Callable[[], _Result], ledger: Ledger) -> _Result:
    """Again and again, while the server is away."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return do()
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ != "ConnectError":  # it was reached, and broke off
                with ledger.lock:
                    ledger.interrupted += 1
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def lost(database: Path, ledger: Ledger) -> Lost:
    """What the database lacks, or has otherwise, when the server has had time to store the rest."""
    until = time.monotonic() + _DRAIN_S
    while (found := _lost(database, ledger)) != Lost([], []) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _lost(database: Path, ledger: Ledger) -> Lost:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        exposures = dict(
            connection.execute("SELECT request_id, variant FROM mergeroute_exposures").fetchall()
        )
        given = dict(
            connection.execute("SELECT request_id, value FROM mergeroute_feedback").fetchall()
        )
    return Lost(
        [each for each, variant in ledger.delivered.items() if exposures.get(each) != variant],
        [each for each, score in ledger.acknowledged.items() if given.get(each) != score],
    )


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
