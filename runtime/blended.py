"""Layers with resident modules: BlendedLinear, BlendedEmbedding and BlendedVectors.

All resident modules share one pair of matrices per layer: A [R, i] and B [R, o], where a module is
a contiguous slice of the R ranks. A row's gates g [R] hold its blend's weight at every rank of the
module and zero elsewhere, so that one batch mixes any blends: y = x Wᵀ + ((x Aᵀ) * g) B. Where
modules are weighed by token, a linear layer adds to g what it takes from x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blending import Part, Segment, followed


class Blended(nn.Module):
    """A layer of the backbone in whose place this one stands.

    part: which part of the plan it follows.
    """

    def __init__(self, base: nn.Module, *, part: Part) -> None:
        super().__init__()
        self.base = base
        self.part = part

    @property
    def weight(self) -> Tensor:
        """The backbone's weight: model code looks at its dtype and device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The backbone's bias."""
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias


class BlendedMatrix(Blended):
    """A layer with one matrix and the factors of its changes: A [R, i] and B [R, o]."""

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, *, in_features: int, out_features: int, part: Part) -> None:
        super().__init__(base, part=part)
        self.in_features = in_features
        self.out_features = out_features
        weight = self.weight
        self.register_buffer("a", weight.new_zeros(0, in_features), persistent=False)
        self.register_buffer("b", weight.new_zeros(0, out_features), persistent=False)

    @property
    def rows(self) -> int:
        """How many ranks there is room for."""
        return len(self.a)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.a, self.b

    def resize(self, ranks: int) -> None:
        """Make room for `ranks` ranks; what is there stays, new ranks hold anything."""
        self.a, self.b = resized(self.a, ranks), resized(self.b, ranks)


class BlendedLinear(BlendedMatrix):
    """A linear layer (nn.Linear, or GPT-2's Conv1D) plus the gated sum of resident deltas.

    name: in the model.
    """

    def __init__(
        self, base: nn.Module, *, name: str, in_features: int, out_features: int, part: Part
    ) -> None:
        super().__init__(base, in_features=in_features, out_features=out_features, part=part)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] to [..., o]."""
        y: Tensor = self.base(x)
        gated = followed(self.part)
        if gated is None or not self.rows:
            return y
        x_rows, y_rows = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        gates = gated.of_layer(self.name, x_rows)
        add_gated(y_rows, x_rows, self.tensors, gated.segments, gates)
        return y


class BlendedEmbedding(BlendedMatrix):
    """An embedding plus the gated sum of resident deltas: y = s (W[ids] + (A[:, ids]ᵀ * g) B).

    scale: s, by which some architectures multiply what they look up.
    """

    def __init__(self, base: nn.Module, *, rows: int, width: int, scale: float) -> None:
        super().__init__(base, in_features=rows, out_features=width, part="embedding")
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] to [..., d]."""
        y: Tensor = self.base(ids)
        gated = followed(self.part)
        if gated is None or not self.rows:
            return y
        id_rows, y_rows = ids.reshape(-1), y.view(-1, self.out_features)
        for segment in gated.segments:
            rows = slice(segment.start, segment.stop)
            for low, high in segment.ranks:
                picked = self.a[low:high].index_select(1, id_rows[rows]).T  # [rows, ranks]
                picked = picked * gated.gates[rows, low:high]
                y_rows[rows].addmm_(picked, self.b[low:high], alpha=self.scale)
        return y


class BlendedVectors(Blended):
    """A norm or a linear layer plus the gated sum of changes of its weight vector and its bias.

    A norm's output is affine in its weight: y(w + δ) = y(w) + δ * x̂. The changes lie in one row per
    slot, [slots, size], and a module has one slot in all layers.

    unit: the same norm with such a weight that it gives x̂; None where no weight changes.
    row_dim: dimension of the input along which the packed rows lie.
    """

    weights: Tensor
    biases: Tensor

    def __init__(
        self, base: nn.Module, *, unit: nn.Module | None, row_dim: int, part: Part
    ) -> None:
        super().__init__(base, part=part)
        self.unit = unit
        self.row_dim = row_dim
        weight, bias = self.weight, self.bias
        self.register_buffer(
            "weights", _no_rows(weight if unit else None, weight), persistent=False
        )
        self.register_buffer("biases", _no_rows(bias, weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] to [..., o], with the packed rows along `row_dim`."""
        y: Tensor = self.base(x)
        gated = followed(self.part)
        if gated is None or not self.rows:
            return y
        for segment in gated.segments:
            place = self.row_dim, segment.start, segment.stop - segment.start
            gates, rows = gated.gates[segment.start : segment.stop], y.narrow(*place)
            if self.unit is not None:
                rows.addcmul_(self._summed(self.weights, gates, y), self.unit(x.narrow(*place)))
            if self.biases.shape[1]:
                rows.add_(self._summed(self.biases, gates, y))
        return y

    @property
    def rows(self) -> int:
        """How many slots there is room for."""
        return len(self.biases)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The changes of weights and of biases."""
        return self.weights, self.biases

    def resize(self, slots: int) -> None:
        """Make room for `slots` slots; what is there stays, new slots are zero."""
        before = self.rows
        self.weights, self.biases = resized(self.weights, slots), resized(self.biases, slots)
        self.clear(before, slots)

    def clear(self, first: int, stop: int) -> None:
        """Forget what slots hold."""
        self.weights[first:stop] = 0
        self.biases[first:stop] = 0

    def _summed(self, changes: Tensor, gates: Tensor, y: Tensor) -> Tensor:
        """The blends' changes, one per row, in a shape that spreads over y."""
        summed = gates.to(changes) @ changes[: gates.shape[1]]  # [rows, size]
        shape = [1] * y.ndim
        shape[self.row_dim], shape[-1] = summed.shape
        return summed.view(shape)


def add_gated(
    y: Tensor,
    x: Tensor,
    factors: tuple[Tensor, Tensor],
    segments: Iterable[Segment],
    gates: Tensor,
) -> None:
    """Add to y [rows, o] what stacked deltas make of x [rows, i]: ((x Aᵀ) * g) B.

    factors: A [R, i] and B [R, o]. segments: the rows that have any, and which of the R ranks.
    gates: [rows, R].
    """
    a, b = factors
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        for low, high in segment.ranks:
            shrunk = F.linear(x[rows], a[low:high])  # [rows, ranks]
            shrunk.mul_(gates[rows, low:high])
            y[rows].addmm_(shrunk, b[low:high])


def resized(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows; those that are new hold anything."""
    if rows.shape[0] == count:
        return rows
    kept = min(rows.shape[0], count)
    new = rows.new_empty(count, rows.shape[1])
    new[:kept] = rows[:kept]
    return new


def gather(tensors: Iterable[Tensor], index: Sequence[int]) -> None:
    """Bring rows to the front, rows[:n] = rows[index], of all tensors that have any. What it takes
    of memory it takes before the first is moved.
    """
    filled = [rows for rows in tensors if len(rows)]
    if not filled:
        return
    device, count = filled[0].device, len(index)
    chosen = torch.tensor(index, dtype=torch.long, device=device)
    most = max(rows.shape[1] * rows.itemsize for rows in filled)
    scratch = torch.empty(count * most, dtype=torch.uint8, device=device)
    for rows in filled:
        size = count * rows.shape[1] * rows.itemsize
        moved = scratch[:size].view(rows.dtype).view(count, rows.shape[1])
        rows[:count] = torch.index_select(rows, 0, chosen, out=moved)


def _no_rows(vector: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(0, 0 if vector is None else vector.shape[0])
