"""What recording costs a request: exposure and outcome appended on the event loop's thread, while
another thread drains them into the database, waits for it, or catches up.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.journal import Journal
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.records import Exposure, Outcome
from mergeroute.serving.experiments.store import Store

from .machine import describe_machine

_EXPOSURE = Exposure(
    request_id="",
    experiment="merge",
    version=3,
    variant="routed",
    unit="5a1f0c" * 6,
    unit_kind="user",
    caller="app",
    at=1.7e9,
    is_forced=False,
    target="zoo",
    bank="sha256:" + "0" * 64,
    blend="roman=0.75,date=0.25",
)
_OUTCOME = Outcome("", 1.7e9, 812.5, 41.25, 57, 128, "stop", None, 200, 0.0, _EXPOSURE.blend)


@dataclass(frozen=True)
class Cost:
    """Microseconds of one request's two records. drained: records a second, meanwhile."""

    case: str
    p50: float
    p99: float
    worst: float
    drained: float | None = None


def pairs(run: str, count: int) -> list[tuple[Exposure, Outcome]]:
    """Records of so many requests."""
    names = [f"{run}-{number:032x}" for number in range(count)]
    return [(replace(_EXPOSURE, request_id=n), replace(_OUTCOME, request_id=n)) for n in names]


@contextmanager
def recorder_at(url: str, folder: Path) -> Iterator[Recorder]:
    """A recorder with a journal of its own."""
    journal = Journal(folder)
    with closing(Database(url)) as database:
        database.prepare()
        recorder = Recorder(journal, Store(database))
        try:
            yield recorder
        finally:
            recorder.close()
            journal.close()


def measure(case: str, recorder: Recorder, count: int, rate: float) -> Cost:
    """Record at a steady rate, in requests a second."""
    micros = []
    for exposure, outcome in track(pairs(case, count), case, console=Console(stderr=True)):
        time.sleep(1 / rate)
        start = time.perf_counter_ns()
        recorder.expose(exposure)
        recorder.finish(outcome)
        micros.append((time.perf_counter_ns() - start) / 1000)
    p50, p99 = np.percentile(micros, [50, 99])
    return Cost(case, float(p50), float(p99), max(micros))


def measure_all(url: str, folder: Path, count: int, rate: float, backlog: int) -> Iterator[Cost]:
    """With the database up; with it locked, where it is a file; and while it catches up."""
    with recorder_at(url, folder / "journal") as recorder:
        yield measure("the database is up", recorder, count, rate)
        file = url.removeprefix("sqlite:///")
        if file == url:
            return
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield measure("it is locked", recorder, count, rate)
            for exposure, outcome in pairs("backlog", backlog):
                recorder.expose(exposure)
                recorder.finish(outcome)
        waiting, start = recorder.status()["backlog"], time.perf_counter()
        cost = measure("it catches up", recorder, count, rate)
        drained = waiting + 2 * count - recorder.status()["backlog"]
        yield replace(cost, drained=drained / (time.perf_counter() - start))


def main(
    count: Annotated[int, typer.Option(min=100, help="requests, per case")] = 2000,
    rate: Annotated[float, typer.Option(min=1, help="requests a second")] = 200,
    backlog: Annotated[int, typer.Option(min=0, help="requests that wait for it")] = 50_000,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL; none: SQLite")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        url = database or f"sqlite:///{name}/experiments.sqlite"
        costs = list(measure_all(url, Path(name), count, rate, backlog))
    table = Table(title="recording of a request, microseconds")
    for column in ("case", "p50", "p99", "worst", "drained a second"):
        table.add_column(column, justify="right")
    for cost in costs:
        drained = "" if cost.drained is None else f"{cost.drained:,.0f}"
        table.add_row(cost.case, *(f"{v:.1f}" for v in (cost.p50, cost.p99, cost.worst)), drained)
    Console().print(table)
    machine = describe_machine()
    Console().print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if json_file:
        document = {"machine": machine, "rate": rate, "costs": [asdict(cost) for cost in costs]}
        json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
