"""Sparse blocks of transformers' models: where they are, and what one expert of them computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.errors import UnsupportedModelError


def sparse_blocks(model: nn.Module) -> dict[str, Any]:
    """The sparse blocks of a model by name: what has `experts` and a router.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = {
        name: block
        for name, block in model.named_modules()
        if hasattr(block, "experts") and (hasattr(block, "gate") or hasattr(block, "router"))
    }
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no sparse layer: it is no mixture of experts"
        )
    return found


def run_expert(experts: Any, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What one expert makes of x [t, D]: what goes into its down matrix [t, F], and out of it."""
    if hasattr(experts, "gate_up_proj"):
        gate_up, down, act = experts.gate_up_proj[expert], experts.down_proj[expert], experts.act_fn
    else:
        own = experts[f"expert_{expert}"]
        gate_up, down, act = own.wi.weight, own.wo.weight, own.act
    inner = activated(F.linear(x, gate_up), act, width=down.shape[1])
    return inner, F.linear(inner, down)


def activated(x: Tensor, act: Callable[[Tensor], Tensor], *, width: int) -> Tensor:
    """The inner state of an expert, [t, width], from x [t, 2 width], the gate's half first, or from
    x [t, width] where there is no gate.
    """
    if x.shape[1] == width:
        return act(x)
    gate, up = x.chunk(2, dim=1)
    return act(gate) * up
