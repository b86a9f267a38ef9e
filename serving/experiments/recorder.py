"""Records off the request path: appended to the journal, then drained into the database."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy.exc import DataError, IntegrityError

from ..errors import ApiError, SettingsError
from .database import DatabaseDownError
from .journal import Journal, JournalFullError
from .records import Exposure, Feedback, Outcome, Record, ShadowPair, StoredRequest, to_line
from .refusals import check_same, unknown_request
from .store import Store
from .undrained import Undrained

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.2
_LONGEST_S = 5.0
_LOOKUP_S = 2.0
_WAITS_S = (0.25, 0.5, 1.25)
"""Between looking for an exposure that another replica may be about to store."""
_LONGEST_REST_S = 0.02
"""After a batch, as long as it took at most: one that catches up leaves time to requests."""
_STORED_SHARE = 0.5
_AT_FAULT = (DataError, IntegrityError, UnicodeError, OverflowError)
"""What databases and their drivers say of a value, not of themselves."""

_Found = TypeVar("_Found")


class Recorder:
    """Takes records from the event loop (microseconds each) and brings them into the database from
    a thread of its own. It closes neither journal nor store.

    is_shared: whether other servers write to the database, too. known: what remembers records
    until they are stored.
    """

    def __init__(
        self,
        journal: Journal,
        store: Store,
        *,
        is_shared: bool = True,
        known: Undrained | None = None,
    ) -> None:
        self._waits_s = _WAITS_S if is_shared else ()
        self._journal = journal
        self._store = store
        self._known = known or Undrained()
        for record in journal.pending():
            self._known.add(record)
        self._error: str | None = None
        self._repeated = 0
        self._is_full = False
        self._claiming = threading.Lock()
        self._lookups = ThreadPoolExecutor(4, thread_name_prefix="experiment-lookup")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="experiment-records", daemon=True)
        self._thread.start()

    def expose(self, exposure: Exposure) -> None:
        """Before the first byte of its answer leaves. Dropped, and counted, where the journal is
        full.
        """
        if self._append(exposure):
            self._known.add(exposure)

    def finish(self, outcome: Outcome) -> None:
        """As `expose`, at the end of an answer."""
        self._append(outcome)

    def shadow(self, pair: ShadowPair) -> None:
        """As `expose`."""
        self._append(pair)

    def keep(self, request: StoredRequest) -> None:
        """As `expose`; dropped first: stored requests fill half of the journal at most."""
        self._append(request, share=_STORED_SHARE)

    async def find(self, request_id: str) -> Exposure:
        """The exposure of a request; one that another replica may be about to store is waited for,
        two seconds at most.

        Raises:
            ApiError: there is none (404).
            DatabaseDownError: this process does not know it, and the database does not answer.
        """
        for wait_s in (*self._waits_s, None):
            if known := self._known.exposure(request_id):
                return known
            if found := await self._ask(lambda: self._store.find_exposure(request_id)):
                return found
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        raise unknown_request(request_id)

    async def find_request(self, request_id: str) -> StoredRequest | None:
        """What the database has to answer a request again.

        Raises:
            DatabaseDownError: it does not answer.
        """
        return await self._ask(lambda: self._store.find_request(request_id))

    async def feedback(self, feedback: Feedback) -> bool:
        """Keep feedback for an exposure that was found; whether it is new. The same again (by its
        key, else by request, metric and value) is no error and changes nothing. While the database
        does not answer, what only it knows is not compared with: the first one stays.

        Raises:
            ApiError: the key was used for something else, or the request has another value of this
                metric (409).
            JournalFullError: it was not kept.
        """
        found = await self._found_feedback(feedback)
        with self._claiming:
            earlier = self._known.feedback(feedback) or found
            if earlier is None:
                self._journal.append(feedback)
                self._known.add(feedback)
                return True
        check_same(earlier, feedback)
        return False

    def status(self) -> dict[str, Any]:
        """For health and metrics: `database` (up, down), `backlog` and `backlog_bytes` not drained
        yet, `dropped` and `refused` records, `repeated` requests (those that came under the id of
        an earlier one, which alone counts), `last_error`.
        """
        return {
            "database": "up" if self._error is None else "down",
            "backlog": self._journal.backlog,
            "backlog_bytes": self._journal.backlog_bytes,
            "dropped": self._journal.dropped,
            "refused": self._journal.refused,
            "repeated": self._repeated,
            "last_error": self._error,
        }

    def close(self) -> None:
        """Drain what can be drained now, and stop."""
        self._stopped.set()
        self._thread.join()
        self._lookups.shutdown(cancel_futures=True)

    def _append(self, record: Record, *, share: float = 1.0) -> bool:
        try:
            self._journal.append(record, share=share)
        except JournalFullError as error:
            if not self._is_full:
                logger.error("records for %s are dropped: %s", self._journal.folder, error)
            self._is_full = True
            return False
        self._is_full = False
        return True

    async def _found_feedback(self, feedback: Feedback) -> Feedback | None:
        if known := self._known.feedback(feedback):
            return known
        try:
            return await self._ask(
                lambda: self._store.find_feedback(
                    feedback.request_id,
                    feedback.metric,
                    caller=feedback.caller,
                    idempotency_key=feedback.idempotency_key,
                )
            )
        except DatabaseDownError:
            return None

    async def _ask(self, question: Callable[[], _Found]) -> _Found:
        """The database, in a thread that nobody else waits for. What is wrong with it is for the
        log and the status, not for those who give feedback.
        """
        try:
            if self._error is not None or self._stopped.is_set():
                raise DatabaseDownError(self._error or "the server stops")
            asked = asyncio.get_running_loop().run_in_executor(self._lookups, question)
            return await asyncio.wait_for(asked, _LOOKUP_S)
        except (DatabaseDownError, SettingsError, TimeoutError) as error:
            raise DatabaseDownError(
                "the database of experiments does not answer: try again later"
            ) from error

    def _run(self) -> None:
        pause_s, is_last = _INTERVAL_S, False
        while not is_last:
            is_last = self._stopped.wait(pause_s)
            pause_s = _INTERVAL_S if self._drain() else min(2 * pause_s, _LONGEST_S)

    def _drain(self) -> bool:
        """Whether all could be stored."""
        try:
            began = time.perf_counter()
            while batch := self._journal.read():
                self._insert(batch.records)
                self._known.stored(batch.records)
                self._journal.drained(batch)
                self._told(None)
                self._stopped.wait(min(time.perf_counter() - began, _LONGEST_REST_S))
                began = time.perf_counter()
            self._told(None)
        except (ApiError, SettingsError) as error:
            self._told(str(error))
            return False
        except Exception as error:  # whatever it is: the journal holds, and this must go on
            logger.exception("records of experiments cannot be stored")
            self._told(f"{type(error).__name__}: the log has more")
            return False
        return True

    def _insert(self, records: Sequence[Record]) -> None:
        """All; those that the database refuses are kept aside, or they would hold up the rest."""
        if not records:
            return
        try:
            self._repeated += self._store.insert(records)
        except _AT_FAULT as error:
            if len(records) > 1:
                middle = len(records) // 2
                self._insert(records[:middle])
                self._insert(records[middle:])
                return
            logger.error("a record of an experiment cannot be stored: %s", type(error).__name__)
            self._journal.refuse(to_line(records[0]))

    def _told(self, error: str | None) -> None:
        """Log what changed, once."""
        if error is not None and self._error is None:
            logger.error("records of experiments wait in %s: %s", self._journal.folder, error)
        if error is None and self._error is not None:
            logger.info("records of experiments reach the database again")
        self._error = error
