"""What taking part in an experiment costs a request: on the server's event loop, and as its client
feels it.

The server runs in this process, so that its own code can be timed where it runs; the clients are in
another. Each asks for a target by its name and through an experiment, both variants of which are
that target, in turn and in changing order, so that drifts of the machine fall on both.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import uvicorn

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.access.guard import EVERYBODY
from mergeroute.serving.context import NO_CONTEXT, Context
from mergeroute.serving.experiments.enrolment import Enrolment
from mergeroute.serving.experiments.live import LiveExperiments
from mergeroute.serving.experiments.plan import Plan
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.schemas.completions import GenerationBody
from mergeroute.serving.server import bind, configuration
from mergeroute.serving.service import Service, ServiceOptions
from mergeroute.serving.telemetry.options import QUIET
from mergeroute.serving.telemetry.record import RequestRecord

TARGET = "zoo-base"
NAME = "trial"
BAR_US = 1000.0
"""Most that assignment and recording may cost, at the 99th percentile."""

_WARM = 20
_Result = TypeVar("_Result")


class Stopwatch:
    """Nanoseconds spent on each request, by its id: by the clock, and of the thread's own CPU time.
    All on one thread.
    """

    def __init__(self) -> None:
        self.wall: dict[str, int] = defaultdict(int)
        self.cpu: dict[str, int] = defaultdict(int)

    def time(self, request_id: str, work: Callable[[], _Result]) -> _Result:
        """Do some work for a request."""
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        try:
            return work()
        finally:
            self.cpu[request_id] += time.thread_time_ns() - cpu
            self.wall[request_id] += time.perf_counter_ns() - wall


class TimedExperiments(LiveExperiments):
    """Times what is recorded before an answer."""

    def __init__(self, folder: Path, watch: Stopwatch) -> None:
        super().__init__(None, folder)
        self._watch_of_requests = watch

    def expose(self, record: RequestRecord, enrolment: Enrolment, caller: str) -> None:
        self._watch_of_requests.time(
            record.request_id,
            lambda: super(TimedExperiments, self).expose(record, enrolment, caller),
        )


class TimedService(Service):
    """Times assignment, and what is recorded after an answer."""

    def __init__(self, hosted: Any, folder: StateFolder, experiments: TimedExperiments) -> None:
        super().__init__(hosted, ServiceOptions(), folder, experiments)
        self.watch = experiments._watch_of_requests

    def plan(self, body: GenerationBody, context: Context = NO_CONTEXT) -> Plan:
        return self.watch.time(
            context.request_id, lambda: super(TimedService, self).plan(body, context)
        )

    def finish(self, record: RequestRecord) -> None:
        self.watch.time(record.request_id, lambda: super(TimedService, self).finish(record))


@dataclass(frozen=True)
class Cost:
    """Of requests of a kind. Microseconds of the event loop: wall, by the clock, in which other
    threads and programs may run; cpu: of its thread alone. latency: milliseconds, at the client.
    """

    requests: int
    wall_us: dict[str, float]
    cpu_us: dict[str, float]
    latency_ms: dict[str, float]


@dataclass(frozen=True)
class Overhead:
    """direct: by the target's name. enrolled: through an experiment. difference_ms: median of the
    pairs' own, with the quartiles. stored: exposures that reached the database; rate: requests a
    second.
    """

    direct: Cost
    enrolled: Cost
    difference_ms: dict[str, float]
    stored: int
    rate: float
    bar_us: float = BAR_US


@dataclass(frozen=True)
class Asked:
    """One request, as its client saw it."""

    request_id: str
    model: str
    seconds: float


def measure_overhead(folder: Path, bank: Path, *, pairs: int, clients: int) -> Overhead:
    """Ask so many pairs of requests."""
    with serving(folder, bank) as (url, service):
        begin(url)
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawned) as pool:
            pool.submit(ask_all, url, _WARM, clients).result()
            start = time.perf_counter()
            asked = pool.submit(ask_all, url, pairs, clients).result()
            seconds = time.perf_counter() - start
        stored = _stored(service)
        watch = service.watch
    by_model = {m: [each for each in asked if each.model == m] for m in (TARGET, NAME)}
    direct, enrolled = by_model[TARGET], by_model[NAME]
    differences = [1000 * (b.seconds - a.seconds) for a, b in zip(direct, enrolled, strict=True)]
    return Overhead(
        _cost(direct, watch),
        _cost(enrolled, watch),
        _percentiles(differences, 25, 50, 75),
        stored,
        len(asked) / seconds,
    )


@contextmanager
def serving(folder: Path, bank: Path) -> Iterator[tuple[str, TimedService]]:
    """A bank, in a thread."""
    experiments = TimedExperiments(folder, Stopwatch())
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=16))
    service = TimedService(
        host_banks([Bank.open(bank)], placement), StateFolder(folder), experiments
    )
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(configuration(service, EVERYBODY, QUIET))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def begin(url: str) -> None:
    """An experiment whose variants are one target, with what a real one has beside."""
    document = {
        "name": NAME,
        "variants": [
            {"name": "a", "target": TARGET, "weight": 0.5, "control": True},
            {"name": "b", "target": TARGET, "weight": 0.5},
        ],
        "metrics": [{"name": "score", "kind": "binary", "direction": "up"}],
        "guardrails": [{"metric": "error", "max_increase": 0.02}],
    }
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        http.post("/v1/experiments", json=document).raise_for_status()
        http.post(f"/v1/experiments/{NAME}/start").raise_for_status()


def ask_all(url: str, pairs: int, clients: int) -> list[Asked]:
    """Pairs of requests, the direct one first in the list; in a process of its own."""
    return asyncio.run(_ask_all(url, pairs, clients))


async def _ask_all(url: str, pairs: int, clients: int) -> list[Asked]:
    numbers, found = iter(range(pairs)), []
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

        async def client() -> None:
            for number in numbers:
                order = (TARGET, NAME) if number % 2 else (NAME, TARGET)
                pair = {model: await _ask(http, model, number) for model in order}
                found.append((pair[TARGET], pair[NAME]))

        await asyncio.gather(*(client() for _ in range(clients)))
    return [each for pair in found for each in pair]


async def _ask(http: httpx.AsyncClient, model: str, number: int) -> Asked:
    body = {"model": model, "prompt": f"Item {number}:", "max_tokens": 4, "user": f"u{number}"}
    start = time.perf_counter()
    response = await http.post("/v1/completions", json={**body, "temperature": 0})
    seconds = time.perf_counter() - start
    response.raise_for_status()
    return Asked(response.headers["x-request-id"], model, seconds)


def _stored(service: TimedService) -> int:
    """Once the journal is empty."""
    assert service.experiments is not None
    while service.experiments.status()["backlog"]:
        time.sleep(0.05)
    return sum(service.experiments.store.unit_counts(NAME).by_variant.values())


def _cost(asked: list[Asked], watch: Stopwatch) -> Cost:
    ids = [each.request_id for each in asked]
    return Cost(
        len(asked),
        _percentiles([watch.wall[each] / 1000 for each in ids], 50, 99),
        _percentiles([watch.cpu[each] / 1000 for each in ids], 50, 99),
        _percentiles([1000 * each.seconds for each in asked], 50, 99),
    )


def _percentiles(values: list[float], *percents: int) -> dict[str, float]:
    return {
        f"p{percent}": float(value)
        for percent, value in zip(percents, np.percentile(values, percents), strict=True)
    }
