"""What is kept of a request so that it can be answered again: its body, what was decided, by what
it was answered, and the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.blend import Blend
from ...routers.base import Decision
from ...routers.token_routing import TokenRouting
from ..hosted import HostedBank
from ..relay.bodies import RelayedChat, RelayedText
from ..responses.progress import Progress
from ..schemas.completions import GenerationBody
from ..telemetry.record import RequestRecord
from .records import StoredRequest

MOST_CHARACTERS = 256 << 10
"""Of body and answer together; of a longer request nothing is kept."""


def stored_of(record: RequestRecord) -> StoredRequest | None:
    """Of a request that was answered to its end; None: it was not, or is too long."""
    if record.error is not None or record.status != 200 or not record.progress:
        return None
    if record.usage["prompt"] + record.usage["completion"] > MOST_CHARACTERS:
        return None  # before it takes time to write it out
    body, first = document_of(record.progress[0].choice.body), record.assignments[0]
    stored = StoredRequest(
        request_id=record.request_id,
        at=time.time(),
        path=record.route,
        body=json.dumps(body, ensure_ascii=False),
        bank=first.hosted.bank.digest,
        blend=told([each.decision for each in record.assignments]),
        seed=first.seed if body.get("seed") is None else None,
        target=first.target.name,
        engine=json.dumps(
            {
                "caller": record.key,
                "experiment": record.enrolment.experiment if record.enrolment else "",
                "variant": record.enrolment.variant if record.enrolment else "",
                **parts_of(first.hosted, [each.decision for each in record.assignments]),
            }
        ),
        answer=json.dumps(answer_of(record.progress), ensure_ascii=False),
    )
    return stored if len(stored.body) + len(stored.answer) <= MOST_CHARACTERS else None


def document_of(body: GenerationBody) -> dict[str, Any]:
    """A body as it was sent, without what it left out."""
    if isinstance(body, RelayedChat | RelayedText):
        return body.document
    return body.model_dump(mode="json", exclude_unset=True, by_alias=True)


def answer_of(progress: Sequence[Progress]) -> list[dict[str, Any]]:
    """What was answered, choice by choice."""
    return [
        {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
        for each in progress
    ]


def parts_of(hosted: HostedBank, decisions: Sequence[Decision]) -> dict[str, Any]:
    """What an answer depends on beside bank, blend and seed: engine and backbone, and the digests
    of the modules that it was answered with, by name.
    """
    needed = {digest for decision in decisions for digest in hosted.needed(decision)}
    return {
        "engine": type(hosted.engine).__name__,
        "bank_name": hosted.bank.name,
        "backbone": hosted.bank.backbone.digest,
        "shared": hosted.shared,
        "modules": {n: digest for n, digest in hosted.digests.items() if digest in needed},
        "gated": sorted(hosted.digests) if any(d.token_routing for d in decisions) else [],
    }


def told(decisions: Sequence[Decision]) -> str:
    """What was decided, prompt by prompt, as it is stored."""
    routings = [decision.token_routing for decision in decisions]
    return json.dumps(
        [
            {"weights": dict(decision.blend), "routing": routing.settings if routing else None}
            for decision, routing in zip(decisions, routings, strict=True)
        ]
    )


def decisions_of(blend: str) -> tuple[Decision, ...]:
    """What was decided, prompt by prompt. blend: of a stored request."""
    return tuple(map(_decision, json.loads(blend)))


def _decision(found: Mapping[str, Any]) -> Decision:
    routing = found["routing"]
    return Decision(
        blend=Blend(found["weights"]),
        token_routing=TokenRouting.parse(routing) if routing else None,
        reason="as it was decided before",
    )
