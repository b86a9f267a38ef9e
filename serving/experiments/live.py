"""The experiments of a running server: what requests read, and where what became of them goes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...adapters.errors import MergerouteError
from ..context import Context
from ..schemas.completions import GenerationBody
from .database import Database, DatabaseDownError
from .enrolment import Enrolment
from .experiment_store import Experiments
from .journal import Journal
from .keeping import stored_of
from .observing import exposure_of, outcome_of
from .plan import Plan
from .planning import plan_of
from .recorder import Recorder
from .snapshots import Snapshot, read_snapshot, snapshot_of, write_snapshot
from .store import Store

if TYPE_CHECKING:
    from ..targets import Targets
    from ..telemetry.record import RequestRecord
    from .definition import Variant
    from .enrolment import Running

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
SNAPSHOT_FILE = "experiments.json"
_DATABASE_FILE = "experiments.sqlite"
_JOURNAL_FOLDER = "journal"
_THREADS = 4
"""That wait for the database where clients ask for experiments, see `LiveExperiments.ask`."""

_Found = TypeVar("_Found")


class LiveExperiments:
    """Experiments and their records. The snapshot is renewed every second, so that the changes of
    other servers on the database are seen; while the database is down the last one holds.

    database: None: a SQLite file in the folder. folder: where journal and snapshot are kept.
    feedback_counts: by experiment and metric, pauses: by guardrails, shadow_counts: by experiment
    and what became of them; all since the start.

    Raises:
        SettingsError: the database or the folder cannot be used, or has a newer schema.
    """

    def __init__(self, database: str | None, folder: Path) -> None:
        self._database = Database(database or f"sqlite:///{folder.absolute() / _DATABASE_FILE}")
        self._file = folder / SNAPSHOT_FILE
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._asking = ThreadPoolExecutor(_THREADS, thread_name_prefix="experiment-asking")
        self._waiting: deque[Callable[[], None]] = deque()
        self._unreachable: str | None = None
        self._secret = ""  # of the database, once it was asked: the snapshot's may be another's
        self.store = Store(self._database)
        self.feedback_counts: Counter[tuple[str, str]] = Counter()
        self.pauses: Counter[str] = Counter()
        self.shadow_counts: Counter[tuple[str, str]] = Counter()
        self.snapshot = self._kept()
        journal = Journal(folder / _JOURNAL_FOLDER)
        self._journal = journal
        try:
            self._database.prepare()
            self.refresh()
        except DatabaseDownError as error:
            self._unreachable = str(error)
            logger.warning("experiments go on as they were last known: %s", error)
        except BaseException:
            journal.close()
            self._database.close()
            raise
        self.recorder = Recorder(journal, self.store, is_shared=database is not None)

    def plan(self, body: GenerationBody, context: Context) -> Plan:
        """What experiments make of a request; nothing is recorded.

        Raises:
            ApiError: it asks for an experiment in a way that it cannot be asked for.
        """
        return plan_of(body, context, self.snapshot)

    def expose(self, record: RequestRecord, enrolment: Enrolment, caller: str) -> None:
        """A request is about to be answered. caller: name of its key."""
        if enrolment.is_exposed:
            self.recorder.expose(exposure_of(record, enrolment, caller))

    def finish(self, record: RequestRecord) -> None:
        """A request that was exposed is over."""
        if record.enrolment and record.enrolment.is_exposed:
            self.recorder.finish(outcome_of(record))
            running = self.snapshot.by_name.get(record.enrolment.experiment)
            if running and running.experiment.store_requests and (stored := stored_of(record)):
                self.recorder.keep(stored)

    def refresh(self) -> None:
        """Read what the database holds now. It waits for the database.

        Raises:
            DatabaseDownError: it does not answer.
            MergerouteError: it holds what cannot be read.
        """
        with self._lock:
            try:
                with self.store.reading() as experiments:
                    stored, default = experiments.list(), experiments.default_target()
                self._secret = self._secret or self.store.secret()
            except MergerouteError as error:  # it is down, or holds what cannot be read
                if self._unreachable is None:
                    logger.warning("experiments go on as they were last known: %s", error)
                self._unreachable = str(error)
                raise
            self._unreachable = None
            found = snapshot_of(stored, default, self._secret)
            if found.mark != self.snapshot.mark:
                self.snapshot = found
                self._keep(found)

    async def ask(self, question: Callable[[], _Found]) -> _Found:
        """What the database says, waited for in threads of its own: those that route requests are
        not for a database that is slow.
        """
        return await asyncio.get_running_loop().run_in_executor(self._asking, question)

    @contextmanager
    def changing(self) -> Iterator[Experiments]:
        """As `Store.changing`; requests see what was changed as soon as the block has ended."""
        with self.store.changing() as experiments:
            yield experiments
        with suppress(MergerouteError):  # it is done: the next look sees it
            self.refresh()

    def watch(self, look: Callable[[], None]) -> None:
        """Refresh every second, and then look."""
        self._watcher = threading.Thread(
            target=self._watch, args=(look,), name="mergeroute-experiments", daemon=True
        )
        self._watcher.start()

    def later(self, change: Callable[[], None]) -> None:
        """Make a change as soon as the database answers: it is tried every second."""
        self._waiting.append(change)

    def status(self) -> dict[str, Any]:
        """As `Recorder.status`; down is also a database that cannot be read."""
        told = self.recorder.status()
        if self._unreachable is not None:
            told |= {"database": "down", "last_error": self._unreachable}
        return told

    def warnings(self, targets: Targets) -> list[str]:
        """What is not as it should be, though requests are answered."""
        found, status = [], self.status()
        default = self.snapshot.default
        if default is not None and not is_there(targets, default.target):
            found.append(f"the promoted target {default.target!r} is gone: the default answers")
        found += self._clashing(targets) + self._broken(targets)
        if status["database"] != "up":
            found.append("the database of experiments is down: the log says why")
        if status["dropped"]:
            found.append(f"{status['dropped']:,} records of experiments were dropped")
        if status["repeated"]:
            found.append(
                f"{status['repeated']:,} requests had the x-request-id of an earlier one and count "
                "in no experiment: send none, or a new one with each request"
            )
        return found

    def close(self) -> None:
        """Bring what was recorded into the database, as far as it can be done now."""
        self._closing.set()
        if self._watcher:
            self._watcher.join()
        self._asking.shutdown(cancel_futures=True)
        self.recorder.close()
        self._journal.close()
        self._database.close()

    def _clashing(self, targets: Targets) -> list[str]:
        """Experiments that were there before something else got their name."""
        return [
            f"the experiment {name!r} answers for the bank, module or backbone of its name: "
            "conclude and delete it, or rename the other"
            for name in self.snapshot.by_name
            if targets.is_known(name)
        ]

    def _broken(self, targets: Targets) -> list[str]:
        """Experiments that run and that this server cannot answer in full."""
        return [
            f"the experiment {each.experiment.name!r} runs, and {variant.target!r}, which "
            f"{variant.name} answers from, is not on this server: its users get 503"
            for each in self.snapshot.experiments
            if each.state == "running"
            for variant in missing(each, targets)
        ]

    def _watch(self, look: Callable[[], None]) -> None:
        while not self._closing.wait(REFRESH_S):
            try:
                self.refresh()
                while self._waiting:
                    self._waiting[0]()
                    self._waiting.popleft()
                look()
            except MergerouteError as error:  # told of by status, and tried again
                logger.debug("experiments were not looked at: %s", error)
            except Exception:
                logger.exception("experiments were not looked at")

    def _kept(self) -> Snapshot:
        """As it was last known here."""
        try:
            return read_snapshot(self._file)
        except (OSError, ValueError, KeyError, TypeError, MergerouteError) as error:
            logger.warning("%s cannot be read (%s): it is made anew", self._file, error)
            return Snapshot()

    def _keep(self, snapshot: Snapshot) -> None:
        try:
            write_snapshot(self._file, snapshot)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error.strerror)


def missing(running: Running, targets: Targets) -> list[Variant]:
    """The variants that cannot answer here now."""
    return [each for each in running.experiment.variants if not is_there(targets, each.target)]


def is_there(targets: Targets, name: str) -> bool:
    """Whether a target can be asked for now."""
    try:
        targets.resolve(name)
    except MergerouteError:
        return False
    return True
