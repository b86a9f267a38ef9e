"""LowRank: the change of one weight matrix in factors, and its algebra."""

from __future__ import annotations

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
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())

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
        left_basis, left_core = torch.linalg.qr(self.left.float())
        right_basis, right_core = torch.linalg.qr(self.right.float().T)
        u, singular, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        kept = _kept(singular, rank=rank, energy=energy)
        root = singular[:kept].sqrt()
        left = (left_basis @ u[:, :kept]) * root
        right = root[:, None] * (vt[:kept] @ right_basis.T)
        return LowRank(left.to(self.left.dtype), right.to(self.right.dtype))


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
