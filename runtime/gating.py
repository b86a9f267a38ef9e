"""Token-level routing: weights of modules that every layer takes from its own input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers.token_routing import TokenRouting
from .types import TokenGate

_BLOCK = 64
"""Tokens whose running means are one product."""


@dataclass(frozen=True, eq=False)
class LayerGate:
    """What tells the modules apart in one layer.

    directions: [k, m, i], float32; a module with fewer than k has zeros. singular: [k, m], how
    strongly each is amplified. members: which of the gate's modules the m are; the others do not
    change the layer, and have no say in it.
    """

    directions: Tensor
    singular: Tensor
    members: Sequence[int]

    def scores(self, x: Tensor, routing: TokenRouting) -> Tensor:
        """x [n, i], any float dtype, to a score per token and member, [n, m], float32; see
        `TokenRouting`.
        """
        x, width = x.float(), x.shape[1]
        if routing.method == "phatgoose":
            return F.linear(F.layer_norm(x, (width,)) / width**0.5, self.directions[0])
        if routing.norm == "unit":
            x = F.rms_norm(x, (width,))
        if routing.method == "arrow":
            return F.linear(x, self.directions[0]).abs()
        directions = self.directions[: routing.directions or None]
        found = F.linear(x, directions.flatten(0, 1)).view(-1, *directions.shape[:2])  # [n, k, m]
        if not routing.directions:
            found = found * self.singular
        return found.square().sum(1).sqrt()


@dataclass(frozen=True, eq=False)
class GateTable:
    """A gate with all that it needs to know of its modules, by layer; shared by its requests.

    layers: of gates with other settings too.
    """

    gate: TokenGate
    layers: Mapping[str, LayerGate]


@dataclass(eq=False)
class Smoother:
    """Running means of one sequence's scores, [m] by layer. A forward that fails changes nothing:
    what it leaves is `pending`, until the chunk is computed.
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)

    def smooth(self, layer: str, scores: Tensor, share: float) -> Tensor:
        """Scores [n, m] of the next tokens to their running means."""
        found = running_means(scores, self.means.get(layer), share=share)
        self.pending[layer] = found[-1].clone()
        return found

    def commit(self) -> None:
        """The tokens are computed."""
        self.means.update(self.pending)
        self.pending.clear()


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows of a packed batch that follow one gate.

    spread: which ranks belong to which of the gate's modules, [modules, R], ones and zeros.
    pieces: (first row, row behind the last, smoother) of each sequence, in order of the rows.
    """

    table: GateTable
    spread: Tensor
    pieces: Sequence[tuple[int, int, Smoother | None]]

    def add_to(self, gates: Tensor, layer: str, x_rows: Tensor) -> None:
        """Add the modules' weights to gates [t, R], as a layer's input x_rows [t, i] has them."""
        own = self.table.layers.get(layer)
        if own is None:
            return
        routing, rows = self.table.gate.routing, self.rows
        found = own.scores(x_rows[rows], routing)
        if routing.smoothing:
            found = self._smoothed(layer, found)
        is_whole = len(own.members) == len(self.spread)
        spread = self.spread if is_whole else self.spread[own.members]
        gates[rows] += weights(found, routing).to(gates) @ spread

    @cached_property
    def rows(self) -> slice | list[int]:
        """Where they lie: a slice, or one by one."""
        first, last = self.pieces[0][0], self.pieces[-1][1]
        if last - first == sum(stop - start for start, stop, _ in self.pieces):
            return slice(first, last)
        return [row for start, stop, _ in self.pieces for row in range(start, stop)]

    def _smoothed(self, layer: str, scores: Tensor) -> Tensor:
        """Running means [n, m] of scores; sequences that decode come first, and are one product."""
        smoothers = [smoother for _, _, smoother in self.pieces if smoother is not None]
        counts = [stop - start for start, stop, _ in self.pieces]
        share, parts = self.table.gate.routing.smoothing, []
        ready = zip(smoothers, counts, strict=True)
        decodes = len(list(takewhile(lambda one: one[1] == 1 and layer in one[0].means, ready)))
        if decodes:
            before = torch.stack([smoother.means[layer] for smoother in smoothers[:decodes]])
            parts.append(share * before + (1 - share) * scores[:decodes])
            for smoother, mean in zip(smoothers, parts[0].unbind(), strict=False):
                smoother.pending[layer] = mean
        rest = torch.split(scores[decodes:], counts[decodes:])
        for smoother, own in zip(smoothers[decodes:], rest, strict=True):
            parts.append(smoother.smooth(layer, own, share))
        return torch.cat(parts)


def weights(scores: Tensor, routing: TokenRouting) -> Tensor:
    """Scores [n, m] to weights [n, m]: the softmax of the `top_k` best, others zero. They add up to
    1, or to less where the softmax has a slot for the backbone.
    """
    modules = scores.shape[1]
    if 0 < (routing.top_k or 0) < modules:
        best = scores.topk(routing.top_k or 0, dim=1)
        scores = torch.full_like(scores, -torch.inf).scatter(1, best.indices, best.values)
    if routing.none is not None:
        scores = F.pad(scores, (0, 1), value=routing.none)
    return (scores / routing.temperature).softmax(1)[:, :modules]


def running_means(scores: Tensor, before: Tensor | None, *, share: float) -> Tensor:
    """Mean m[t] = share m[t-1] + (1 - share) s[t] of scores [n, m]; the first token of all is its
    own mean.

    before: the mean [m] so far; None at the beginning. share: in [0, 1).
    """
    mean = scores[0] if before is None else before
    found = []
    for block in torch.split(scores, _BLOCK):
        steps = torch.arange(1, block.shape[0] + 1, device=scores.device)
        ages = steps[:, None] - steps  # [n, n], below 0 in the future
        shares = (1 - share) * share ** ages.clamp(min=0).to(scores) * (ages >= 0)
        found.append(shares @ block + share ** steps[:, None].to(scores) * mean)
        mean = found[-1][-1]
    return torch.cat(found)
