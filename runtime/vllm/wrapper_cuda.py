"""The wrapper for CUDA. It was run on CPUs only, where its arithmetic was checked, and never on a
GPU.

It is made for CUDA graphs and torch.compile: weights lie in one buffer that never moves, the same
products are run whatever the batch holds, and what is run is an operator that the compiler does not
look into. Graphs that vLLM captures for batches without LoRAs hold no products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from .token_weights import flat_a, flat_b
from .wrapper import BlendWrapper


class BlendWrapperCUDA(BlendWrapper):
    """y += ((x Aᵀ) * w) B over all slots."""

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **settings)
        self._weights = torch.zeros(max_num_batched_tokens, self.slots, device=device)
        self._is_idle = torch.ones(1, dtype=torch.bool, device="cpu")

    def set_weights(self, rows: Tensor, places: Tensor) -> None:
        """See `BlendWrapper`. Rows of padding get no module."""
        device, count = self._weights.device, places.shape[0]
        chosen = rows.to(device, non_blocking=True)[places.to(device, non_blocking=True)]
        self._weights[:count].copy_(chosen)
        self._weights[count:].zero_()
        self._is_idle[0] = not bool(rows.any())

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,  # noqa: ANN401
    ) -> Tensor:
        """Add the blends' changes of one layer to y, [t, o], in place.

        lora_a_stacked, lora_b_stacked: per slice of the output, of all slots.
        """
        torch.ops.vllm.mergeroute_add_blends(
            y,
            x,
            list(lora_a_stacked),
            list(lora_b_stacked),
            self._weights,
            self._is_idle,
            scale,
        )
        return y


def _add_blends(
    y: Tensor,
    x: Tensor,
    a_stacks: list[Tensor],
    b_stacks: list[Tensor],
    weights: Tensor,
    is_idle: Tensor,
    scale: float,
) -> None:
    if is_idle.item():  # lies on the CPU: no synchronisation
        return
    x, changed, low = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), 0
    for a, b in zip(a_stacks, b_stacks, strict=True):
        slots, rank, size = a.shape[0], a.shape[2], b.shape[2]
        shrunk = (x @ flat_a(a).T).view(-1, slots, rank)  # [t, slots, r]
        scaled = shrunk * weights[: x.shape[0], :, None]  # in float32
        flat = scaled.to(x.dtype).view(-1, slots * rank)
        changed[:, low : low + size].addmm_(flat, flat_b(b), alpha=scale)
        low += size


def _add_blends_fake(
    y: Tensor,
    x: Tensor,
    a_stacks: list[Tensor],
    b_stacks: list[Tensor],
    weights: Tensor,
    is_idle: Tensor,
    scale: float,
) -> None:
    return


direct_register_custom_op(  # as one of torch.ops.vllm
    "mergeroute_add_blends", _add_blends, mutates_args=["y"], fake_impl=_add_blends_fake
)
