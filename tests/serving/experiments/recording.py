"""A recorder over a store, and what it recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.journal import Journal
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.sums import UnitCounts

from .recorded import (
    exposure,
    feedback,
    outcome,
    shadow_pair,
    shadow_pairs_of,
    stored_request,
)
from .shapes import experiment

SLOWEST_S = 0.25
"""Most that recording may take while the database does not answer: it takes some 20 us where the
machine has nothing else to do, and the database would be waited for ten times as long.
"""


@contextmanager
def recording(folder: Path, store: Store, **given: Any) -> Iterator[Recorder]:
    """A recorder with a journal in a folder."""
    journal = Journal(folder, **given)
    recorder = Recorder(journal, store)
    try:
        yield recorder
    finally:
        recorder.close()
        journal.close()


@contextmanager
def sqlite_store(folder: Path) -> Iterator[Store]:
    """A store in a file, with the experiment that records are of."""
    with closing(Database(f"sqlite:///{folder}/experiments.sqlite")) as database:
        store = Store(database)
        with store.changing() as experiments:
            experiments.create(experiment(), who="ann")
        yield store


def wait_for(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def drained(recorder: Recorder) -> None:
    """Wait until the database has all."""
    wait_for(lambda: recorder.status()["backlog"] == 0)


def down(recorder: Recorder, told: str) -> None:
    """Wait until the status tells why nothing is stored."""
    wait_for(lambda: told in str(recorder.status()["last_error"]))
    assert recorder.status()["database"] == "down"


def record_all(recorder: Recorder, request_id: str) -> None:
    """One record of each kind, none of which takes long."""
    began = time.perf_counter()
    recorder.expose(exposure(request_id))
    recorder.finish(outcome(request_id))
    assert asyncio.run(recorder.find(request_id)) == exposure(request_id)
    assert asyncio.run(recorder.feedback(feedback(request_id)))
    recorder.shadow(shadow_pair(request_id))
    recorder.keep(stored_request(request_id))
    assert time.perf_counter() - began < 6 * SLOWEST_S


def all_stored(store: Store, *names: str) -> None:
    """Everything that `record_all` recorded, once."""
    assert store.unit_counts("ties") == UnitCounts({"control": len(names)}, 0)
    for metric in ("latency_ms", "score"):
        assert store.sums("ties", metric)["control"].n == len(names)
    for name in names:
        assert store.find_exposure(name) == exposure(name)
        assert store.find_request(name) == stored_request(name)
    assert len(shadow_pairs_of(store, "ties")) == len(names)
