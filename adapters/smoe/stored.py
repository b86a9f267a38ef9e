"""What a checkpoint with merged experts holds beside its plain part: a report, and where the
original router stays its rows, the groups and what is exclusive to each expert.

experts.json          how the experts were merged
experts.safetensors   by sparse layer: router [E, D], groups [E], extra_gate_up and extra_down (the
                      centres that the plain part has no room for), and gate_up.* and down.*, the
                      residuals; see `residuals.Packed`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import INDEX, WEIGHTS, Checkpoint, all_finite
from ..errors import CheckpointError, UnsupportedModelError
from .layout import ExpertWeights
from .recipe import RouterForm
from .residuals import Residual, unpacked

REPORT = "experts.json"
TENSORS = "experts.safetensors"
RECOVERY = "recovery.json"
"""How experts were trained since they were merged, where they were."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerReport(_Strict):
    """How the experts of one sparse layer were merged, or which of them were kept.

    errors are |E - E'| / |E|, Frobenius, over an expert's matrices: of what serves in its place.
    """

    layer: str = Field(description="its name")
    experts: int = Field(ge=1, description="experts left: centres, or those that were kept")
    groups: tuple[int, ...] = Field(description="each expert's centre; -1: left out")
    counts: tuple[int, ...] | None = Field(None, description="calibration tokens of each expert")
    centre_errors: tuple[float, ...] = Field(description="each expert's, without its residual")
    errors: tuple[float, ...] = Field(description="each expert's, as it is stored")
    router_kl: float | None = Field(None, description="plain router from the groups', nats")
    router_agreement: float | None = Field(None, description="share of choices they agree in")

    @property
    def unused(self) -> tuple[int, ...]:
        """The experts that no calibration token was sent to."""
        return tuple(e for e, count in enumerate(self.counts or ()) if not count)


class Cost(_Strict):
    """What experts cost. bytes: as stored, routers left out. flops: of a token in all sparse
    layers, at most, router and experts; a multiplication and an addition are two.
    """

    bytes: int = Field(ge=0)
    flops: int = Field(ge=0)


class ExpertsReport(_Strict):
    """How the experts of a checkpoint were merged."""

    format: Literal["mergeroute-experts"] = "mergeroute-experts"
    version: Literal[1] = 1
    method: str = Field(description="of the recipe")
    router: RouterForm = Field(description="but for compact: experts.safetensors is there")
    experts: int = Field(ge=1, description="experts of a layer of the original")
    top_k: int = Field(ge=1, description="experts that the original sends a token to")
    original: Cost
    merged: Cost
    residual_bytes: int = Field(0, ge=0, description="of the merged bytes")
    is_recovered: bool = Field(False, description="trained since: errors are of before")
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What one sparse layer has beside its plain part. residuals: of gate_up and of down, by
    expert.
    """

    router: Tensor
    groups: Tensor
    extra: ExpertWeights
    residuals: tuple[list[Residual], list[Residual]] | None


def read_report(folder: Path) -> ExpertsReport | None:
    """How the experts of a checkpoint folder were merged; None where they were not.

    Raises:
        CheckpointError: the report is damaged, or its tensors are missing.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        report = ExpertsReport.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if (report.router == "compact") == (folder / TENSORS).is_file():
        raise CheckpointError(
            f"{path} says that the router is {report.router}, and {TENSORS} "
            f"{'is there' if report.router == 'compact' else 'is missing'}: copy the folder again"
        )
    return report


def check_plain(folder: Path) -> None:
    """Refuse a checkpoint of which a program that reads the plain part alone would serve less.

    Raises:
        UnsupportedModelError: it has merged experts with their own router.
        CheckpointError: its report is damaged.
    """
    report = read_report(folder)
    if report is not None and report.router != "compact":
        raise UnsupportedModelError(
            f"{folder} has merged experts beside its plain checkpoint, which vLLM does not read: "
            "serve it with --engine torch, or build it with router: compact"
        )


def write_report(folder: Path, report: ExpertsReport) -> None:
    """Write how experts were merged."""
    (folder / REPORT).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what the plain part has no room for, by full name."""
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, folder / TENSORS)


def write_index(folder: Path) -> None:
    """Name the plain checkpoint's files: some programs load whatever lies in a folder without an
    index.
    """
    if (folder / INDEX).is_file():
        return
    plain = Checkpoint.of_file(folder / WEIGHTS)
    index = {
        "metadata": {"total_size": plain.nbytes},
        "weight_map": dict.fromkeys(plain.tensors, WEIGHTS),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def read_layers(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, StoredLayer]]:
    """What sparse layers have beside their plain part, one after the other.

    Raises:
        CheckpointError: the file is damaged, lacks a layer, or holds what does not fit.
    """
    checkpoint = Checkpoint.of_file(folder / TENSORS)
    for name in names:
        yield name, _read_layer(checkpoint, folder / TENSORS, name)


def _read_layer(checkpoint: Checkpoint, file: Path, name: str) -> StoredLayer:
    prefix = f"{name}."
    stored = {n.removeprefix(prefix): n for n in checkpoint.tensors if n.startswith(prefix)}
    tensors = {own: checkpoint.read(full) for own, full in stored.items()}
    bad = [n for n, x in tensors.items() if x.is_floating_point() and not all_finite(x)]
    if bad:
        raise CheckpointError(f"{file} holds NaN or inf in {prefix + bad[0]!r}")
    try:
        router, groups = tensors["router"].float(), tensors["groups"].long()
        extra = ExpertWeights(tensors["extra_gate_up"].float(), tensors["extra_down"].float())
        parts = [residuals_of(tensors, matrix) for matrix in ("gate_up", "down")]
        if any(parts) != all(parts):
            raise ValueError("one of its matrices has residuals, the other has none")
        residuals = (unpacked(parts[0]), unpacked(parts[1])) if all(parts) else None
        counts = {groups.numel(), *(len(own) for own in residuals or ())}
        if router.ndim != 2 or groups.ndim != 1 or counts != {len(router)} or groups.min() < 0:
            raise ValueError(f"router {list(router.shape)}, experts {sorted(counts)}")
        if extra.gate_up.shape[:1] != extra.down.shape[:1]:
            raise ValueError(f"extra {list(extra.gate_up.shape)} and {list(extra.down.shape)}")
    except (KeyError, ValueError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{file} is damaged at {name!r}: {error}") from error
    return StoredLayer(router, groups, extra, residuals)


def residuals_of(tensors: Mapping[str, Tensor], matrix: str) -> dict[str, Tensor]:
    """Those of a layer's tensors that are the residuals of gate_up or down; see
    `residuals.Packed`.
    """
    prefix = f"{matrix}."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
