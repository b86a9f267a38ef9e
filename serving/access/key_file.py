"""The file of keys: read, watched, and changed whole."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import yaml
from pydantic import TypeAdapter, ValidationError

from ...adapters.errors import MergerouteError
from .keys import Key

logger = logging.getLogger(__name__)

_KEYS = TypeAdapter(tuple[Key, ...])
_LOOK_S = 1.0
_MAX_BYTES = 16 << 20
_HEADER = "# Keys of `mergeroute serve`, written by `mergeroute key`: hashes, never the keys.\n"


class KeyFileError(MergerouteError):
    """The file of keys cannot be used."""


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Nothing that stands in it is shown: somebody may have put a key there.

    Raises:
        KeyFileError: it is missing or damaged, others may write it, or two keys have one name.
    """
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()))
            values = yaml.safe_load(file.read(_MAX_BYTES))
        keys = _KEYS.validate_python(values or ())
    except OSError as error:
        raise KeyFileError(f"the keys {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise KeyFileError(f"the keys {path} are no YAML{line}") from None
    except ValidationError as error:
        raise KeyFileError(f"the keys {path}: {_first(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise KeyFileError(f"the keys {path} are no YAML in UTF-8") from None
    _check_names(path, keys)
    return keys


def add_key(path: Path, key: Key) -> None:
    """Write one key more; a file that is not there is made, for its owner alone.

    Raises:
        KeyFileError: the name is taken, or the file cannot be used.
    """
    with _changing(path) as keys:
        _replace(path, (*keys, key))


def revoke_key(path: Path, name: str) -> None:
    """Take a key out; servers that watch the file refuse it within a second.

    Raises:
        KeyFileError: no key has this name, or the file cannot be used.
    """
    with _changing(path) as keys:
        if name not in {key.name for key in keys}:
            known = ", ".join(key.name for key in keys) or "none"
            raise KeyFileError(f"{path} has no key {name!r}; its keys: {known}")
        _replace(path, [key for key in keys if key.name != name])


class KeyRing:
    """The keys of a file as it is now. A file that breaks leaves the keys as they were, and says so
    in the log. Any thread may use it.

    clock: seconds that never go back.

    Raises:
        KeyFileError: the file cannot be used at the start.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = _signature(path)
        self._looked = clock()
        self.keys = read_keys(path)

    def is_stale(self) -> bool:
        """Whether the file has changed. It is looked at once a second."""
        if self._clock() - self._looked < _LOOK_S:
            return False
        self._looked = self._clock()
        return _signature(self._path) != self._seen

    def reload(self) -> None:
        """Read the file again, if it has changed."""
        with self._lock:
            if (signature := _signature(self._path)) == self._seen:
                return
            self._seen = signature
            try:
                self.keys = read_keys(self._path)
                logger.info("%d keys read from %s", len(self.keys), self._path)
            except KeyFileError as error:
                logger.error("%s; the keys from before stay valid", error)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _check_mode(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise KeyFileError(f"the keys {path} are no regular file")
    if found.st_size > _MAX_BYTES:
        raise KeyFileError(f"the keys {path} have {found.st_size:,} bytes, at most {_MAX_BYTES:,}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileError(
            f"the keys {path} may be written by others than their owner: chmod 600 {path}"
        )
    if found.st_mode & stat.S_IROTH:
        logger.warning("the keys %s may be read by everybody: chmod 600 %s", path, path)


def _check_names(path: Path, keys: Sequence[Key]) -> None:
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise KeyFileError(f"the keys {path}: the name {min(twice)!r} is there twice")


def _first(error: ValidationError) -> str:
    """Which entry and field is at fault, and the rule; never the value."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    where = [f"entry {p + 1}" if isinstance(p, int) else str(p) for p in first["loc"]]
    if first["type"] == "extra_forbidden":
        where[-1] = "a field that is not known"
    return f"{', '.join(where) or 'the file'}: {first['msg'].replace('Input should', 'must')}"


@contextmanager
def _changing(path: Path) -> Iterator[tuple[Key, ...]]:
    """The keys of a file that nobody else changes meanwhile; its folder is locked."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"{path.parent} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield read_keys(path) if path.exists() else ()
    finally:
        os.close(folder)


def _replace(path: Path, keys: Sequence[Key]) -> None:
    """Write a file beside and put it in the place of the old one: who reads sees one or the other.

    Raises:
        KeyFileError: two keys have one name, or it cannot be written.
    """
    _check_names(path, keys)
    entries = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    for entry in entries:
        entry |= {name: sorted(entry[name]) for name in ("scopes", "targets") if name in entry}
    target = path.resolve()
    try:
        with NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
            file.write(_HEADER + yaml.safe_dump(entries, sort_keys=False))
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, target)  # NamedTemporaryFile makes it for its owner alone
    except OSError as error:
        raise KeyFileError(f"the keys {path} cannot be written: {error.strerror}") from error
