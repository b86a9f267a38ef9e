"""API keys: what is known of them, and whose a token is. The keys themselves are nowhere stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .callers import Caller, Scope

PREFIX = "mr-"
_TOKEN_BYTES = 32


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Key(BaseModel):
    """What the file of keys says of one.

    hash: of the key. SHA-256 is enough, since a key is 256 random bits: nothing can be guessed that
    a slow hash would protect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="whose it is")
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$", description="SHA-256 of the key")
    scopes: frozenset[Scope] = Field(frozenset(("inference",)), description="what it may do")
    targets: frozenset[str] | None = Field(None, description="what `model` may name; all if absent")
    requests_per_minute: int | None = Field(None, ge=1, description="most requests in a minute")
    tokens_per_minute: int | None = Field(None, ge=1, description="most tokens in a minute")
    expires: Annotated[datetime, AfterValidator(_in_utc)] | None = Field(
        None, description="when it ends; UTC unless it says otherwise"
    )

    @property
    def caller(self) -> Caller:
        """Who asks with it."""
        return Caller(self.name, self.scopes, self.targets)

    def is_valid(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires


def new_token() -> str:
    """A key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)


def token_hash(token: bytes) -> str:
    """What is stored of a key."""
    return f"sha256:{hashlib.sha256(token).hexdigest()}"


def find_key(keys: Sequence[Key], token: bytes) -> Key | None:
    """The key that a token is. Every key is compared, each in constant time, so that the time tells
    nothing of which one was near; an expired one is no key.
    """
    given, now = token_hash(token), datetime.now(UTC)
    matches = [key for key in keys if hmac.compare_digest(key.hash, given)]
    return next((key for key in matches if key.is_valid(now)), None)
