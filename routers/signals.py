"""What of a prompt a scorer looks at."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Encode, Query, Signal
from .settings import DEFAULT_WINDOW

POOLINGS = ("mean", "last", "both")
CACHED_PROMPTS = 4096
Items = TypeVar("Items", str, tuple[int, ...])


@dataclass(frozen=True)
class HiddenState:
    """The backbone's hidden states after some of its first layers, pooled over the prompt's tokens
    and put side by side.

    encode: runs the layers, with the engine's own weights. layers: each at least 1.
    pooling: `mean` over all tokens, the `last` token, or `both`.
    window: most tokens that are looked at: of a longer prompt the beginning and the end, half each.

    Raises:
        RouterError: another pooling, no layer or one below 1, or a window below 2.
    """

    encode: Encode
    layers: tuple[int, ...]
    pooling: str = "mean"
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RouterError(f"pooling {self.pooling!r} is unknown: {', '.join(POOLINGS)}")
        if not self.layers or min(self.layers) < 1:
            raise RouterError(f"layers {list(self.layers)} are out of range: each is at least 1")
        if self.window < 2:
            raise RouterError(f"window {self.window} is out of range: at least 2 tokens")

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The pooled hidden states, [n, layers * hidden], twice as wide for both poolings."""
        prompts = [shortened(query.token_ids, self.window) for query in queries]
        if not all(prompts):
            raise RouterError("an empty prompt has no hidden state: give at least one token")
        return torch.stack([self._pooled(states) for states in self.encode(prompts, self.layers)])

    def _pooled(self, states: Tensor) -> Tensor:
        """[layers, t, hidden] to [d]."""
        views = []
        if self.pooling != "last":
            views.append(states.mean(1))
        if self.pooling != "mean":
            views.append(states[:, -1])
        return torch.cat([view.flatten() for view in views]).float().cpu()


@dataclass(frozen=True)
class Joined:
    """Several signals side by side."""

    signals: tuple[Signal, ...]

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The signals' features, [n, d] with d the sum of theirs."""
        return torch.cat([signal.read(queries) for signal in self.signals], 1)


@dataclass(frozen=True)
class Recency:
    """A signal over all turns of a conversation: their mean, each turn weighted by its age.

    decay: weight of a turn relative to the one after it, in (0, 1).

    Raises:
        RouterError: decay is out of range.
    """

    signal: Signal
    decay: float

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise RouterError(f"recency {self.decay:g} is out of range: between 0 and 1")

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The turns' weighted mean, [n, d]."""
        return torch.stack([self._mean(query) for query in queries])

    def _mean(self, query: Query) -> Tensor:
        turns = [self.signal.read([Query((turn,), query.labels)]) for turn in query.turns]
        ages = torch.arange(len(query.turns) - 1, -1, -1)
        weights = self.decay**ages
        return (weights / weights.sum()) @ torch.cat(turns)


@dataclass(frozen=True, eq=False)
class Cached:
    """A signal that is read once per prompt: features of the latest prompts, by digest of their
    last turn. Scorers that share the object share its readings.

    capacity: most prompts that are remembered. Any thread may read.
    """

    signal: Signal
    capacity: int = CACHED_PROMPTS
    _found: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The signal's features, [n, d]."""
        keys = [_digest(query) for query in queries]
        with self._lock:
            known = {key: self._found[key] for key in keys if key in self._found}
        missing = {key: q for key, q in zip(keys, queries, strict=True) if key not in known}
        if missing:
            rows = self.signal.read([*missing.values()])
            # a row is a view, by which all of the batch would be kept as long as any of it
            known |= {key: row.clone() for key, row in zip(missing, rows, strict=True)}
        with self._lock:
            for key in dict.fromkeys(keys):
                self._found[key] = known[key]
                self._found.move_to_end(key)
            while len(self._found) > self.capacity:
                self._found.popitem(last=False)
        return torch.stack([known[key] for key in keys])


def check_width(features: Tensor, width: int) -> None:
    """Features [n, d] are as many as a scorer was fitted on.

    Raises:
        RouterError: they are not.
    """
    if features.shape[1] != width:
        raise RouterError(
            f"the signal gives {features.shape[1]} features, the router was fitted on {width}: fit "
            "it again, or give it the signal that it was fitted on"
        )


def shortened(items: Items, count: int) -> Items:
    """At most `count` of a text or of token ids: the beginning and the end, half each."""
    half = count // 2
    return items if len(items) <= count else items[: count - half] + items[-half:]


def _digest(query: Query) -> bytes:
    turn = query.turns[-1]
    ids = torch.tensor(turn.token_ids, dtype=torch.long).numpy().tobytes()
    text = turn.text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(len(ids).to_bytes(8, "big") + ids + text, digest_size=16).digest()
