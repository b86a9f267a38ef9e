"""Log lines without keys, wherever one may have been written: in a path, a query, an error."""

from __future__ import annotations

import logging
import re

from .keys import PREFIX

_KEY = re.compile(rf"{PREFIX}[\w-]{{40,}}")


class WithoutKeys(logging.Formatter):
    """A formatter's lines, with `mr-...` for every key in them, tracebacks included."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return without_keys(self._inner.format(record))


def without_keys(text: str) -> str:
    """A text without the keys in it."""
    return _KEY.sub(f"{PREFIX}...", text)
