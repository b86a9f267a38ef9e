"""What is recorded of a request that takes part in an experiment, and its form as a JSON line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import TypeAdapter

from ..errors import ApiError

LARGEST_VALUE = 1e15
"""Of a metric, in size: sums of squares of many of them are floats still."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """A request was given a variant. at: the server's clock, in seconds since 1970. unit: the
    digest of who it was given to. bank: the digest. blend: as the answer's header says it.
    """

    kind: ClassVar[str] = "exposure"
    request_id: str
    experiment: str
    version: int
    variant: str
    unit: str
    unit_kind: str
    caller: str
    at: float
    is_forced: bool
    target: str
    bank: str
    blend: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How its answer ended. error: the code of what went wrong; None: nothing did."""

    kind: ClassVar[str] = "outcome"
    request_id: str
    at: float
    latency_ms: float
    first_token_ms: float | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    error: str | None
    status: int
    abstained: float
    blend: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a client says of an answer.

    Raises:
        ApiError: the value is no finite number, or too large to be summed.
    """

    kind: ClassVar[str] = "feedback"
    request_id: str
    metric: str
    value: float
    at: float
    caller: str
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and abs(self.value) <= LARGEST_VALUE):
            raise ApiError(
                f"value is {self.value}, it must be a finite number of at most {LARGEST_VALUE:g} "
                "in size",
                param="value",
            )


@dataclass(frozen=True, slots=True)
class ShadowPair:
    """A request that another variant answered too. length: tokens of the answer that was given,
    other_length: of the shadow's. score: of the shadow's answer against it, where something scores.
    """

    kind: ClassVar[str] = "shadow"
    request_id: str
    experiment: str
    variant: str
    at: float
    agrees: bool
    length: int
    other_length: int
    latency_ms: float
    other_latency_ms: float
    score: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """All that is needed to answer a request again. body, engine, answer: JSON texts; engine: what
    an equal answer depends on beside bank, blend and seed.
    """

    kind: ClassVar[str] = "request"
    request_id: str
    at: float
    path: str
    body: str
    bank: str
    blend: str
    seed: int | None
    target: str
    engine: str
    answer: str


Record = Exposure | Outcome | Feedback | ShadowPair | StoredRequest

KINDS: dict[str, type[Record]] = {
    kind.kind: kind for kind in (Exposure, Outcome, Feedback, ShadowPair, StoredRequest)
}
_NAMES = {kind: tuple(each.name for each in fields(kind)) for kind in KINDS.values()}
_PARSERS = {name: TypeAdapter(kind) for name, kind in KINDS.items()}
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def values_of(record: Record) -> dict[str, Any]:
    """Its fields by name."""
    return {name: getattr(record, name) for name in _NAMES[type(record)]}


def to_line(record: Record) -> bytes:
    """The record as one line of JSON, its end included.

    Raises:
        ValueError: a number in it is not finite.
    """
    return _ENCODER.encode([record.kind, values_of(record)]).encode() + b"\n"


def from_line(line: bytes) -> Record:
    """The record of a line.

    Raises:
        ValueError: the line holds none.
    """
    try:
        kind, values = json.loads(line)
        record: Record = _PARSERS[kind].validate_python(values)
        return record
    except (KeyError, TypeError, ApiError) as error:
        raise ValueError(f"no record: {error}") from error
