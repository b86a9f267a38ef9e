"""Replay: a stored request is answered again by the same modules, blend and seed, or it is said
what of these is gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..access.callers import Caller
from ..access.permissions import check_named
from ..context import Context
from ..errors import ApiError
from ..hosted import HostedBank
from ..relay.bodies import CHAT_PATH, relayed
from ..responses.progress import usage
from ..schemas.completions import ChatRequest, CompletionRequest, GenerationBody
from ..terms import terms_of
from ..validation import validate
from .again import begin, follow, unstreamed
from .keeping import answer_of, decisions_of, parts_of
from .live import LiveExperiments
from .plan import Plan
from .records import StoredRequest
from .refusals import unknown_request

if TYPE_CHECKING:
    from ..service import Service

_WAITS_S = (0.25, 0.5, 1.25)
"""For what was answered just now, and is on its way to the database."""

_DAY_S = 86_400


@dataclass(frozen=True)
class Gone:
    """Something that an equal answer needs and that is not as it was. now: None: there is none."""

    what: str
    name: str
    was: str
    now: str | None

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"what": self.what, "name": self.name, "was": self.was, "now": self.now}


@dataclass(frozen=True)
class Replayed:
    """tokens: that answering again took."""

    document: dict[str, Any]
    tokens: int = 0


async def replay(
    service: Service, live: LiveExperiments, request_id: str, context: Context
) -> Replayed:
    """Answer a stored request again. context: of who asks for it.

    Raises:
        ApiError: no such request is known to the caller, or it was not stored, or is no more.
        MergerouteError: the engine refuses it, or fails.
    """
    stored = await _stored(live, request_id, context.caller)
    parts = json.loads(stored.engine)
    body = _body(service, stored)
    check_named(context.caller, body.model)
    hosted = service.targets.banks.get(parts["bank_name"])
    decisions = decisions_of(stored.blend)
    if hosted is None:
        gone = [Gone("bank", parts["bank_name"], stored.bank, None)]
    else:
        gone = list(_gone(parts, hosted))
    if hosted is None or gone:
        return Replayed(_document(stored, parts, hosted, gone, None))
    plan = Plan(hosted.bank.name, seed=stored.seed, decisions=decisions)
    terms = terms_of(context, service.pressure.request_timeout_seconds)
    assignments = await service.assign(body, Context(caller=context.caller), plan)
    progress = await begin(body, assignments, terms)
    await follow(progress)
    used = progress[0].choice.assignment.hosted  # it may have changed meanwhile
    gone = list(_gone(parts, used))
    document = _document(stored, parts, used, gone, None if gone else answer_of(progress))
    return Replayed(document, usage(progress)["total_tokens"])


async def _stored(live: LiveExperiments, request_id: str, caller: Caller) -> StoredRequest:
    """The request, where the caller may see it: its own, or any for an administrator.

    Raises:
        ApiError: there is none; it says why where the caller may know.
    """
    exposure = await live.recorder.find(request_id)
    is_admin = "admin" in caller.scopes
    if not is_admin and exposure.caller != caller.name:
        raise unknown_request(request_id)
    for wait_s in (*_WAITS_S, None):
        stored = await live.recorder.find_request(request_id)
        if stored is not None:
            if is_admin or json.loads(stored.engine)["caller"] == caller.name:
                return stored
            raise unknown_request(request_id)
        if wait_s is None or time.time() - exposure.at > 60:
            break
        await asyncio.sleep(wait_s)
    running = live.snapshot.by_name.get(exposure.experiment)
    days = running.experiment.store_days if running else None
    if days is not None and time.time() - exposure.at > days * _DAY_S:
        raise ApiError(
            f"the request is older than {days:g} days, and is kept no longer (store_days)",
            status=410,
            param="request_id",
            code="request_expired",
        )
    raise ApiError(
        f"the request {request_id!r} is not stored: its experiment has store_requests false, it "
        "was not answered to its end, is too long, or is pruned",
        status=404,
        param="request_id",
        code="request_not_stored",
    )


def _body(service: Service, stored: StoredRequest) -> GenerationBody:
    document, is_chat = json.loads(stored.body), stored.path == CHAT_PATH
    if service.relays:
        return unstreamed(relayed(document, is_chat=is_chat))
    kind: type[ChatRequest | CompletionRequest] = ChatRequest if is_chat else CompletionRequest
    return unstreamed(validate(document, kind))


def _gone(parts: Mapping[str, Any], hosted: HostedBank) -> Iterator[Gone]:
    """What is not there any more. The bank may have changed otherwise, and its router too."""
    backbone = hosted.bank.backbone
    if backbone.digest != parts["backbone"]:
        yield Gone("backbone", backbone.name, parts["backbone"], backbone.digest)
    if hosted.shared != parts["shared"]:
        yield Gone("shared module", hosted.bank.name, str(parts["shared"]), hosted.shared)
    for name, digest in parts["modules"].items():
        if (now := hosted.digests.get(name)) != digest:
            yield Gone("module", name, digest, now)
    if parts["gated"] and sorted(hosted.digests) != parts["gated"]:
        was, now = ",".join(parts["gated"]), ",".join(sorted(hosted.digests))
        yield Gone("modules that are weighed by token", hosted.bank.name, was, now)


def _document(
    stored: StoredRequest,
    parts: Mapping[str, Any],
    hosted: HostedBank | None,
    gone: Sequence[Gone],
    answer: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    before = json.loads(stored.answer)
    engine = parts_of(hosted, ())["engine"] if hosted else None
    return {
        "object": "replay",
        "request_id": stored.request_id,
        "experiment": parts["experiment"],
        "variant": parts["variant"],
        "target": stored.target,
        "answered_at": stored.at,
        "is_equal": None if answer is None else answer == before,
        "first_difference": None if answer is None else _first_difference(before, answer),
        "gone": [each.told() for each in gone],
        "bank": {"was": stored.bank, "now": hosted.bank.digest if hosted else None},
        "engine": {"was": parts["engine"], "now": engine},
        "blends": json.loads(stored.blend),
        "seed": stored.seed,
        "stored": before,
        "replayed": answer,
    }


def _first_difference(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, int] | None:
    """Which choice differs first, and from which of its tokens on."""
    for number, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            pairs = enumerate(zip_longest(old["token_ids"], new["token_ids"]))
            same = min(len(old["token_ids"]), len(new["token_ids"]))
            return {"choice": number, "token": next((n for n, (a, b) in pairs if a != b), same)}
    return None
