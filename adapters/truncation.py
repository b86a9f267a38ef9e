"""The nearest delta of low rank: of a dense matrix, of factors, or as seen through its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import LowRank, concat

EXACT_SIZE = 2048
"""A matrix whose smaller side is at most this is decomposed exactly."""

_RIDGE = 0.01
_OVERSAMPLING = 32
_POWER_ITERATIONS = 4


def truncated(
    change: Tensor | LowRank,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moment: Tensor | None = None,
) -> LowRank:
    """The nearest delta of a rank, or of the smallest rank that keeps a share of the energy.

    change: [o, i]. rank: 0 gives an empty delta. energy: in (0, 1].
    moment: [i, i], mean of x xᵀ over the layer's inputs: the change of the *outputs* on such inputs
    is then kept closest, instead of the weights.

    Returns balanced factors in float32, components in order of what they keep.

    Source: Eckart and Young 1936; with a moment, Wang et al. 2024, SVD-LLM, arXiv:2403.07378,
    section 3.1: SVD of the change times the moment's Cholesky factor.
    """
    if rank == 0:
        like = change.left if isinstance(change, LowRank) else change
        o, i = change.shape
        return LowRank(like.new_zeros(o, 0).float(), like.new_zeros(0, i).float())
    if moment is None:
        return _decomposed(change, rank, energy)
    root = _root(moment)
    found = _decomposed(_times(change, root), rank, energy)
    right = torch.linalg.solve_triangular(root, found.right.to(root), upper=False, left=False)
    return LowRank(found.left, right.to(found.left)).compact(rank=found.rank)


def spectrum(change: Tensor | LowRank, *, moment: Tensor | None = None) -> Tensor:
    """The singular values of a change [o, i], descending; times the moment's factor, if given."""
    if moment is not None:
        change = _times(change, _root(moment))
    if isinstance(change, Tensor):
        values: Tensor = torch.linalg.svdvals(change.float())
        return values
    whole = change.compact(rank=max(1, change.rank))
    norms: Tensor = whole.left.norm(dim=0) * whole.right.norm(dim=1)
    return norms


def on(delta: LowRank, device: torch.device | str) -> LowRank:
    """The same delta on a device."""
    return LowRank(delta.left.to(device), delta.right.to(device))


def distance(change: Tensor | LowRank, other: Tensor | LowRank | None = None) -> float:
    """Frobenius norm of a change, or of its difference from another one."""
    if other is None:
        return change.norm() if isinstance(change, LowRank) else float(change.norm())
    if isinstance(change, LowRank) and isinstance(other, LowRank):
        return concat([change, other.scaled(-1)]).norm()
    return float((_dense(change) - _dense(other)).norm())


def _decomposed(change: Tensor | LowRank, rank: int | None, energy: float | None) -> LowRank:
    """Truncate by rank or energy."""
    if isinstance(change, LowRank):
        return LowRank(change.left.float(), change.right.float()).compact(rank=rank, energy=energy)
    dense = change.float()
    smaller = min(dense.shape)
    if rank is not None and smaller > EXACT_SIZE and rank + _OVERSAMPLING < smaller // 4:
        return _randomised(dense, rank)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    root = s.sqrt()
    whole = LowRank(u * root, root[:, None] * vt)
    if rank is not None:
        return LowRank(whole.left[:, :rank].contiguous(), whole.right[:rank].contiguous())
    shares = s.double().square().cumsum(0)
    assert energy is not None
    kept = 1 + int((shares < energy * shares[-1] * (1 - 1e-12)).sum())
    return LowRank(whole.left[:, :kept].contiguous(), whole.right[:kept].contiguous())


def _randomised(dense: Tensor, rank: int) -> LowRank:
    """Truncated SVD by random projections, the same on every call.

    Source: Halko et al. 2011, Finding structure with randomness, arXiv:0909.4061, algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(dense.shape[1], rank + _OVERSAMPLING, generator=generator).to(dense)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(dense @ basis).Q
        basis = torch.linalg.qr(dense.T @ basis).Q
    return LowRank(dense @ basis, basis.T.contiguous()).compact(rank=rank)


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor of a moment, raised a little so that no direction counts nothing."""
    moment = moment.double()
    mean = moment.diagonal().mean()
    scale = mean if mean > 0 else torch.ones_like(mean)  # no inputs at all: any is as likely
    ridge = _RIDGE * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root: Tensor = scale.sqrt() * torch.linalg.cholesky(moment / scale + ridge)
    return root


def _times(change: Tensor | LowRank, root: Tensor) -> Tensor | LowRank:
    if isinstance(change, LowRank):
        return LowRank(change.left.double(), change.right.double() @ root)
    return (change.double() @ root.to(change.device)).float()


def _dense(change: Tensor | LowRank) -> Tensor:
    return change.dense().float() if isinstance(change, LowRank) else change
