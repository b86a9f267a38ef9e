"""The wrapper for CPUs: two products for all neighbouring slots that a batch uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .token_weights import active_runs, flat_a, flat_b
from .wrapper import BlendWrapper

_MOST_RUNS = 256


class Piece(NamedTuple):
    """One pair of products: slots `first` to `last` of one slice of a layer's output.

    a: [i, slots * r]. b: [slots * r, o of the slice]. Views, which follow what is loaded.
    """

    slots: tuple[int, int]
    rank: int
    part: slice
    a: Tensor
    b: Tensor


class BlendWrapperCPU(BlendWrapper):
    """y += ((x Aᵀ) * w) B over the slots that any row uses; without such rows nothing is done."""

    joins_neighbours = True

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **settings)
        # of each set of slots, by layer: making views anew costs a third of the products
        self._pieces: dict[tuple[tuple[int, int], ...], dict[int, list[Piece]]] = {}

    def set_weights(self, rows: Tensor, places: Tensor) -> None:
        """See `BlendWrapper`."""
        self._runs = active_runs(rows)
        if len(self._pieces) > _MOST_RUNS:
            self._pieces.clear()
        self._layers = self._pieces.setdefault(self._runs, {})
        self._weights = rows[places]  # [t, slots]
        self._spread: dict[tuple[tuple[int, int], int], Tensor] = {}

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,  # noqa: ANN401
    ) -> Tensor:
        """Add the blends' changes of one layer to y, [t, o], in place.

        lora_a_stacked, lora_b_stacked: per slice of the output, of all slots; a layer's own, which
        live as long as it does.
        """
        layer = id(lora_a_stacked)
        if layer not in self._layers:
            self._layers[layer] = list(
                _pieces(self._runs, lora_a_stacked, lora_b_stacked, output_slices)
            )
        x, changed = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for piece in self._layers[layer]:
            shrunk = (x @ piece.a).mul_(self._spread_weights(piece, x.dtype))
            changed[:, piece.part].addmm_(shrunk, piece.b, alpha=scale)
        return y

    def _spread_weights(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The slots' weights, each as often as a slot has ranks: the same in every layer."""
        key = (piece.slots, piece.rank)
        if key not in self._spread:
            weights = self._weights[:, slice(*piece.slots)].to(dtype)
            self._spread[key] = torch.repeat_interleave(weights, piece.rank, dim=1)
        return self._spread[key]


def _pieces(
    runs: Sequence[tuple[int, int]],
    a_stacks: Sequence[Tensor],
    b_stacks: Sequence[Tensor],
    output_slices: Sequence[int],
) -> Iterator[Piece]:
    low = 0
    for a, b, size in zip(a_stacks, b_stacks, output_slices, strict=True):
        rank = a.shape[2]
        for first, last in runs:
            ranks = slice(first * rank, last * rank)
            part = slice(low, low + size)
            yield Piece((first, last), rank, part, flat_a(a)[ranks].T, flat_b(b)[ranks])
        low += size
