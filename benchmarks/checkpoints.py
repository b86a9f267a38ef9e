"""Random checkpoints of Qwen2.5-0.5B's shape: a base, and experts that are the base plus noise."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"
WEIGHT_STD = 0.02
CHANGE_STD = 0.002
"""Of an expert's entry. In bfloat16 a delta then has a few hundred distinct values, as small
fine-tunings have: many entries are equal in size, which is what trimming has to cope with.
"""


@dataclass(frozen=True)
class Shape:
    """What differs from Qwen2.5-0.5B for a trial run."""

    layers: int = 24
    vocabulary: int = 151936

    def config(self) -> transformers.Qwen2Config:
        """The model's configuration: 494 M parameters by default, tied embeddings, bfloat16."""
        return transformers.Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=self.layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
            dtype="bfloat16",
        )

    def tensors(self) -> dict[str, torch.Size]:
        """Shapes of the stored tensors, by name."""
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config())
        return {name: value.shape for name, value in model.named_parameters()}

    @property
    def nbytes(self) -> int:
        """Of one checkpoint."""
        return 2 * sum(shape.numel() for shape in self.tensors().values())


@dataclass(frozen=True)
class Checkpoints:
    """The folders. They are read again where they exist: `folder` must be of this shape."""

    folder: Path
    shape: Shape
    experts: int

    @property
    def base(self) -> Path:
        """Of the base."""
        return self.folder / "base"

    def expert(self, index: int) -> Path:
        """Of an expert."""
        return self.folder / f"expert-{index}"

    def make(self) -> None:
        """Write the folders that are not there yet.

        Raises:
            OSError: less space than the checkpoints and two outputs need.
        """
        needed = (self.experts + 3) * self.shape.nbytes
        made = sum(file.stat().st_size for file in self.folder.glob(f"*/{WEIGHTS}"))
        free = shutil.disk_usage(self.folder).free
        if free + made < needed:
            raise OSError(f"{self.folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed")
        folders = [self.base, *(self.expert(index) for index in range(self.experts))]
        for seed, folder in enumerate(track(folders, "models", console=Console(stderr=True))):
            if not (folder / WEIGHTS).exists():
                self._write(folder, seed=seed)

    def warm(self) -> None:
        """Read everything, so that it is in the page cache."""
        for file in self.folder.glob(f"*/{WEIGHTS}"):
            with file.open("rb", buffering=0) as raw:
                while raw.read(1 << 24):
                    pass

    def _write(self, folder: Path, *, seed: int) -> None:
        """One checkpoint; the base is the one with seed 0."""
        generator = torch.Generator().manual_seed(seed)
        folder.mkdir(exist_ok=True)
        tensors = {}
        for name, shape in self.shape.tensors().items():
            noise = torch.empty(shape).normal_(generator=generator)
            if seed:
                with safe_open(self.base / WEIGHTS, "pt") as base:
                    value = noise.mul_(CHANGE_STD).add_(base.get_tensor(name))
            else:
                value = noise.mul_(WEIGHT_STD).add_(1.0 if "norm" in name else 0.0)
            tensors[name] = value.bfloat16()
        self.shape.config().save_pretrained(folder)
        partial = folder / "partial.safetensors"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.rename(folder / WEIGHTS)
