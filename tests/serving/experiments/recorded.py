"""Records that tests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import select

from mergeroute.serving.experiments.records import (
    Exposure,
    Feedback,
    Outcome,
    Record,
    ShadowPair,
    StoredRequest,
)
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.sums import ALL, counted
from mergeroute.serving.experiments.tables import exposures, shadow_pairs


def exposure(request_id: str, **given: Any) -> Exposure:
    """Of the experiment `ties`, control, by a user, unless stated."""
    stated = {
        "experiment": "ties",
        "version": 1,
        "variant": "control",
        "unit": f"unit-{request_id}",
        "unit_kind": "user",
        "caller": "app",
        "at": 1000.0,
        "is_forced": False,
        "target": "zoo-ties",
        "bank": "sha256:0",
        "blend": "none",
        **given,
    }
    return Exposure(request_id, **stated)


def outcome(request_id: str, **given: Any) -> Outcome:
    """An answer that stopped by itself, unless stated."""
    stated = {
        "at": 1001.0,
        "latency_ms": 12.5,
        "first_token_ms": 3.0,
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "finish_reason": "stop",
        "error": None,
        "status": 200,
        "abstained": 0.25,
        "blend": "none",
        **given,
    }
    return Outcome(request_id, **stated)


def feedback(request_id: str, value: float = 1.0, **given: Any) -> Feedback:
    """A score, unless stated."""
    stated = {"metric": "score", "at": 1002.0, "caller": "app", **given}
    return Feedback(request_id, value=value, **stated)


def shadow_pair(request_id: str, **given: Any) -> ShadowPair:
    """Two equal answers, unless stated."""
    stated = {"variant": "routed", "at": 1003.0, "agrees": True, **given}
    return ShadowPair(
        request_id, "ties", length=5, other_length=5, latency_ms=1, other_latency_ms=2, **stated
    )


def stored_request(request_id: str, **given: Any) -> StoredRequest:
    """A body of one word, unless stated."""
    stated = {"body": '{"prompt": "\\ud800 \\u0000"}', "answer": "{}", **given}
    return StoredRequest(
        request_id,
        1000.0,
        "/v1/completions",
        bank="sha256:0",
        blend="a=1",
        seed=3,
        target="zoo",
        engine="{}",
        **stated,
    )


def one_of_each(request_id: str) -> Sequence[Record]:
    """All kinds of records of a request."""
    made = (exposure, outcome, feedback, shadow_pair, stored_request)
    return [make(request_id) for make in made]


def shadow_pairs_of(store: Store, experiment: str) -> list[ShadowPair]:
    """Those that count, in the order of their insertion."""
    columns = [shadow_pairs.c[each.name] for each in fields(ShadowPair)]
    with store.database.reading() as connection:
        given = select(exposures.c.request_id).where(*counted(connection, experiment, ALL))
        asked = select(*columns).where(
            shadow_pairs.c.experiment == experiment, shadow_pairs.c.request_id.in_(given)
        )
        rows = connection.execute(asked.order_by(shadow_pairs.c.sequence))
        return [ShadowPair(*row) for row in rows]
