"""Exact order statistics of a stream of float32 blocks, in constant memory and without a sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .stack import Stack

BUCKETS = 1 << 16
"""Values of one half of a 32-bit key."""

Ranks = Callable[[int], Sequence[int]]
"""From the number of entries n to the ranks asked for, each in 1 (the largest) to n."""


def kth_largest(read: Callable[[], Iterable[Tensor]], ranks: Ranks) -> Tensor:
    """The values at some ranks, for every row of a stream: [T, m], on the device of the blocks.

    The bits of a float32 order like the number itself once those of negative numbers are
    turned round. One pass counts the upper halves of these keys, a second one the lower halves
    of the keys in the buckets found.

    read: gives blocks [T, ...], float32, without NaN, at least one; it is called twice.
    ranks: of the m values, as a function of the number of entries of a row.
    """
    upper = _histogram(_upper(block) for block in read())
    wanted = torch.tensor(ranks(int(upper[0].sum())), device=upper.device)
    wanted = wanted.expand(upper.shape[0], -1)
    bucket, rank = _locate(upper, wanted)
    lower = _histogram(_lower(block, bucket) for block in read())
    low, _ = _locate(lower, rank.reshape(-1, 1))
    return _values(((bucket - BUCKETS // 2) << 16) | low.view_as(bucket))


def kth_largest_magnitudes(stack: Stack, ranks: Ranks) -> Tensor:
    """The magnitudes at some ranks for every expert, over the whole parameter: [T, m]."""

    def read() -> Iterator[Tensor]:
        return (block.x.abs() for block in stack.read())

    return kth_largest(read, ranks)


def share(density: float, entries: int) -> int:
    """How many entries a density stands for: rounded down, at least one.

    The product is cut off as mergekit and PEFT do, so that masks agree with theirs.
    """
    return max(1, int(density * entries))


def _upper(block: Tensor) -> list[Tensor]:
    """The upper halves of all keys, T tensors."""
    return [(_keys(row) >> 16).add_(BUCKETS // 2).flatten() for row in block]


def _lower(block: Tensor, bucket: Tensor) -> list[Tensor]:
    """The lower halves of the keys in each bucket asked for, T * m tensors."""
    found = []
    for row, wanted in zip(block, bucket.tolist(), strict=True):
        keys = _keys(row)
        upper = (keys >> 16).add_(BUCKETS // 2)
        found += [keys[upper == one] & (BUCKETS - 1) for one in wanted]
    return found


def _histogram(blocks: Iterable[list[Tensor]]) -> Tensor:
    """Counts of the values in [0, BUCKETS), one row per tensor of a block.

    Values wait until they are many: a count costs at least its buckets.
    """
    counts: Tensor | None = None
    waiting: list[list[Tensor]] = []
    entries = 0
    for block in blocks:
        if counts is None:
            counts = torch.zeros(len(block), BUCKETS, dtype=torch.int64, device=block[0].device)
        waiting.append(block)
        entries += max(row.numel() for row in block)
        if entries > BUCKETS:
            _count(counts, waiting)
            waiting, entries = [], 0
    assert counts is not None
    _count(counts, waiting)
    return counts


def _count(counts: Tensor, waiting: list[list[Tensor]]) -> None:
    for total, rows in zip(counts, zip(*waiting, strict=True), strict=False):
        values = rows[0] if len(rows) == 1 else torch.cat(rows)
        total += torch.bincount(values, minlength=BUCKETS)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The bucket that holds each rank and the rank within it, both [rows, m]."""
    descending = counts.flip(1)
    reached = descending.cumsum(1)
    position = torch.searchsorted(reached, ranks.contiguous())
    before = reached.gather(1, position) - descending.gather(1, position)
    return BUCKETS - 1 - position, ranks - before


def _keys(x: Tensor) -> Tensor:
    """Integers that order like x; the inverse is the same exchange of bits."""
    bits = x.contiguous().view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _values(keys: Tensor) -> Tensor:
    return _keys(keys.to(torch.int32).view(torch.float32)).view(torch.float32)
