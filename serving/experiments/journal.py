"""Records on their way to the database: appended to files, so that a killed process loses none."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ApiError, SettingsError
from .records import Record, from_line, to_line

LIMIT_BYTES = 64 * 2**20
_SEGMENT_BYTES = 4 * 2**20
_CHUNK_BYTES = 32 * 2**10
_LINES, _REST_S = 25, 1e-4
"""Lines that are parsed at a stretch, half a millisecond: whoever reads them holds the interpreter,
and the event loop would wait for it.
"""
_system_write = ctypes.PyDLL(None, use_errno=True).write
_system_write.argtypes, _system_write.restype = (
    (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t),
    ctypes.c_ssize_t,
)
"""As `os.write`, but the interpreter is kept for the few microseconds that it takes: whoever gives
it up waits for another thread's turn, 5 ms, to get it back.
"""
_LOCK = "lock"
_REFUSED = "refused.jsonl"


class JournalFullError(ApiError):
    """There is no room for a record."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, code="journal_full")


@dataclass
class _Segment:
    """A file of lines. size: bytes of whole lines in it. handle: also reads what was unlinked."""

    path: Path
    handle: int
    size: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Batch:
    """Some lines that follow each other. refused: those that hold no record. size: bytes."""

    records: Sequence[Record]
    refused: Sequence[bytes]
    size: int


class Journal:
    """Records in files of a folder, in the order they came, until they are drained. Any thread may
    append; one thread reads and drains. What was appended survives the process, not the machine:
    it is handed to the system and not waited for.

    dropped: records there was no room for. refused: those that cannot be stored, which are kept
    aside in refused.jsonl. Both since the start.

    Raises:
        SettingsError: the folder cannot be used, or another process keeps its journal there.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.dropped = 0
        self.refused = 0
        self._lock = threading.Lock()
        self._offset = 0  # what of the first segment is drained
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._owned = _own(folder)
            paths = sorted(folder.glob("[0-9]*.jsonl"))
            self._segments = deque(map(_reopened, paths))
            self._next = 1 + max((int(path.stem) for path in paths), default=0)
            self._segments.append(self._begun())
        except (OSError, ValueError) as error:
            raise SettingsError(f"the journal {folder} cannot be used: {error}") from error
        self.backlog = sum(segment.lines for segment in self._segments)
        self.backlog_bytes = sum(segment.size for segment in self._segments)

    def append(self, record: Record, *, share: float = 1.0) -> None:
        """Keep a record, for good as far as this process is concerned; it takes microseconds.

        share: of the limit that may be filled before it.

        Raises:
            JournalFullError: so much is filled, or the disk is full.
        """
        line = to_line(record)
        with self._lock:
            if not self._segments:
                self.dropped += 1
                raise JournalFullError("the server stops")
            if self.backlog_bytes + len(line) > self.limit_bytes * share:
                self.dropped += 1
                raise JournalFullError(
                    f"{self.backlog_bytes:,} bytes of records wait for the database, the limit is "
                    f"{self.limit_bytes:,}: bring the database back"
                )
            self._write(line)
            self.backlog += 1
            self.backlog_bytes += len(line)

    def read(self) -> Batch | None:
        """The first lines that are not drained, about a hundred; None: all are."""
        segment = self._first()
        if segment is None:
            return None
        data = _lines(segment, self._offset)
        records, refused = [], []
        for number, line in enumerate(data.split(b"\n")[:-1]):
            if number % _LINES == _LINES - 1:
                time.sleep(_REST_S)
            try:
                records.append(from_line(line))
            except ValueError:
                refused.append(line)
        return Batch(records, refused, len(data))

    def pending(self) -> Iterator[Record]:
        """All that is not drained; to be called before anything is."""
        for segment in list(self._segments):
            for line in os.pread(segment.handle, segment.size, 0).split(b"\n")[:-1]:
                try:
                    yield from_line(line)
                except ValueError:
                    continue  # told when it is drained

    def drained(self, batch: Batch) -> None:
        """Forget what `read` returned last: it is stored elsewhere."""
        for line in batch.refused:
            self.refuse(line)
        with self._lock:
            self._offset += batch.size
            self.backlog -= len(batch.records) + len(batch.refused)
            self.backlog_bytes -= batch.size
            if self._offset >= _SEGMENT_BYTES and len(self._segments) == 1:
                with suppress(OSError):  # this one grows on, and `append` says what is wrong
                    self._segments.append(self._begun())
        self._first()

    def refuse(self, line: bytes) -> None:
        """Keep a line aside for people to look at, while there is room."""
        self.refused += 1
        path = self.folder / _REFUSED
        if not path.exists() or path.stat().st_size + len(line) < self.limit_bytes:
            with path.open("ab") as file:
                file.write(line.rstrip(b"\n") + b"\n")

    def close(self) -> None:
        """Leave the folder, and what is not drained in it, to others."""
        with self._lock:
            for segment in self._segments:
                os.close(segment.handle)
                if segment.size == (self._offset if segment is self._segments[0] else 0):
                    segment.path.unlink(missing_ok=True)
            self._segments.clear()
            os.close(self._owned)

    def _first(self) -> _Segment | None:
        """The first segment with something to drain; those before it are deleted."""
        with self._lock:
            while len(self._segments) > 1 and self._offset >= self._segments[0].size:
                gone = self._segments.popleft()
                self._offset = 0
                os.close(gone.handle)
                gone.path.unlink(missing_ok=True)
            first = self._segments[0]
            return first if self._offset < first.size else None

    def _write(self, line: bytes) -> None:
        """To the last segment, whole or not at all."""
        try:
            if self._segments[-1].size >= _SEGMENT_BYTES:
                self._segments.append(self._begun())
            segment = self._segments[-1]
            if (written := _system_write(segment.handle, line, len(line))) < len(line):
                number = ctypes.get_errno() if written < 0 else errno.ENOSPC
                os.ftruncate(segment.handle, segment.size)
                raise OSError(number, os.strerror(number))
        except OSError as error:
            self.dropped += 1
            raise JournalFullError(
                f"a record cannot be written ({error.strerror or error}): make room where the "
                "server keeps its state"
            ) from error
        segment.size += len(line)
        segment.lines += 1

    def _begun(self) -> _Segment:
        path = self.folder / f"{self._next:08}.jsonl"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        segment = _Segment(path, os.open(path, flags, 0o600))
        self._next += 1
        return segment


def _own(folder: Path) -> int:
    """A lock that lasts as long as the process."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise SettingsError(
            f"another process keeps its journal in {folder}: stop it, or give this one a folder "
            "of its own with --state"
        ) from error
    return handle


def _reopened(path: Path) -> _Segment:
    """A segment of an earlier process; a last line without an end was never appended."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    data = os.pread(handle, os.fstat(handle).st_size, 0)
    return _Segment(path, handle, data.rfind(b"\n") + 1, data.count(b"\n"))


def _lines(segment: _Segment, offset: int) -> bytes:
    """Whole lines, one at least."""
    size, end = segment.size, _CHUNK_BYTES
    while True:
        data = os.pread(segment.handle, min(end, size - offset), offset)
        if (whole := data.rfind(b"\n") + 1) > 0:
            return data[:whole]
        if len(data) < end:
            raise OSError(f"{segment.path} is shorter than it was")
        end *= 2
