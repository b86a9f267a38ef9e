"""How far two merged checkpoints differ, and whether trimming at a tie explains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoints import WEIGHTS, Checkpoints

ROUNDING = 2.0**-7
"""One step of bfloat16 relative to a value, at most."""

FLOOR = 1e-6
"""Differences that float32 sums in another order may have where the result cancels."""

CHUNK_ENTRIES = 1 << 24
SAMPLED_ENTRIES = 1 << 23
"""Tensors up to this size are looked at entry by entry: which ones lie at a threshold."""


@dataclass(frozen=True)
class Agreement:
    """entries: compared, all of the model. differing: of these, further apart than one rounding
    to bfloat16. largest: the greatest difference. unexplained: differing entries, in the tensors
    of moderate size, where no expert's delta lies at the threshold of trimming.
    """

    entries: int
    differing: int
    largest: float
    unexplained: int

    @property
    def holds(self) -> bool:
        """Both tools computed the same, but for the choice between equal entries."""
        return self.unexplained == 0

    def __str__(self) -> str:
        share = self.differing / self.entries
        return (
            f"{share:.2%} of {self.entries:,} entries differ by more than a rounding, at most by "
            f"{self.largest:.2g}; {self.unexplained} of them not at a threshold of trimming"
        )


def compare(ours: Path, theirs: Path, *, models: Checkpoints, density: float | None) -> Agreement:
    """Compare every tensor of two merged checkpoints.

    density: of TIES; None when nothing was trimmed, so that every difference is unexplained.

    Raises:
        ValueError: the checkpoints hold different tensors.
    """
    left, right = locate(ours), locate(theirs)
    if left.keys() != right.keys():
        raise ValueError(f"tensors in only one of both: {sorted(left.keys() ^ right.keys())}")
    entries, differing, unexplained, largest = 0, 0, 0, 0.0
    for name in left:
        a, b = read(left[name], name), read(right[name], name)
        apart = torch.cat([differ(x, y) for x, y in chunks(a, b)])
        entries += a.numel()
        differing += int(apart.sum())
        largest = max(largest, *(float((x - y).abs().max()) for x, y in chunks(a, b)))
        if density is None:
            unexplained += int(apart.sum())
        elif a.numel() <= SAMPLED_ENTRIES:
            unexplained += int((apart & ~at_threshold(models, name, density=density)).sum())
    return Agreement(entries, differing, largest, unexplained)


def locate(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def read(file: Path, name: str) -> Tensor:
    """One tensor, flat."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name).flatten()


def chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float32, part by part."""
    for x, y in zip(a.split(CHUNK_ENTRIES), b.split(CHUNK_ENTRIES), strict=True):
        yield x.float(), y.float()


def differ(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors are further apart than one rounding to bfloat16."""
    return (x - y).abs() > ROUNDING * torch.maximum(x.abs(), y.abs()) + FLOOR


def at_threshold(models: Checkpoints, name: str, *, density: float) -> Tensor:
    """Entries at which some expert's |delta| equals the smallest that is kept, flat."""
    files = [models.base, *(models.expert(index) for index in range(models.experts))]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file / WEIGHTS, "pt")) for file in files]
        base, *experts = (file.get_tensor(name).flatten().float() for file in opened)
    kept = max(1, int(density * base.numel()))
    found = torch.zeros_like(base, dtype=torch.bool)
    for expert in experts:
        size = (expert - base).abs()
        found |= size == size.topk(kept).values[-1]
    return found
