"""Gates of an upcycled model, read off what its layers see of every expert's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.experts import Expert
from ..adapters.merge import Merger
from ..adapters.smoe.upcycling import is_feed_forward
from .expert_statistics import Prompts, expert_model
from .rendering import Rendered, batches

SHARPNESS = 8.0
"""How far apart the logits of the right expert and of the others are."""

_RIDGE = 1e-3
"""Of the mean variance: keeps directions that no prompt uses out of the gates."""


def fitted_gates(
    merger: Merger, prompts: Prompts, *, on_prompt: Callable[[], None] = lambda: None
) -> dict[int, Tensor]:
    """Rows of the gate by layer, [experts, hidden] each: least squares of which expert a token's
    prompt belongs to on what the layer's feed-forward part reads, so that the right one's logit is
    near `SHARPNESS` and the others' near 0. Every expert counts alike, however long its prompts.

    The inputs are those of the upcycled model where every token goes to its own expert: what is
    shared is merged, the feed-forward parts are the expert's. One model at a time is in memory, and
    what is merged, once for all.

    prompts: of every expert; their answers count.
    """

    @cache
    def merged(name: str) -> Tensor:
        return torch.cat(list(merger.backbone_rows(name)))

    seen = []
    for expert in merger.experts:
        model = _with_own_expert(merger, expert, merged)
        seen.append(_seen(model, prompts[expert.name], on_prompt))
    return {layer: _least_squares([own[layer] for own in seen]) for layer in range(len(seen[0]))}


@dataclass
class _Seen:
    """What a feed-forward part read. total: sum of x, [d]; gram: sum of x xᵀ, [d, d]."""

    total: Tensor
    gram: Tensor
    count: int = 0

    @classmethod
    def nothing(cls, width: int, device: torch.device) -> _Seen:
        """Zeros, float64: sums over many tokens lose nothing."""
        total = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(total, total.new_zeros(width, width))

    def add(self, rows: Tensor) -> None:
        """Count the inputs of some tokens, [t, d]."""
        self.total += rows.sum(0)
        self.gram += rows.T @ rows
        self.count += len(rows)


@torch.no_grad()
def _with_own_expert(merger: Merger, expert: Expert, merged: Callable[[str], Tensor]) -> Any:  # noqa: ANN401
    """The upcycled model where every token goes to one expert, which is a dense model.

    merged: a parameter that is no expert's, by name.
    """
    model = expert_model(expert, merger.base, merger.device)
    for name, parameter in model.named_parameters():
        if not is_feed_forward(name):
            parameter.copy_(merged(name).reshape(parameter.shape))
    return model


@torch.inference_mode()
def _seen(
    model: Any,  # noqa: ANN401
    prompts: Sequence[Rendered],
    on_prompt: Callable[[], None],
) -> list[_Seen]:
    """What every layer's feed-forward part reads, without padding."""
    width = model.config.hidden_size
    seen = [_Seen.nothing(width, model.device) for _ in model.model.layers]
    mask = torch.ones(0)

    def note(own: _Seen, _layer: object, inputs: tuple[Tensor]) -> None:
        own.add(inputs[0][mask].double())

    hooks = [
        layer.mlp.register_forward_pre_hook(partial(note, own))
        for layer, own in zip(model.model.layers, seen, strict=True)
    ]
    for batch in batches(prompts):
        mask = batch.mask.to(model.device)
        model.model(input_ids=batch.token_ids.to(mask.device), attention_mask=mask, use_cache=False)
        for _ in range(len(mask)):
            on_prompt()
    for hook in hooks:
        hook.remove()
    return seen


def _least_squares(seen: Sequence[_Seen]) -> Tensor:
    """Gate rows from what one layer reads of every expert's prompts."""
    means = torch.stack([own.total / own.count for own in seen])
    moment = torch.stack([own.gram / own.count for own in seen]).sum(0)
    ridge = _RIDGE * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
    rows: Tensor = torch.linalg.solve(moment + ridge, means.T).T
    return (SHARPNESS * rows).float()
