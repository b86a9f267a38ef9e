"""What is recorded of a request that takes part: drawn from what is known of it anyway."""

from __future__ import annotations

import time

from ..responses.decisions import blend_text
from ..telemetry.record import RequestRecord
from .enrolment import Enrolment
from .records import Exposure, Outcome

_FAILED = "error"


def exposure_of(record: RequestRecord, enrolment: Enrolment, caller: str) -> Exposure:
    """Of a request whose choices have been started, or could not be: then bank and blend are empty.
    caller: name of the key that it came with.
    """
    assignments = record.assignments
    return Exposure(
        request_id=record.request_id,
        experiment=enrolment.experiment,
        version=enrolment.version,
        variant=enrolment.variant,
        unit=enrolment.unit,
        unit_kind=enrolment.unit_kind,
        caller=caller,
        at=time.time(),
        is_forced=enrolment.is_forced,
        target=assignments[0].target.name if assignments else enrolment.target,
        bank=assignments[0].hosted.bank.digest if assignments else "",
        blend=_blend(record),
    )


def outcome_of(record: RequestRecord) -> Outcome:
    """Of a request that is over."""
    decisions = [assignment.decision for assignment in record.assignments]
    first, used = record.first_token, record.usage
    return Outcome(
        request_id=record.request_id,
        at=time.time(),
        latency_ms=1000 * (record.ended - record.arrived),
        first_token_ms=None if first is None else 1000 * (first - record.arrived),
        prompt_tokens=used["prompt"],
        completion_tokens=used["completion"],
        finish_reason=_finish_reason(record),
        error=record.error,
        status=record.status,
        abstained=sum(d.abstained for d in decisions) / len(decisions) if decisions else 0.0,
        blend=_blend(record),
    )


def _blend(record: RequestRecord) -> str:
    """One per prompt where they differ, as the answer's header says it."""
    blends = [blend_text(assignment.decision) for assignment in record.assignments]
    return "; ".join(blends if len(set(blends)) > 1 else blends[:1])


def _finish_reason(record: RequestRecord) -> str:
    """Of several choices the one that tells most: what failed, then what was cut short."""
    reasons = record.finish_reasons or [_FAILED]
    told = [reason for reason in reasons if reason not in ("stop", "length")]
    return told[0] if told else "length" if "length" in reasons else "stop"
