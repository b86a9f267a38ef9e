"""Residuals: what each expert has beside its centre, in low rank and some whole rows, and its
storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import LowRank
from ..errors import CheckpointError
from ..module_files import dequantise, quantise
from ..truncation import truncated

Packed = Mapping[str, Tensor]
"""The residuals of all experts in one matrix, side by side, as they are stored.

left [o, R], right [R, i]: the components of expert 0, then of expert 1 ...; ranks [E]: how many
each has. rows [N], values [N, i], row_counts [E]: whole rows, likewise, where there are any. Of
int8: left_scales [R], right_scales [R], values_scales [N] beside them.
"""

_INT8_SCALES = {"left": 1, "right": 0, "values": 0}
"""What has scales, and the dimension that they count."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What one matrix of an expert [o, i] has beside its centre: `low_rank`, plus `values` [n, i]
    on the rows `rows` [n].
    """

    low_rank: LowRank
    rows: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """The matrix itself, [o, i]."""
        return self.low_rank.dense().index_add_(0, self.rows, self.values)


def residual(
    change: Tensor, *, rank: int, rows: float = 0.0, moment: Tensor | None = None
) -> Residual:
    """The nearest residual to a change [o, i]: truncated by rank, then the rows of what is missing
    that have the most energy, whole.

    rank: components; as many as the smaller side keep everything. rows: share of rows, in [0, 1].
    moment: [i, i], mean of x xᵀ over what the experts read: outputs are kept closest on it.

    Source: Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, section 3.3, W = U V + S. There
    S is learned while it is pruned by importance, here it is read off the weights; the paper speaks
    of columns and its code prunes output rows, as here.
    """
    low_rank = truncated(change, rank=min(rank, *change.shape), moment=moment)
    count = round(rows * len(change))
    missing = change - low_rank.dense() if count else change[:0]
    chosen = missing.square().sum(1).topk(count).indices.sort().values
    return Residual(low_rank, chosen, missing[chosen])


def packed(residuals: Sequence[Residual], dtype: torch.dtype) -> dict[str, Tensor]:
    """The residuals of one matrix of all experts as they are stored; see `Packed`.

    dtype: of factors and rows; int8 has a scale for each component and row.
    """
    tensors = {
        "left": torch.cat([own.low_rank.left for own in residuals], 1),
        "right": torch.cat([own.low_rank.right for own in residuals], 0),
    }
    found = {"ranks": torch.tensor([own.low_rank.rank for own in residuals], dtype=torch.int32)}
    if any(len(own.rows) for own in residuals):
        tensors["values"] = torch.cat([own.values for own in residuals])
        found["rows"] = torch.cat([own.rows for own in residuals]).to(torch.int32)
        counts = [len(own.rows) for own in residuals]
        found["row_counts"] = torch.tensor(counts, dtype=torch.int32)
    for name, tensor in tensors.items():
        found |= _stored(name, tensor, dtype)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def unpacked(stored: Packed) -> list[Residual]:
    """Each expert's residual, float32.

    Raises:
        CheckpointError: the tensors do not fit each other.
    """
    try:
        return list(_unpacked(stored))
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"residuals do not fit together: {error}") from error


def _unpacked(stored: Packed) -> Iterator[Residual]:
    ranks = stored["ranks"].tolist()
    lefts = torch.split(_read(stored, "left"), ranks, dim=1)
    rights = torch.split(_read(stored, "right"), ranks)
    rows: Sequence[Tensor] = [torch.empty(0, dtype=torch.long)] * len(ranks)
    values: Sequence[Tensor] = [rights[0].new_empty(0, rights[0].shape[1])] * len(ranks)
    if "rows" in stored:
        counts = stored["row_counts"].tolist()
        rows = torch.split(stored["rows"].long(), counts)
        values = torch.split(_read(stored, "values"), counts)
    for left, right, own, value in zip(lefts, rights, rows, values, strict=True):
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < len(left):
            raise ValueError(f"row {int(own.max())} of {len(left)}")
        if value.shape != (len(own), right.shape[1]):
            raise ValueError(f"rows {list(value.shape)} beside factors {list(right.shape)}")
        yield Residual(LowRank(left, right), own, value)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype != torch.int8:
        return {name: tensor.to(dtype)}
    levels, scales = quantise(tensor, dim=_INT8_SCALES[name])
    return {name: levels, f"{name}_scales": scales}


def _read(stored: Packed, name: str) -> Tensor:
    tensor = stored[name]
    if tensor.dtype != torch.int8:
        return tensor.float()
    return dequantise(tensor, stored[f"{name}_scales"], dim=_INT8_SCALES[name])
