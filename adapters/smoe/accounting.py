"""Accounting: what the experts of a sparse model cost in bytes and in floating point operations."""

from __future__ import annotations

from pathlib import Path

from .layout import MoeCheckpoint, SparseLayer
from .stored import Cost, read_report


def cost_of(source: str | Path) -> Cost:
    """What the experts of a checkpoint cost, merged ones with their residuals.

    Raises:
        BackboneError: it is no sparse mixture of experts.
    """
    moe = MoeCheckpoint.open(source)
    report = read_report(moe.path)
    return plain_cost(moe) if report is None else report.merged


def plain_cost(moe: MoeCheckpoint) -> Cost:
    """What the experts of a plain checkpoint cost."""
    flops = sum(
        layer_flops(layer, experts=layer.experts, centres=moe.top_k) for layer in moe.layers
    )
    return Cost(bytes=moe.expert_bytes, flops=flops)


def layer_flops(
    layer: SparseLayer, *, experts: int, centres: int, residuals: int = 0, numbers: float = 0
) -> int:
    """Operations of one token in one sparse layer.

    experts: rows of its router. centres: how many of them it is sent to, at most. residuals: to how
    many experts' residuals, with so many numbers each.
    """
    centre = (layer.parts + 1) * layer.width * layer.hidden
    return round(2 * (experts * layer.hidden + centres * centre + residuals * numbers))
