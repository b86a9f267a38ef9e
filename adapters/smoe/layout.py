"""Layout: where a sparse mixture of experts keeps its experts and routers, read layer by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..backbone import locate, stated_folder
from ..checkpoint import Checkpoint, TensorInfo, all_finite
from ..errors import BackboneError, CheckpointError
from ..kinds import UNUSABLE

BLOCK = "mlp"
"""What transformers calls a sparse block in memory, whatever the checkpoint calls it."""

_FUSED = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Family:
    """What a family's checkpoints call the parts of a sparse block.

    inner: the matrices [F, D] that an expert begins with, the gate first. down: [D, F].
    count: the configuration's key for the number of experts. is_causal: whether it is a causal
    language model, as a bank's backbone is.
    """

    block: str
    expert: str
    inner: tuple[str, ...]
    down: str
    router: str
    count: str
    is_causal: bool = True


_QWEN = Family(
    BLOCK, "experts.{}", ("gate_proj", "up_proj"), "down_proj", "gate.weight", "num_experts"
)
_MIXTRAL = Family(
    "block_sparse_moe", "experts.{}", ("w1", "w3"), "w2", "gate.weight", "num_local_experts"
)
_SWITCH = Family(
    BLOCK, "experts.expert_{}", ("wi",), "wo", "router.classifier.weight", "num_experts", False
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
    "switch_transformers": _SWITCH,
}
"""By the configuration's model_type."""


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts of one layer, as transformers holds them.

    gate_up: [E, p F, D], p = 2 with the gate's rows first, or 1 where there is no gate (Switch).
    down: [E, D, F].
    """

    gate_up: Tensor
    down: Tensor

    def __len__(self) -> int:
        return len(self.down)

    @property
    def parts(self) -> int:
        """How many matrices an expert begins with: 2 with a gate, else 1."""
        return self.gate_up.shape[1] // self.down.shape[2]

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both stacks, gate_up and down."""
        return self.gate_up, self.down

    def chosen(self, experts: Tensor) -> ExpertWeights:
        """Some of them, by index."""
        return ExpertWeights(self.gate_up[experts], self.down[experts])


@dataclass(frozen=True)
class SparseLayer:
    """One sparse block of a checkpoint.

    name: the block's name in a model that transformers loaded. stored: its prefix on disk.
    width: F, an expert's neurons. hidden: D.
    """

    name: str
    stored: str
    experts: int
    hidden: int
    width: int
    parts: int
    dtype: torch.dtype
    is_fused: bool

    @property
    def expert_bytes(self) -> int:
        """Bytes of its experts as they are stored."""
        numbers = self.experts * (self.parts + 1) * self.hidden * self.width
        return numbers * self.dtype.itemsize


@dataclass(frozen=True)
class MoeCheckpoint:
    """A checkpoint of a sparse mixture of experts.

    layers: its sparse blocks, in order. top_k: experts that a token is sent to.
    config: as its file has it.
    """

    path: Path
    checkpoint: Checkpoint
    family: Family
    layers: tuple[SparseLayer, ...]
    experts: int
    top_k: int
    config: Mapping[str, Any]

    @classmethod
    def open(cls, source: str | Path) -> MoeCheckpoint:
        """Open a folder or hub id.

        Raises:
            BackboneError: it is no sparse mixture of experts of a family that is known, quantised,
                or its files are damaged.
        """
        path = locate(stated_folder(source))
        config = _configuration(path)
        family = _family(path, config)
        checkpoint = Checkpoint.open(path)
        layers = tuple(_layers(path, checkpoint, family))
        if not layers:
            raise BackboneError(f"{path} has no sparse layer: all its layers are dense")
        return cls(
            path=path,
            checkpoint=checkpoint,
            family=family,
            layers=layers,
            experts=_experts(path, layers),
            top_k=int(getattr(config, "num_experts_per_tok", None) or 1),  # Switch: always one
            config=json.loads((path / "config.json").read_text("utf-8")),
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts as they are stored, routers and shared experts left out."""
        return sum(layer.expert_bytes for layer in self.layers)

    def read(self, layer: SparseLayer) -> ExpertWeights:
        """A layer's experts, float32.

        Raises:
            CheckpointError: they hold NaN or inf.
        """
        weights = _empty(layer)
        for name, target in named_tensors(layer, self.family, weights):
            target.copy_(self.checkpoint.read(name))
            if not all_finite(target):
                raise CheckpointError(f"{self.path} holds NaN or inf in {name!r}")
        return weights

    def router(self, layer: SparseLayer) -> Tensor:
        """A layer's router rows, [E, D], float32."""
        return self.checkpoint.read(f"{layer.stored}.{self.family.router}").float()

    def tensors_of(self, layer: SparseLayer) -> frozenset[str]:
        """The names of a layer's experts and router on disk."""
        router = f"{layer.stored}.{self.family.router}"
        if layer.is_fused:
            return frozenset({router, *(f"{layer.stored}.{name}" for name in _FUSED)})
        names = (expert_names(layer.stored, self.family, e) for e in range(layer.experts))
        return frozenset({router} | {name for inner, down in names for name in (*inner, down)})


def expert_names(block: str, family: Family, expert: int) -> tuple[tuple[str, ...], str]:
    """What the published checkpoints call an expert's inner matrices, and its down matrix."""
    prefix = f"{block}.{family.expert.format(expert)}"
    return tuple(
        f"{prefix}.{part}.weight" for part in family.inner
    ), f"{prefix}.{family.down}.weight"


def named_tensors(
    layer: SparseLayer, family: Family, weights: ExpertWeights
) -> Iterator[tuple[str, Tensor]]:
    """A layer's experts as the tensors that they are on disk, by name: views of the weights."""
    if layer.is_fused:
        yield from zip((f"{layer.stored}.{name}" for name in _FUSED), weights.matrices, strict=True)
        return
    for expert in range(layer.experts):
        inner, down = expert_names(layer.stored, family, expert)
        yield from zip(inner, weights.gate_up[expert].chunk(layer.parts), strict=True)
        yield down, weights.down[expert]


def _empty(layer: SparseLayer, device: str = "cpu") -> ExpertWeights:
    """Weights of a layer's shapes, not filled, float32."""
    return ExpertWeights(
        torch.empty(layer.experts, layer.parts * layer.width, layer.hidden, device=device),
        torch.empty(layer.experts, layer.hidden, layer.width, device=device),
    )


def model_type(path: Path) -> str | None:
    """The family that a checkpoint's configuration states; None where it states none."""
    try:
        stated = json.loads((path / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(stated)


def _configuration(path: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UNUSABLE as error:
        raise BackboneError(f"{path} has no usable config.json: {error}") from error
    if getattr(config, "quantization_config", None):
        raise BackboneError(
            f"{path} is quantised: merge the experts of the bfloat16 checkpoint it came from"
        )
    return config


def _family(path: Path, config: Any) -> Family:  # noqa: ANN401
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BackboneError(
            f"{path} is a {config.model_type} model, no sparse mixture of experts that is known "
            f"({', '.join(FAMILIES)}): leave out the mapping experts, and list dense experts"
        )
    return family


def _layers(path: Path, checkpoint: Checkpoint, family: Family) -> Iterator[SparseLayer]:
    """The sparse blocks: each has a router."""
    blocks = {family.block, BLOCK}
    pattern = re.compile(rf"(.+)\.({'|'.join(sorted(blocks))})\.{re.escape(family.router)}")
    found = [m for name in checkpoint.tensors if (m := pattern.fullmatch(name))]
    for match in sorted(found, key=lambda match: _natural(match[1])):
        stored = f"{match[1]}.{match[2]}"
        yield _layer(path, checkpoint, family, name=f"{match[1]}.{BLOCK}", stored=stored)


def _layer(
    path: Path, checkpoint: Checkpoint, family: Family, *, name: str, stored: str
) -> SparseLayer:
    router = f"{stored}.{family.router}"
    shape = checkpoint.tensors[router].shape
    if len(shape) != 2:
        raise CheckpointError(f"{path} has {router!r} of shape {list(shape)}, a router has rows")
    experts, hidden = shape
    is_fused = f"{stored}.{_FUSED[0]}" in checkpoint.tensors
    down = f"{stored}.{_FUSED[1]}" if is_fused else expert_names(stored, family, 0)[1]
    info = _known(path, checkpoint, down)
    layer = SparseLayer(
        name=name,
        stored=stored,
        experts=experts,
        hidden=hidden,
        width=info.columns,
        parts=len(family.inner),
        dtype=info.dtype,
        is_fused=is_fused,
    )
    _check_shapes(path, checkpoint, layer, family)
    return layer


def _check_shapes(path: Path, checkpoint: Checkpoint, layer: SparseLayer, family: Family) -> None:
    """Every expert is there, and of one shape with the others."""
    for name, target in named_tensors(layer, family, _empty(layer, "meta")):
        info = _known(path, checkpoint, name)
        if info.shape != tuple(target.shape) or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{path} has {name!r} of shape {list(info.shape)} in {str(info.dtype)[6:]}, its "
                f"router and the other experts need floats of {list(target.shape)}"
            )


def _known(path: Path, checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{path} lacks the tensor {name!r}: it is incomplete, copy it again")
    return checkpoint.tensors[name]


def _experts(path: Path, layers: tuple[SparseLayer, ...]) -> int:
    counts = {layer.experts for layer in layers}
    if len(counts) > 1:
        raise BackboneError(f"{path} has layers of {sorted(counts)} experts: all need as many")
    return counts.pop()


def _natural(text: str) -> list[int | str]:
    """Sorts layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
