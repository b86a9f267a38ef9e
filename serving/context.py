"""What comes with a request beside its body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .access.callers import ANYBODY, Caller


@dataclass(frozen=True)
class Context:
    """Who asks, and how.

    headers: the request's. request_id: as the answer's header states it.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    caller: Caller = ANYBODY
    request_id: str = ""


NO_CONTEXT = Context()
