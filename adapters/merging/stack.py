"""Stack: the deltas of one parameter, one per expert, streamed in blocks of rows.

Every elementwise merge is a chain of functions from Stack to Stack that ends in a Merged stream.
A step that needs to know the whole tensor (a threshold, a norm) iterates over the blocks once more,
so that memory grows neither with the number of experts nor with the size of the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Entries of one expert in a block; fixed, since random masks are drawn block by block.

Eight experts with their temporaries fit the processor's cache: with eight times as many entries a
step takes several times as long.
"""


@dataclass(frozen=True)
class Context:
    """What a step may know of the parameter beside its deltas.

    name: of the parameter. experts: their names, in order. seed: of the recipe.
    depth: the index of its block of layers over the last index, in [0, 1]; None outside the blocks.
    is_transposed: stored [in, out] instead of [out, in], as embeddings (a row per token) and
    GPT-2's Conv1D are.
    """

    name: str = "weight"
    experts: tuple[str, ...] = ()
    seed: int = 0
    depth: float | None = None
    is_transposed: bool = False

    def generator(self, expert: str, block: int) -> torch.Generator:
        """Random numbers that depend on seed, parameter, expert and block, and on nothing else."""
        text = f"{self.seed}\0{self.name}\0{expert}\0{block}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return torch.Generator().manual_seed(number % (1 << 63))


@dataclass(frozen=True)
class Block:
    """Some rows of every expert's delta.

    x: [T, b, i], float32. w: weights that broadcast over x. base: the same rows of the base's
    parameter, [b, i]. index: of the block.
    """

    x: Tensor
    w: Tensor
    base: Tensor
    index: int = 0

    @property
    def wx(self) -> Tensor:
        """The weighted deltas, [T, b, i]."""
        return self.w * self.x

    def with_x(self, x: Tensor) -> Block:
        """The same block with other deltas."""
        return replace(self, x=x)


Merged = Iterator[Tensor]
"""The merged delta, block after block of [b, i]."""


@dataclass(frozen=True)
class Stack:
    """The deltas [T, o, i] of one parameter; a vector is one row.

    read: gives the blocks from the first; it may be called any number of times.
    """

    read: Callable[[], Iterator[Block]]
    experts: int
    context: Context = field(default_factory=Context)

    @classmethod
    def of(
        cls,
        deltas: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        base: Tensor | None = None,
        context: Context | None = None,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> Stack:
        """A stack of tensors in memory, each [o, i] or [n].

        weights: one per expert; default 1 each. base: default zeros.
        """
        whole = torch.stack([as_rows(delta.float()) for delta in deltas])
        base = as_rows(base.float()) if base is not None else torch.zeros_like(whole[0])
        w = torch.tensor(weights or [1.0] * len(deltas)).view(-1, 1, 1)
        rows = rows_per_block(whole.shape[2], block_elements)

        def read() -> Iterator[Block]:
            for index, start in enumerate(range(0, whole.shape[1], rows)):
                part = slice(start, start + rows)
                yield Block(whole[:, part], w, base[part], index)

        names = tuple(str(k) for k in range(len(deltas)))
        return cls(read, len(deltas), context or Context(experts=names))

    def map(self, change: Callable[[Block], Block]) -> Stack:
        """The stack with every block changed on its own, when it is read."""
        return replace(self, read=lambda: map(change, self.read()))

    def merge(self, combine: Callable[[Block], Tensor]) -> Merged:
        """The stream that `combine` makes of the blocks."""
        return map(combine, self.read())


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix: a vector becomes one row, more than two axes are flattened into rows.

    [n] to [1, n]; [o, i] stays; [a, b, i] to [a * b, i].
    """
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def rows_per_block(columns: int, block_elements: int = BLOCK_ELEMENTS) -> int:
    """How many rows make a block; at least one."""
    return max(1, block_elements // max(1, columns))


def gathered(merged: Merged) -> Tensor:
    """All blocks of a merged stream as one tensor, [o, i]."""
    return torch.cat(list(merged))
