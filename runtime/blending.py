"""BlendPlan: how one forward blends, and what the layers of the running thread follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .gating import Routed

Part = Literal["inner", "embedding", "head", "vectors", "head_vectors"]
"""The layers that see the same rows and gates: inner linear layers; embeddings; the head, which
sees only the rows that are sampled; norms and biases; the head's bias."""


@dataclass(frozen=True)
class Segment:
    """Rows of the packed batch that share the rank slices they need."""

    start: int
    stop: int
    ranks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gated:
    """What layers of one part follow. gates: [rows, R]; of vectors [rows, slots], and the segments
    name all slots. Rows outside all segments stay on the backbone.
    routed: rows whose gates each layer adds to by its own input.
    """

    gates: Tensor
    segments: tuple[Segment, ...]
    routed: tuple[Routed, ...] = ()

    def of_layer(self, layer: str, x_rows: Tensor) -> Tensor:
        """The gates of one layer, [rows, R], for its input [rows, i]."""
        if not self.routed:
            return self.gates
        gates = self.gates.clone()
        for routed in self.routed:
            routed.add_to(gates, layer, x_rows)
        return gates


@dataclass(frozen=True)
class BlendPlan:
    """How one forward blends, by part of the model; None: the part stays on the backbone."""

    inner: Gated
    embedding: Gated | None = None
    head: Gated | None = None
    vectors: Gated | None = None
    head_vectors: Gated | None = None


class _Current(threading.local):
    plan: BlendPlan | None = None


_current = _Current()


@contextmanager
def blending(plan: BlendPlan | None) -> Iterator[None]:
    """Every blended layer that this thread runs in the block follows `plan`; None: the backbone."""
    _current.plan = plan
    try:
        yield
    finally:
        _current.plan = None


def followed(part: Part) -> Gated | None:
    """What the layers of a part follow now; None: the backbone."""
    plan = _current.plan
    gated: Gated | None = getattr(plan, part) if plan is not None else None
    return gated
