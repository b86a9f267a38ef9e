"""The log's lines: one per request, as text or JSON, safe to read in a terminal."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from .record import RequestRecord

logger = logging.getLogger("mergeroute.requests")

_PROBES = frozenset(("/health", "/live", "/ready", "/metrics"))
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What ends a line, moves a cursor, turns the direction of writing or cannot be written."""

_PLAIN = re.compile(r"[^\s\"'=\\]+")


class RequestLine:
    """A request as the log's message: its fields in JSON, a compact line in text."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def __str__(self) -> str:
        told = dict(self.fields)
        head = f"{told.pop('method')} {told.pop('route')} {told.pop('status')}"
        pairs = (f"{name}={_shown(value)}" for name, value in told.items() if value != [])
        return " ".join((head, *pairs))


def log_request(record: RequestRecord, *, logs_prompts: bool) -> None:
    """Write the line of a request that is over. Probes that went well are of level DEBUG."""
    is_probe = record.route in _PROBES and record.status < 400
    level = logging.DEBUG if is_probe else logging.INFO
    if logger.isEnabledFor(level):
        texts = _texts(record) if logs_prompts else {}
        logger.log(level, "%s", RequestLine(record.fields | texts))


def escaped(text: str) -> str:
    r"""A text with its control characters written out as in JSON: `\u000a`, `\u001b`."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class TextLines(logging.Formatter):
    """One line of text a record, and its traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without what would break it."""
        return escaped(super().formatMessage(record))


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        request = record.args[0] if isinstance(record.args, tuple) and record.args else None
        told = request.fields if isinstance(request, RequestLine) else None
        entry = {
            "time": f"{_second(record.created)}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            **({"message": record.getMessage()} if told is None else told),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return escaped(json.dumps(entry, ensure_ascii=False, default=str))


def _second(unix: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix))


def _shown(value: object) -> str:
    """A value without spaces, or quoted."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _texts(record: RequestRecord) -> dict[str, Any]:
    """What was asked and answered, as the backbone saw it."""
    if not record.progress:
        return {}
    assignments = record.assignments
    tokenizer = assignments[0].hosted.tokenizer
    prompts = [tokenizer.decode(list(a.prompt.token_ids)) for a in assignments]
    return {"prompts": prompts, "completions": [p.text for p in record.progress]}
