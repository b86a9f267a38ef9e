"""Writing: the backbone of a bank with merged experts, a plain checkpoint and what is beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import checkpoint_files
from ..bank import copy_files
from ..build import Progress, is_weights
from ..checkpoint import MODEL_DTYPES, TensorInfo
from ..checkpoint_writer import Announced, CheckpointWriter, checkpoint_writer
from ..merging.stack import rows_per_block
from .accounting import layer_flops, plain_cost
from .layers import LayerMerger, MergedLayer
from .layout import MoeCheckpoint, SparseLayer, expert_names
from .stored import (
    RECOVERY,
    REPORT,
    TENSORS,
    Cost,
    ExpertsReport,
    LayerReport,
    write_index,
    write_report,
    write_tensors,
)
from .usage import Usage

_COUNT_KEYS = ("num_local_experts", "num_experts")


def write_backbone(
    folder: Path, merger: LayerMerger, counts: Sequence[int], usage: Usage, *, progress: Progress
) -> None:
    """Write a model with merged experts, and how they were merged.

    The weights are a plain checkpoint with as many experts in every layer, which any program loads
    that loads the original. Where the original router stays, what they have no room for stands in
    files beside them.

    counts: experts that each layer is left with.
    """
    copy_files([f for f in checkpoint_files(merger.moe.path) if _is_copied(f)], folder)
    _write_config(folder, merger)
    reports: list[LayerReport] = []
    exclusive: dict[str, Tensor] = {}
    with checkpoint_writer(folder, _announced(merger)) as writer:
        _copy_others(writer, merger)
        step = progress("merging experts", len(counts))
        for layer, count in zip(merger.moe.layers, counts, strict=True):
            found = merger.merge(layer, count, usage.get(layer.name))
            _write_plain(writer, merger, layer, found)
            reports.append(_layer_report(layer, found, usage))
            exclusive |= _exclusive(merger, layer, found)
            step()
    if merger.settings.form != "compact":
        write_tensors(folder, exclusive)
        write_index(folder)
    write_report(folder, _report(merger, reports, exclusive))


def _is_copied(file: Path) -> bool:
    return not is_weights(file) and file.name not in (REPORT, TENSORS, RECOVERY)


def _write_config(folder: Path, merger: LayerMerger) -> None:
    """State the number of experts by the key that the original uses, and what it is stored in."""
    config: dict[str, Any] = dict(merger.moe.config)
    keys = [key for key in _COUNT_KEYS if key in config] or [merger.moe.family.count]
    config.update(dict.fromkeys(keys, merger.plain))
    config["num_experts_per_tok"] = min(merger.moe.top_k, merger.plain)
    if merger.recipe.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = merger.recipe.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _others(moe: MoeCheckpoint) -> dict[str, TensorInfo]:
    """What is no router and no expert that is merged: shared experts are among it."""
    own = frozenset[str]().union(*(moe.tensors_of(layer) for layer in moe.layers))
    return {name: info for name, info in moe.checkpoint.tensors.items() if name not in own}


def _dtype(merger: LayerMerger, stored: torch.dtype) -> torch.dtype:
    if merger.recipe.dtype is None or not stored.is_floating_point:
        return stored
    return MODEL_DTYPES[merger.recipe.dtype]


def _announced(merger: LayerMerger) -> Announced:
    others = _others(merger.moe).items()
    announced = {name: (info.shape, _dtype(merger, info.dtype)) for name, info in others}
    for layer in merger.moe.layers:
        dtype = merger.stored_dtype(layer)
        for name, shape in _plain_shapes(merger, layer).items():
            announced[name] = (shape, dtype)
    return announced


def _block(merger: LayerMerger, layer: SparseLayer) -> str:
    """What the published checkpoints call a sparse block, however the original is stored."""
    return f"{layer.stored.rpartition('.')[0]}.{merger.moe.family.block}"


def _plain_shapes(merger: LayerMerger, layer: SparseLayer) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's experts and router in the plain checkpoint, in order."""
    block, family = _block(merger, layer), merger.moe.family
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(merger.plain):
        inner, down = expert_names(block, family, expert)
        shapes |= dict.fromkeys(inner, (layer.width, layer.hidden))
        shapes[down] = (layer.hidden, layer.width)
    return shapes | {f"{block}.{family.router}": (merger.plain, layer.hidden)}


def _copy_others(writer: CheckpointWriter, merger: LayerMerger) -> None:
    checkpoint = merger.moe.checkpoint
    for name, info in _others(merger.moe).items():
        size = rows_per_block(info.columns)
        starts = range(0, info.rows, size)
        writer.write(name, (checkpoint.read_rows(name, start, start + size) for start in starts))


def _write_plain(
    writer: CheckpointWriter, merger: LayerMerger, layer: SparseLayer, found: MergedLayer
) -> None:
    centres = found.centres
    parts = [
        tensor
        for expert in range(merger.plain)
        for tensor in (*centres.gate_up[expert].chunk(layer.parts), centres.down[expert])
    ]
    for name, tensor in zip(_plain_shapes(merger, layer), [*parts, found.rows], strict=True):
        writer.write(name, [tensor])


def _exclusive(merger: LayerMerger, layer: SparseLayer, found: MergedLayer) -> dict[str, Tensor]:
    """What the plain checkpoint has no room for, by full name."""
    if merger.settings.form == "compact":
        return {}
    dtype = merger.stored_dtype(layer)
    tensors = {
        "router": merger.moe.checkpoint.read(f"{layer.stored}.{merger.moe.family.router}"),
        "groups": found.groups.to(torch.int32),
        "extra_gate_up": found.centres.gate_up[merger.plain :].to(dtype, copy=True),
        "extra_down": found.centres.down[merger.plain :].to(dtype, copy=True),
        **found.residuals,
    }
    return {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}


def _layer_report(layer: SparseLayer, found: MergedLayer, usage: Usage) -> LayerReport:
    own = usage.get(layer.name)
    return LayerReport(
        layer=layer.name,
        experts=len(found.centres),
        groups=tuple(found.groups.tolist()),
        counts=None if own is None else tuple(own.counts.tolist()),
        centre_errors=found.centre_errors,
        errors=found.errors,
        router_kl=None if found.gap is None else found.gap.kl,
        router_agreement=None if found.gap is None else found.gap.agreement,
    )


def _report(
    merger: LayerMerger, reports: Sequence[LayerReport], exclusive: dict[str, Tensor]
) -> ExpertsReport:
    moe, settings = merger.moe, merger.settings
    residuals = {n: x for n, x in exclusive.items() if ".gate_up." in n or ".down." in n}
    residual_bytes = sum(tensor.nbytes for tensor in residuals.values())
    nbytes, flops = residual_bytes, 0
    for layer, report in zip(moe.layers, reports, strict=True):
        numbers = (layer.parts + 1) * layer.hidden * layer.width
        nbytes += report.experts * numbers * merger.stored_dtype(layer).itemsize
        flops += _flops(merger, layer, report, residuals)
    return ExpertsReport(
        method=settings.method,
        router=settings.form,
        experts=moe.experts,
        top_k=moe.top_k,
        original=plain_cost(moe),
        merged=Cost(bytes=nbytes, flops=flops),
        residual_bytes=residual_bytes,
        layers=tuple(reports),
    )


def _flops(
    merger: LayerMerger, layer: SparseLayer, report: LayerReport, residuals: dict[str, Tensor]
) -> int:
    """Of one token in a layer: an expert's residual has the numbers of its factors and rows."""
    moe = merger.moe
    own = (x for n, x in residuals.items() if n.startswith(f"{layer.name}.") and x.ndim == 2)
    return layer_flops(
        layer,
        experts=report.experts if merger.settings.form == "compact" else moe.experts,
        centres=min(moe.top_k, report.experts),
        residuals=moe.top_k,
        numbers=sum(x.numel() for x in own) / moe.experts,
    )
