"""Saving: a sparse model whose weights were trained, in the form that it was loaded from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.backbone import checkpoint_files
from ..adapters.bank import copy_files
from ..adapters.build import is_weights
from ..adapters.checkpoint import Checkpoint
from ..adapters.checkpoint_writer import checkpoint_writer
from ..adapters.smoe.layout import ExpertWeights, MoeCheckpoint, SparseLayer, named_tensors
from ..adapters.smoe.residuals import packed
from ..adapters.smoe.stored import TENSORS, read_report, write_index, write_report, write_tensors
from .merged_experts import GroupRouter, MergedExperts


@torch.no_grad()
def save_trained(model: Any, source: Path, out: Path) -> None:  # noqa: ANN401 - transformers is untyped
    """Write a sparse model, merged or not, to a new folder.

    Every tensor has the name, shape and dtype that it has in `source`, and is the model's; so are
    centres, routers and residuals of merged experts. The plain router of merged experts, which the
    model does not run, stays as it is in `source`.

    model: as `load_model` gave it from `source`, its weights changed since.

    Raises:
        BackboneError: source is no sparse mixture of experts.
        CheckpointError: a weight is NaN or inf, or the disk is full.
    """
    moe = MoeCheckpoint.open(source)
    copy_files([f for f in checkpoint_files(moe.path) if not is_weights(f)], out)
    weights = {**_weights(model, moe), **dict(_expert_weights(model, moe))}
    announced = {name: (info.shape, info.dtype) for name, info in moe.checkpoint.tensors.items()}
    with checkpoint_writer(out, announced) as writer:
        for name in announced:
            writer.write(name, [weights[name]])
    report = read_report(moe.path)
    if report is None:
        return
    write_report(out, report.model_copy(update={"is_recovered": True}))
    if report.router != "compact":
        write_tensors(out, dict(_beside(model, moe)))
        write_index(out)


def _weights(model: Any, moe: MoeCheckpoint) -> dict[str, Tensor]:  # noqa: ANN401
    """What is no expert and no router: its names on disk are the model's."""
    state = model.state_dict()
    own = frozenset[str]().union(*(moe.tensors_of(layer) for layer in moe.layers))
    return {name: state[name] for name in moe.checkpoint.tensors if name not in own}


def _expert_weights(model: Any, moe: MoeCheckpoint) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Experts and routers of the plain checkpoint."""
    for layer in moe.layers:
        block = model.get_submodule(layer.name)
        yield from named_tensors(layer, moe.family, _plain_experts(block.experts, layer))
        is_plain = not isinstance(block.experts, MergedExperts)
        rows = block.gate.weight if is_plain else moe.router(layer)
        yield f"{layer.stored}.{moe.family.router}", rows


def _plain_experts(experts: Any, layer: SparseLayer) -> ExpertWeights:  # noqa: ANN401
    if isinstance(experts, MergedExperts):
        return ExpertWeights(experts.gate_up[: layer.experts], experts.down[: layer.experts])
    return ExpertWeights(experts.gate_up_proj, experts.down_proj)


def _beside(model: Any, moe: MoeCheckpoint) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """What lies beside the plain checkpoint, in the dtypes that it is stored in there."""
    stored = Checkpoint.of_file(moe.path / TENSORS).tensors
    for layer in moe.layers:
        block = model.get_submodule(layer.name)
        merged: MergedExperts = block.experts
        tensors = {
            "router": block.gate.weight,
            "groups": block.gate.groups if isinstance(block.gate, GroupRouter) else merged.groups,
            "extra_gate_up": merged.gate_up[layer.experts :],
            "extra_down": merged.down[layer.experts :],
        }
        for part in ("gate_up", "down") if merged.residuals else ():
            own = getattr(merged.residuals, part).split()
            dtype = stored[f"{layer.name}.{part}.left"].dtype
            tensors |= {f"{part}.{name}": x for name, x in packed(own, dtype).items()}
        for name, tensor in tensors.items():
            full = f"{layer.name}.{name}"
            yield full, tensor.to("cpu", stored[full].dtype, copy=True)
