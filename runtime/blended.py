"""BlendedLinear and the resident stack of modules: y = x Wᵀ + ((x Aᵀ) * g) B.

All resident modules share one pair of matrices per layer: A [R, i] and B [R, o], where a module is
a contiguous slice of the R ranks. A row's gates g [R] hold its blend's weight at every rank of the
module and zero elsewhere, so that one batch mixes any blends.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.backbone import linear_layers
from ..adapters.blend import Blend
from ..adapters.delta import LowRank
from ..adapters.errors import ModuleError
from ..adapters.lora import Module

WHOLE_STACK_SHARE = 2 / 3
"""Above this share of active ranks one pass over the whole stack beats a loop over slices."""

_GROWTH = 1.25


@dataclass(frozen=True)
class Segment:
    """Rows of the packed batch that share the rank slices they need."""

    start: int
    stop: int
    ranks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlendPlan:
    """How one forward blends. gates: [t, R]. Rows outside all segments stay on the backbone."""

    gates: Tensor
    segments: tuple[Segment, ...]


class _Current(threading.local):
    plan: BlendPlan | None = None


_current = _Current()


@contextmanager
def blending(plan: BlendPlan | None) -> Iterator[None]:
    """Every BlendedLinear that this thread runs in the block follows `plan`; None: the backbone."""
    _current.plan = plan
    try:
        yield
    finally:
        _current.plan = None


class BlendedLinear(nn.Module):
    """A linear layer (nn.Linear, or GPT-2's Conv1D) plus the gated sum of resident deltas."""

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, out_features: int, in_features: int) -> None:
        super().__init__()
        self.base = base
        self.out_features = out_features
        self.in_features = in_features
        weight = self.weight
        self.register_buffer("a", weight.new_zeros(0, in_features), persistent=False)
        self.register_buffer("b", weight.new_zeros(0, out_features), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The backbone's weight: model code looks at its dtype and device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The backbone's bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] to [..., o]."""
        y: Tensor = self.base(x)
        plan = _current.plan
        if plan is None:
            return y
        x_rows, y_rows = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        for segment in plan.segments:
            rows = slice(segment.start, segment.stop)
            for low, high in segment.ranks:
                shrunk = F.linear(x_rows[rows], self.a[low:high])  # [rows, ranks]
                shrunk.mul_(plan.gates[rows, low:high])
                y_rows[rows].addmm_(shrunk, self.b[low:high])
        return y

    def resize(self, ranks: int) -> None:
        """Make room for `ranks` ranks; what is there stays, new ranks are zero."""
        self.a, self.b = _resized(self.a, ranks), _resized(self.b, ranks)


@dataclass(frozen=True)
class PreparedModule:
    """A module ready to be copied in.

    factors: A [r, i] and B [r, o] by layer, in the model's dtype.
    """

    digest: str
    rank: int
    factors: Mapping[str, tuple[Tensor, Tensor]]


class ModuleStack:
    """The modules that are resident in a model, by digest. Not thread-safe: one thread changes it.

    Layers become BlendedLinear once the first module changes them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = linear_layers(model)
        self._model = model
        self._layers: dict[str, BlendedLinear] = {}
        self._slices: dict[str, tuple[int, int]] = {}
        self._capacity = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._slices

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def ranks(self) -> int:
        """R: the ranks in use, holes left by removed modules included."""
        return max((high for _, high in self._slices.values()), default=0)

    def prepare(self, module: Module) -> PreparedModule:
        """Check a module and bring it into the model's dtype; changes nothing, in any thread.

        Raises:
            ModuleError: it does not fit the model's layers or its dtype.
        """
        module.check(self.shapes)
        dtype = next(self._model.parameters()).dtype
        factors = {n: _factors(d, dtype, where=n) for n, d in module.deltas.items()}
        return PreparedModule(module.digest, module.rank, factors)

    def add(self, module: PreparedModule) -> None:
        """Copy a module's factors into free ranks."""
        low = self._free_slice(module.rank)
        self._reserve(low + module.rank)
        for name in module.factors.keys() - self._layers.keys():
            self._layers[name] = self._install(name)
        for name, layer in self._layers.items():
            layer.a[low : low + module.rank] = 0
            layer.b[low : low + module.rank] = 0
            if name in module.factors:
                a, b = module.factors[name]
                layer.a[low : low + a.shape[0]] = a.to(layer.a)
                layer.b[low : low + b.shape[0]] = b.to(layer.b)
        self._slices[module.digest] = (low, low + module.rank)

    def remove(self, digest: str) -> None:
        """Give a module's ranks back. An empty stack gives its memory back too."""
        del self._slices[digest]
        if not self._slices:
            self._capacity = 0
            for layer in self._layers.values():
                layer.resize(0)

    def gates(self, blend: Blend) -> Tensor:
        """A blend over digests as gates, [R], in the model's dtype and on its device."""
        gates = next(self._model.parameters()).new_zeros(self.ranks)
        for digest, weight in blend.items():
            low, high = self._slices[digest]
            gates[low:high] = weight
        return gates

    def rank_slices(self, blends: Sequence[Blend]) -> tuple[tuple[int, int], ...]:
        """The slices that rows with these blends need: neighbours joined, or the whole stack."""
        active = sorted(self._slices[digest] for digest in {d for blend in blends for d in blend})
        joined: list[tuple[int, int]] = []
        for low, high in active:
            if joined and joined[-1][1] == low:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        needed = sum(high - low for low, high in joined)
        if needed > WHOLE_STACK_SHARE * self.ranks:
            return ((0, self.ranks),)
        return tuple(joined)

    def _free_slice(self, rank: int) -> int:
        """Where `rank` free ranks begin: the first hole that fits, else the end."""
        low = 0
        for start, stop in sorted(self._slices.values()):
            if start - low >= rank:
                return low
            low = stop
        return low

    def _reserve(self, ranks: int) -> None:
        """Make room in every layer; one that was left behind by a failure catches up."""
        if ranks > self._capacity:
            capacity = max(ranks, int(self._capacity * _GROWTH))
            for layer in self._layers.values():
                layer.resize(capacity)
            self._capacity = capacity

    def _install(self, name: str) -> BlendedLinear:
        parent_name, _, leaf = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        layer = BlendedLinear(getattr(parent, leaf), *self.shapes[name])
        layer.resize(self._capacity)
        setattr(parent, leaf, layer)
        return layer


def _factors(delta: LowRank, dtype: torch.dtype, *, where: str) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [r, o] of a delta in the model's dtype, with no entry of A above 1.

    A row of the batch is multiplied by all the ranks that its neighbours need, then by gates of
    zero: what overflows there would be NaN in the neighbour. The power of two that goes from A
    to B keeps every bit.
    """
    peak = float(delta.right.abs().max()) if delta.rank else 0.0
    exponent = max(0, math.frexp(peak)[1])
    a = (delta.right.double() * 2.0**-exponent).to(dtype)
    b = (delta.left.T.double() * 2.0**exponent).to(dtype)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModuleError(
            f"the change of {where!r} is too large for {dtype}: its training diverged"
        )
    return a, b


def _resized(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows
    kept = min(rows.shape[0], count)
    new = rows.new_zeros(count, rows.shape[1])
    new[:kept] = rows[:kept]
    return new


@torch.no_grad()
def merge_into(model: nn.Module, modules: Mapping[str, Module], blend: Blend) -> None:
    """Add a blend's deltas to the weights for good: W += sum of w B A. The reference for tests.

    modules: by the names that the blend uses. The model's layers must be plain.
    """
    for name, weight in blend.items():
        for layer_name, delta in modules[name].deltas.items():
            parameter = model.get_submodule(layer_name).weight
            assert isinstance(parameter, Tensor)
            change = delta.dense().to(parameter)
            is_transposed = not isinstance(model.get_submodule(layer_name), nn.Linear)
            parameter.add_(change.T if is_transposed else change, alpha=weight)
