"""How much memory a server will take, reckoned before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..adapters.backbone import Backbone
from ..adapters.kinds import empty_model
from ..adapters.lora import Module
from ..adapters.shapes import Shapes
from ..runtime.footprint import Footprint, Room
from ..runtime.loading import context_length
from .findings import Finding
from .settings import ServeSettings

_TIGHT = 0.9
_SPARE_RANKS = 1.25
"""The stack of modules grows in steps of so much, where no budget is stated."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Estimate:
    """Bytes of one backbone's engine: weights, keys and values of all slots, modules."""

    weights: int
    cache: int
    modules: int

    @property
    def total(self) -> int:
        """Together; what a step itself takes comes on top."""
        return self.weights + self.cache + self.modules


def estimate(
    backbone: Backbone, modules: Sequence[Module], settings: ServeSettings, dtype: torch.dtype
) -> Estimate:
    """What an engine takes.

    modules: of all banks on this backbone.

    Raises:
        MergerouteError: the backbone cannot be served.
    """
    model = empty_model(backbone.path).to(dtype)
    room = Room.of(model, backbone.shapes, settings.module_memory)
    needed = room.needed(footprints(modules, backbone.shapes))
    budget = settings.module_memory
    return Estimate(
        weights=sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()),
        cache=_cache_bytes(model.config, settings) * dtype.itemsize,
        modules=int(needed * _SPARE_RANKS) if budget is None else (budget if modules else 0),
    )


def footprints(modules: Iterable[Module], shapes: Shapes) -> list[Footprint]:
    """What modules ask of a stack."""
    return [
        Footprint(
            max(1, module.rank),
            frozenset(module.resolved(shapes)),
            frozenset(name.rpartition(".")[0] for name in module.vectors),
        )
        for module in modules
    ]


def check_memory(estimates: Sequence[Estimate], device: torch.device) -> Finding:
    """Whether the engines of all backbones fit into what is free."""
    total, free = sum(one.total for one in estimates), free_bytes(device)
    parts = (
        f"{_gb(sum(e.weights for e in estimates))} weights, "
        f"{_gb(sum(e.cache for e in estimates))} keys and values, "
        f"{_gb(sum(e.modules for e in estimates))} modules"
    )
    text = f"about {_gb(total)} ({parts}), {_gb(free)} are free on {device}"
    if total <= _TIGHT * free:
        return Finding("ok", "memory", text)
    remedy = "lower max_concurrency, max_length or module_memory, or choose another dtype or device"
    return Finding("error" if total > free else "warning", "memory", f"{text}: {remedy}")


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_group_room()])


def _group_room() -> list[int]:
    """What a container may still take; empty where nothing limits it."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return [limit - int((_CGROUP / "memory.current").read_text())]
    except (OSError, ValueError):  # "max", or no such file
        return []


def _cache_bytes(config: Any, settings: ServeSettings) -> int:  # noqa: ANN401
    """Entries of the keys and values of all slots at full length."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    slots = settings.max_concurrency * context_length(config, settings.max_length)
    return 2 * int(text.num_hidden_layers * heads * size * slots)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
