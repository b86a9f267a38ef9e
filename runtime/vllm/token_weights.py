"""Weights of modules by token: how much of each slot every row of a batch gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

RowOf = Callable[[int], Tensor]
"""The weights of a LoRA id by slot, [slots], float32."""


def token_weights(ids: Sequence[int], row_of: RowOf, *, slots: int) -> tuple[Tensor, Tensor]:
    """The different rows of a batch and which of them each token has: [rows, slots] and [t].

    ids: a LoRA id per token; what is below 1 has no module.
    """
    unique, places = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    none = torch.zeros(slots)
    rows = [row_of(int(lora_id)) if lora_id > 0 else none for lora_id in unique]
    return torch.stack(rows) if rows else none[None], torch.from_numpy(places.reshape(-1))


def active_runs(rows: Tensor) -> tuple[tuple[int, int], ...]:
    """The slots that any row uses, neighbours joined: [(first, last + 1), ...]."""
    runs: list[tuple[int, int]] = []
    for slot in rows.any(0).nonzero().flatten().tolist():
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return tuple(runs)


def expandable(stacked: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Empty copies of vLLM's stacks of B, [slots, 1, o, r] each, laid out so that `flat_b` of them
    is a view: one product expands all slots, and nothing is copied when a module is loaded.
    """
    return tuple(
        torch.zeros(b.shape[0], 1, b.shape[3], b.shape[2], dtype=b.dtype, device=b.device).mT
        for b in stacked
    )


def flat_a(stacked: Tensor) -> Tensor:
    """[slots, 1, r, i] as [slots * r, i], a view."""
    return stacked.view(-1, stacked.shape[-1])


def flat_b(stacked: Tensor) -> Tensor:
    """[slots, 1, o, r] of `expandable` as [slots * r, o], a view."""
    return stacked.mT.view(-1, stacked.shape[-2])
