"""What was recorded lately, by request, so that it is known before the database has it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from .records import Exposure, Feedback, Record

KEPT_S = 5.0
"""Known for longer than it takes to store: who asked the database before a commit, and this memory
after it, would find a record in neither.
"""


class Undrained:
    """Exposures and feedback in memory, until some seconds after they were stored."""

    def __init__(self, records: Iterable[Record] = (), *, kept_s: float = KEPT_S) -> None:
        self._kept_s = kept_s
        self._exposures: dict[str, Exposure] = {}
        self._said: dict[tuple[str, str], Feedback] = {}
        self._keyed: dict[tuple[str, str], Feedback] = {}
        self._stored: deque[tuple[float, Sequence[Record]]] = deque()
        self._lock = threading.Lock()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Know a record; the first one of a request, or of a metric of it, counts."""
        with self._lock:
            if isinstance(record, Exposure):
                self._exposures.setdefault(record.request_id, record)
            elif isinstance(record, Feedback):
                self._said.setdefault((record.request_id, record.metric), record)
                if record.idempotency_key is not None:
                    self._keyed.setdefault((record.caller, record.idempotency_key), record)

    def exposure(self, request_id: str) -> Exposure | None:
        """Of a request."""
        return self._exposures.get(request_id)

    def feedback(self, like: Feedback) -> Feedback | None:
        """What was said under the same key, else of the same request in the same metric."""
        with self._lock:
            keyed = self._keyed.get((like.caller, like.idempotency_key or ""))
            return keyed or self._said.get((like.request_id, like.metric))

    def stored(self, records: Sequence[Record]) -> None:
        """The database has these; those it has had for a while are forgotten."""
        now = time.monotonic()
        with self._lock:
            self._stored.append((now, records))
            while self._stored and self._stored[0][0] <= now - self._kept_s:
                for record in self._stored.popleft()[1]:
                    self._forget(record)

    def _forget(self, record: Record) -> None:
        if isinstance(record, Exposure):
            self._exposures.pop(record.request_id, None)
        elif isinstance(record, Feedback):
            self._said.pop((record.request_id, record.metric), None)
            self._keyed.pop((record.caller, record.idempotency_key or ""), None)
