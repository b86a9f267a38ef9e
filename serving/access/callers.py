"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["inference", "admin"]


@dataclass(frozen=True)
class Caller:
    """Who asks: the holder of an API key, or anybody where no keys are set.

    name: the key's, never the key. scopes: what it may do. targets: what its requests may name;
    None: everything.
    """

    name: str
    scopes: frozenset[Scope]
    targets: frozenset[str] | None = None


ANYBODY = Caller("anybody", frozenset(("inference", "admin")))
