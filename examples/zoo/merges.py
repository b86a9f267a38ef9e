"""Dense deltas of the experts, static merges of them, and their low-rank exclusive parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

LORA_SCALE = 2.0
TIES_DENSITY = 0.2
DARE_DENSITY = 0.5

Deltas = dict[str, Tensor]
Merge = Callable[[list[Tensor]], Tensor]


def full_deltas(base: Path, expert: Path) -> Deltas:
    """Return the change of every matrix of the layers, each [o, i], by weight name."""
    before = load_file(base / "model.safetensors")
    after = load_file(expert / "model.safetensors")
    return {
        name: after[name].float() - before[name].float()
        for name in before
        if "layers" in name and before[name].ndim == 2
    }


def lora_deltas(folder: Path) -> Deltas:
    """Return the product B A of every layer with its scale folded in, by weight name."""
    factors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): LORA_SCALE
        * (factors[name.replace("lora_A", "lora_B")].float() @ factor.float())
        for name, factor in factors.items()
        if "lora_A" in name
    }


def average(deltas: list[Tensor]) -> Tensor:
    """Return the mean of the deltas: weight averaging, or model soup."""
    return torch.stack(deltas).mean(0)


def task_arithmetic(deltas: list[Tensor]) -> Tensor:
    """Return the sum, to be scaled. Source: Ilharco et al. 2023, arXiv:2212.04089, section 4."""
    return torch.stack(deltas).sum(0)


def ties(deltas: list[Tensor]) -> Tensor:
    """Trim to 20 %, elect signs, average; to be scaled.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.
    """
    merged: Tensor = merge_utils.ties(deltas, torch.ones(len(deltas)), TIES_DENSITY)
    return merged


def dare(deltas: list[Tensor]) -> Tensor:
    """Drop half at random, rescale, sum; to be scaled. Source: Yu et al. 2024, arXiv:2311.03099."""
    merged: Tensor = merge_utils.dare_linear(deltas, torch.ones(len(deltas)), DARE_DENSITY)
    return merged


MERGES: dict[str, Merge] = {
    "weight average": average,
    "task arithmetic": task_arithmetic,
    "TIES": ties,
    "DARE": dare,
}


def merge(experts: Sequence[Deltas], method: str) -> Deltas:
    """Merge the experts' deltas matrix by matrix; DARE's mask is the same on every call."""
    torch.manual_seed(0)
    return {name: MERGES[method]([expert[name] for expert in experts]) for name in experts[0]}


def scaled(deltas: Deltas, scale: float) -> Deltas:
    """Return the deltas times a scale."""
    return {name: scale * delta for name, delta in deltas.items()}


def low_rank(delta: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of the given rank, rounded as its bf16 factors would be."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]  # [o, r], [r, i]
    product: Tensor = left.bfloat16().float() @ right.bfloat16().float()
    return product


def twin(shared: Deltas, expert: Deltas, rank: int) -> Deltas:
    """Return the shared part plus the expert's exclusive part at the given rank.

    Source: Lu et al. 2024, Twin-Merging, arXiv:2406.15479, section 3.
    """
    return {name: shared[name] + low_rank(expert[name] - shared[name], rank) for name in shared}


def low_rank_bytes(deltas: Deltas, rank: int) -> int:
    """Count the bytes of bf16 factors of the given rank for all matrices."""
    return sum(2 * rank * sum(delta.shape) for delta in deltas.values())


def apply(model: LlamaForCausalLM, deltas: Deltas) -> None:
    """Add the deltas to a model's weights in place."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            weights[name].add_(delta)
