"""LowRank: the change of one weight matrix in factors, and its algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change `left @ right` of one weight matrix, every scale folded in.

    left: [o, r]. right: [r, i]. Same dtype and device.

    Raises:
        ValueError: the factors are not matrices or their ranks differ.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"factors of shape {tuple(self.left.shape)} and {tuple(self.right.shape)} do not "
                "multiply: left is [out, rank], right is [rank, in]"
            )

    @property
    def rank(self) -> int:
        """Number of components stored, not the numerical rank."""
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i) of the matrix that is changed."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def equals(self, other: LowRank) -> bool:
        """Whether both have the same factors, entry for entry."""
        return torch.equal(self.left, other.left) and torch.equal(self.right, other.right)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., i] to its change [..., o]."""
        return (x @ self.right.T) @ self.left.T

    def dense(self) -> Tensor:
        """The matrix itself, [o, i]."""
        return self.left @ self.right

    def scaled(self, factor: float) -> LowRank:
        """The change times `factor`."""
        return LowRank(self.left * factor, self.right)

    def norm(self) -> float:
        """Frobenius norm, in factor space: |BA|² = sum((BᵀB) * (AAᵀ))."""
        return math.sqrt(max(self.inner(self), 0.0))  # in this order NaN stays NaN

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product, in factor space and float64: sum((BᵀB') * (AA'ᵀ))."""
        lefts = self.left.double().T @ other.left.double()
        return float((lefts * (self.right.double() @ other.right.double().T)).sum())

    def svd(self, *, rtol: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """U [o, k], S [k] in descending order and Vᵀ [k, i] of the change, in float64, without
        forming the dense matrix.

        rtol: singular values up to this share of the largest are dropped, in [0, 1); zeros always
            are, so that a change that is zero has k = 0.

        Source: QR of both factors and an SVD of the r x r core; Golub and Van Loan, 5.4.
        """
        u, singular, vt = _svd(self.left.double(), self.right.double())
        kept = int((singular > rtol * singular[:1]).sum())
        return u[:, :kept], singular[:kept], vt[:kept]

    @classmethod
    def from_svd(cls, u: Tensor, singular: Tensor, vt: Tensor) -> LowRank:
        """Balanced factors: the square root of each singular value on either side.

        u: [o, k]. singular: [k], at least 0. vt: [k, i].
        """
        root = singular.sqrt()
        return cls(u * root, root[:, None] * vt)

    def compact(self, *, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The best approximation of a lower rank, in balanced factors (the square root of each
        singular value on either side), computed in float32 without forming the dense matrix.

        rank: components to keep, at least 1; more than there are keeps all.
        energy: share of the squared singular values to keep, in (0, 1].

        Raises:
            ValueError: neither or both are given, or one is out of range.

        Source: QR of both factors and an SVD of the r x r core; Golub and Van Loan, 5.4.
        """
        if (rank is None) == (energy is None):
            raise ValueError("give either rank or energy")
        u, singular, vt = _svd(self.left.float(), self.right.float())
        kept = _kept(singular, rank=rank, energy=energy)
        compact = LowRank.from_svd(u[:, :kept], singular[:kept], vt[:kept])
        return LowRank(compact.left.to(self.left.dtype), compact.right.to(self.right.dtype))


def concat(deltas: Sequence[LowRank]) -> LowRank:
    """The exact sum of changes of one matrix: factors side by side, ranks added.

    Raises:
        ValueError: no deltas, or they change matrices of different shapes.
    """
    if not deltas:
        raise ValueError("nothing to concatenate")
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"deltas of different shapes {sorted(shapes)} cannot be summed")
    return LowRank(torch.cat([d.left for d in deltas], 1), torch.cat([d.right for d in deltas], 0))


def _svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.T)
    u, singular, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left_basis @ u, singular, vt @ right_basis.T


def _kept(singular: Tensor, *, rank: int | None, energy: float | None) -> int:
    if rank is not None:
        if rank < 1:
            raise ValueError(f"rank {rank} is out of range: at least 1")
        return min(rank, singular.numel())
    assert energy is not None
    if not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is out of range: in (0, 1]")
    shares = singular.double().square().cumsum(0)
    total = shares[-1].item()
    return 1 + int((shares < energy * total * (1 - 1e-12)).sum())
