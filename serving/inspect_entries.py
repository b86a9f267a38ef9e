"""Entries of the document that `mergeroute inspect` makes: sizes, spectra, cosines."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.backbone import Backbone
from ..adapters.checkpoint import Checkpoint
from ..adapters.energy import Spectrum
from ..adapters.experts import Base, Expert, FullExpert, LoraExpert
from ..adapters.kinds import Kind
from ..adapters.lora import Coverage, Module
from ..adapters.module_files import module_files
from ..adapters.survey import Survey, Surveyed

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def block_of(name: str) -> int | None:
    """The index of the block a layer belongs to, by its name; None outside the blocks."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def comparison(survey: Survey, rank: int | None) -> dict[str, Any]:
    """Cosines over all linear layers, and cosines and energy layer by layer.

    rank: also tell how much of the energy it keeps.
    """
    return {
        "similarity": {"names": list(survey.names), "cosine": _matrix(survey.cosine())},
        "layers": [
            {
                "layer": parameter.name.removesuffix(".weight"),
                "block": block_of(parameter.name),
                "shape": list(parameter.shape),
                "cosine": _matrix(parameter.cosine),
                "energy": {n: spread(found, rank) for n, found in parameter.spectra.items()},
            }
            for parameter in survey.linear
        ],
    }


def spread(spectrum: Spectrum | None, rank: int | None) -> dict[str, Any]:
    """Effective ranks, and the share of the energy by rank; of a change of zero, none."""
    if spectrum is None:
        return {"rank_90": 0, "rank_99": 0, "energy_by_rank": {}}
    return {
        "rank_90": spectrum.rank_for(0.9),
        "rank_99": spectrum.rank_for(0.99),
        **({"kept": spectrum.kept(rank)} if rank else {}),
        "energy_by_rank": {str(k): share for k, share in spectrum.curve().items()},
    }


def _matrix(cosine: Tensor) -> list[list[float | None]]:
    """JSON knows no NaN."""
    rows: list[list[float]] = cosine.tolist()
    return [[None if math.isnan(entry) else entry for entry in row] for row in rows]


def sizes(base: Base) -> dict[str, Any]:
    """What a checkpoint holds, all in all and by kind."""
    tensors = base.checkpoint.tensors
    rows = []
    for kind in Kind:
        own = [n for n, p in base.parameters.items() if p.kind is kind]
        if own:
            rows.append(
                {
                    "kind": str(kind),
                    "tensors": len(own),
                    "parameters": sum(math.prod(tensors[n].shape) for n in own),
                    "bytes": sum(tensors[n].nbytes for n in own),
                    "dtype": _dtypes(tensors[n].dtype for n in own),
                }
            )
    return {
        "model_type": base.config["model_type"],
        "blocks": base.blocks,
        "tied": base.shapes.tied is not None,
        "shards": len({info.file for info in tensors.values()}),
        "tensors": len(tensors),
        "parameters_total": sum(row["parameters"] for row in rows),
        "bytes": _stored_bytes(base.checkpoint),
        "kinds": rows,
    }


def parameter_entry(survey: Survey, parameter: Surveyed) -> dict[str, Any]:
    """A parameter and how far each expert that changes it went."""
    norms = parameter.inner.diagonal().clamp_min(0).sqrt().tolist()
    pairs = zip(survey.names, norms, strict=True)
    return {
        "name": parameter.name,
        "kind": str(parameter.kind),
        "shape": list(parameter.shape),
        "base_norm": parameter.base_norm,
        "delta_norm": {name: norm for name, norm in pairs if norm},
    }


def backbone_entry(backbone: Backbone, *, is_causal: bool = True) -> dict[str, Any]:
    """What a backbone is called, where it is, and how large.

    is_causal: other models have no linear layers that modules go by.
    """
    return {
        "name": backbone.name,
        "path": str(backbone.path),
        "digest": backbone.digest,
        "linear_layers": len(backbone.layers) if is_causal else None,
        "bytes": disk_bytes(backbone.path.glob("*.safetensors")),
    }


def coverage_entry(coverage: Coverage) -> dict[str, Any]:
    """What a module changes. Its size in float32 is left out: what counts here is the disk."""
    left_out = ("layers_total", "nbytes")
    return {key: value for key, value in asdict(coverage).items() if key not in left_out}


def expert_entry(expert: Expert, survey: Survey, rank: int | None) -> dict[str, Any]:
    """What an expert changes, and how far it went; ranks are means over its linear layers."""
    spectra = [p.spectra[expert.name] for p in survey.linear if expert.name in p.spectra]
    kinds = {p.name: str(p.kind) for p in survey.parameters}
    return {
        "name": expert.name,
        "kind": "full" if isinstance(expert, FullExpert) else "LoRA",
        "path": str(expert.path),
        "bytes": _expert_bytes(expert),
        "ranks": _ranks(expert.module) if isinstance(expert, LoraExpert) else None,
        "changed": len(changed := survey.changed(expert.name)),
        "changed_by_kind": dict(Counter(kinds[name] for name in changed)),
        "relative_norm": {
            str(kind): norm for kind, norm in survey.relative_norms(expert.name).items()
        },
        "rank_90": _mean([found.rank_for(0.9) for found in spectra]),
        "rank_99": _mean([found.rank_for(0.99) for found in spectra]),
        "kept": _mean([found.kept(rank) for found in spectra]) if rank else None,
    }


def _expert_bytes(expert: Expert) -> int:
    if isinstance(expert, FullExpert):
        return _stored_bytes(expert.checkpoint)
    return disk_bytes(module_files(expert.path)[1:])


def _ranks(module: Module) -> list[int]:
    ranks = [delta.rank for delta in module.deltas.values()]
    return [min(ranks, default=0), max(ranks, default=0)]


def _stored_bytes(checkpoint: Checkpoint) -> int:
    return disk_bytes({info.file for info in checkpoint.tensors.values()})


def disk_bytes(files: Iterable[Path]) -> int:
    """Size of files on disk."""
    return sum(file.stat().st_size for file in files)


def _dtypes(dtypes: Iterable[object]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
