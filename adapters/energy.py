"""Energy: how a change spreads over its singular components, and how alike changes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import LowRank, concat
from .merging.stack import rows_per_block
from .truncation import spectrum


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a change, [k], descending, not all zero."""

    values: Tensor

    @classmethod
    def of(cls, change: Tensor | LowRank) -> Spectrum | None:
        """The spectrum of a matrix, [o, i]; None if it is zero.

        A dense matrix is read off its smaller Gram matrix in float64, which is as exact as an SVD
        in float32, and faster where the matrix is large.
        """
        if isinstance(change, LowRank):
            values = spectrum(change) if change.rank else torch.zeros(0)
        else:
            values = _from_gram(change)
        return cls(values.float()) if values.any() else None

    @property
    def energy(self) -> Tensor:
        """Share of the energy, the squared singular values, in the first 1, 2, ... k components.

        [k], float64, ascending to 1.
        """
        sums = self.values.double().square().cumsum(0)
        return sums / sums[-1]

    def kept(self, rank: int) -> float:
        """Share of the energy that the best approximation of a rank keeps. rank: at least 1."""
        return float(self.energy[min(rank, len(self.values)) - 1])

    def rank_for(self, share: float) -> int:
        """The effective rank: how few components hold a share of the energy, in (0, 1]."""
        return 1 + int((self.energy < share * (1 - 1e-12)).sum())

    def curve(self) -> dict[int, float]:
        """Share of the energy by rank, at `curve_ranks`."""
        energy = self.energy
        return {rank: float(energy[rank - 1]) for rank in curve_ranks(len(energy))}


def curve_ranks(size: int) -> list[int]:
    """Powers of two and the numbers halfway between, up to a size, and the size itself."""
    return sorted({rank for rank in _steps(size) if rank < size} | {size})


def gram(deltas: Sequence[LowRank]) -> Tensor:
    """Inner products of changes of one matrix, [T, T], float64, in factor space.

    Raises:
        ValueError: no deltas, or they change matrices of different shapes.
    """
    whole = concat(deltas)
    left, right = whole.left.double(), whole.right.double()
    products = (left.T @ left) * (right @ right.T)  # [R, R]
    owners = torch.arange(len(deltas)).repeat_interleave(torch.tensor([d.rank for d in deltas]))
    sums = torch.nn.functional.one_hot(owners, len(deltas)).to(products)  # [R, T]
    return sums.T @ products @ sums


def cosines(inner: Tensor) -> Tensor:
    """Cosines [T, T] of changes with inner products [T, T]; NaN where one of the two is zero."""
    norms = inner.diagonal().clamp_min(0).sqrt()
    cosine = (inner / norms.outer(norms)).clamp(-1, 1).fill_diagonal_(1)
    is_zero = norms == 0
    cosine[is_zero] = torch.nan
    cosine[:, is_zero] = torch.nan
    return cosine


def _from_gram(change: Tensor) -> Tensor:
    """Singular values: roots of the eigenvalues of the smaller of xᵀx and x xᵀ, float64."""
    long = change if change.shape[0] >= change.shape[1] else change.T
    inner = torch.zeros(long.shape[1], long.shape[1], dtype=torch.float64, device=long.device)
    rows = rows_per_block(long.shape[1])
    for start in range(0, long.shape[0], rows):
        block = long[start : start + rows].double()
        inner.addmm_(block.T, block)
    values: Tensor = torch.linalg.eigvalsh(inner)
    return values.clamp_min(0).sqrt().flip(0)


def _steps(size: int) -> Iterator[int]:
    power = 1
    while power < size:
        yield power
        yield power + power // 2
        power *= 2
