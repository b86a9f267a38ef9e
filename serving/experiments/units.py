"""What is assigned: whom a request comes from, as far as it says."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..access.callers import ANYBODY, Caller
from ..context import Context
from ..schemas.completions import GenerationBody
from ..sessions import conversation_of
from .audience import header_text
from .definition import HEADER_UNIT


@dataclass(frozen=True)
class Facts:
    """What assignment looks at. headers: by name in lower case.

    user: the body's `user`, or `safety_identifier`, its newer name. session: the conversation's id.
    """

    headers: Mapping[str, str]
    caller: Caller
    request_id: str
    user: str | None = None
    session: str | None = None


@dataclass(frozen=True)
class Unit:
    """Whom a request comes from. kind: the link of the chain that said so. key: in the clear."""

    kind: str
    key: str

    def digest(self, secret: str) -> str:
        """What is stored instead of the key: HMAC-SHA-256 of it, 32 hexadecimal digits.

        secret: of the database, so that a unit has the same digest in all its experiments. The
        kind is not hashed, as it is not when a bucket is found: what is assigned as one is counted
        as one.
        """
        return hmac.digest(secret.encode(), self.key.encode(), "sha256").hex()[:32]


def facts_of(body: GenerationBody, context: Context) -> Facts:
    """What a request says of whom it comes from.

    Raises:
        ApiError: the header of the conversation is too long.
    """
    return Facts(
        headers=context.headers,
        caller=context.caller,
        request_id=context.request_id,
        user=body.user or body.safety_identifier,
        session=conversation_of(body, context.headers),
    )


def unit_of(chain: Iterable[str], facts: Facts) -> Unit | None:
    """The first link of the chain that the request has, an empty one being none."""
    for kind in chain:
        if key := _key(kind, facts):
            return Unit(kind, key)
    return None


def _key(kind: str, facts: Facts) -> str | None:
    if kind.startswith(HEADER_UNIT):
        return header_text(facts.headers.get(kind.removeprefix(HEADER_UNIT), ""))
    if kind == "api_key":
        return None if facts.caller is ANYBODY else facts.caller.name
    return {"user": facts.user, "session": facts.session, "request": facts.request_id}[kind]
