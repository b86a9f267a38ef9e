"""RequestRecord: what is known of a request when it is over. Metrics, log line and spans are all
drawn from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..assigning import Assignment
from ..context import Context
from ..errors import CLIENT_CLOSED
from ..responses.decisions import blend_text
from ..responses.progress import Progress, usage
from ..schemas.completions import GenerationBody
from ..sessions import conversation_of

if TYPE_CHECKING:
    from ..experiments.enrolment import Enrolment

UNKNOWN = "unknown"

_FAILURES = {"error": "engine_failed", "cancelled": "not_ready", "timeout": "timeout"}
"""Codes of what ends a stream after its first byte."""


@dataclass
class RequestRecord:
    """One request, from its arrival. Times are by `time.perf_counter`, arrived_at is Unix time.

    route: as the application writes it. status: what was answered, or 499 where the client left.
    key: name of the caller's. model: as the client wrote it. error: code of what went wrong.
    assigned: when its target was looked for, served: when all its choices were submitted.
    enrolment: in an experiment. progress: of its choices. prompt_tokens: where there are none.
    trace_id: of its spans.
    """

    request_id: str
    method: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    server: tuple[str, int | None] | None = None
    arrived: float = field(default_factory=time.perf_counter)
    arrived_at: float = field(default_factory=time.time)
    ended: float = 0.0
    route: str = UNKNOWN
    status: int = 500
    key: str = ""
    model: str | None = None
    conversation: str | None = None
    streams: bool = False
    assigned: float | None = None
    served: float | None = None
    enrolment: Enrolment | None = None
    progress: Sequence[Progress] = ()
    prompt_tokens: int = 0
    error: str | None = None
    trace_id: str | None = None

    def ask(self, body: GenerationBody, context: Context) -> None:
        """A valid body has come, and a target is looked for."""
        self.model, self.streams = body.model, body.stream
        self.conversation = conversation_of(body, context.headers)
        self.assigned = time.perf_counter()

    def serve(self, progress: Sequence[Progress]) -> None:
        """Its choices have been submitted."""
        self.progress, self.served = progress, time.perf_counter()

    def embed(self, model: str, prompt_tokens: int) -> None:
        """It was answered without a generation."""
        self.model, self.prompt_tokens = model, prompt_tokens

    def end(self, status: int) -> None:
        """It is over; what became of its choices tells what the status could not."""
        self.status, self.ended = status, time.perf_counter()
        if self.status >= 400 or not self.progress:
            return
        reasons = [progress.finish_reason for progress in self.progress]
        failures = [_FAILURES[reason] for reason in reasons if reason in _FAILURES]
        if failures:
            self.error = failures[0]
        elif None in reasons:
            self.status, self.error = CLIENT_CLOSED, "client_closed"

    @property
    def assignments(self) -> list[Assignment]:
        """What its prompts were assigned to."""
        return list({id(p.choice.assignment): p.choice.assignment for p in self.progress}.values())

    @property
    def bank(self) -> str | None:
        """That answered, or was to."""
        return self.progress[0].choice.assignment.hosted.bank.name if self.progress else None

    @property
    def usage(self) -> dict[str, int]:
        """Prompt, completion and cached tokens."""
        if not self.progress:
            return {"prompt": self.prompt_tokens, "completion": 0, "cached": 0}
        told = usage(self.progress)
        cached = told["prompt_tokens_details"]["cached_tokens"]
        return {
            "prompt": told["prompt_tokens"],
            "completion": told["completion_tokens"],
            "cached": cached,
        }

    @property
    def queued(self) -> Iterator[float]:
        """Seconds that each choice waited for a slot, of those that got one."""
        for progress in self.progress:
            generation = progress.choice.generation
            if generation.admitted_at is not None:
                yield generation.admitted_at - generation.submitted_at

    @property
    def first_token(self) -> float | None:
        """When the first token of all came."""
        return min((p.arrivals[0] for p in self.progress if p.arrivals), default=None)

    @property
    def finish_reasons(self) -> list[str]:
        """One per choice."""
        return [progress.finish_reason or "cancelled" for progress in self.progress]

    @property
    def cold(self) -> list[str]:
        """Modules that had to be read for it."""
        return sorted({name for progress in self.progress for name in progress.choice.cold})

    @property
    def fields(self) -> dict[str, Any]:
        """What the log tells: names, numbers and codes; nothing that was written in the body but
        the model's name, no header but the request id.
        """
        told: dict[str, Any] = {"request_id": self.request_id, "key": self.key}
        told |= {"method": self.method, "route": self.route, "status": self.status}
        if self.error:
            told["error"] = self.error
        if self.model is not None:
            told |= {"model": self.model, "stream": self.streams}
        if self.progress:
            told |= _decided(self.assignments)
            told |= {"finish_reasons": self.finish_reasons, "cold": self.cold}
        if self.enrolment:
            told |= {"experiment": self.enrolment.experiment, "variant": self.enrolment.variant}
        if self.progress or self.prompt_tokens:
            told |= {f"{kind}_tokens": count for kind, count in self.usage.items()}
        told |= self._milliseconds()
        return told | ({"trace_id": self.trace_id} if self.trace_id else {})

    def _milliseconds(self) -> dict[str, float]:
        routed = [assignment.decision.milliseconds for assignment in self.assignments]
        first = self.first_token
        seconds = {
            "queue_ms": max(self.queued, default=None),
            "first_token_ms": None if first is None else first - self.arrived,
            "total_ms": self.ended - self.arrived,
        }
        shown = {name: round(1000 * s, 3) for name, s in seconds.items() if s is not None}
        return ({"route_ms": round(sum(routed), 3)} if routed else {}) | shown


def _decided(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Of the first prompt; the others of a request go to the same target."""
    first = assignments[0]
    return {
        "target": first.target.name,
        "bank": first.hosted.bank.name,
        "blend": blend_text(first.decision),
        "router": first.decision.router,
        "confidence": round(first.decision.confidence, 4),
        "abstained": first.decision.abstained,
    }
