"""Small tensors for the comparisons with other libraries, and how mergekit is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeroute.adapters.delta import LowRank


def assert_same(ours: Tensor, theirs: Tensor, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal up to float32 sums of the same numbers in other orders; wider after an SVD."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def dense_deltas(*shape: int, experts: int = 3, seed: int = 0) -> list[Tensor]:
    """Random deltas; no two magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(experts)]


def low_ranks(
    o: int,
    i: int,
    *,
    rank: int,
    experts: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[LowRank]:
    """Random deltas in factors, with singular values that are well apart."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            torch.randn(o, rank, generator=generator, dtype=dtype),
            torch.randn(rank, i, generator=generator, dtype=dtype),
        )
        for _ in range(experts)
    ]


def rotation(size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random orthogonal matrix, [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype))[0]
    return q


def mergekit_delta(
    methods: Any, name: str, deltas: Sequence[Tensor], *, parameters: Mapping[str, Any]
) -> Tensor:
    """The merged delta as a mergekit method gives it, over a base of zeros.

    methods: the module mergekit.merge_methods.api.
    """
    tensors = [torch.zeros_like(deltas[0]), *deltas]
    merged: Tensor = methods.merge_tensors(tensors, name, base_index=0, parameters=parameters)
    return merged
