"""vLLM's own wrapper for CPUs, for materialised blends, with one defect mended."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class StockWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc] # vLLM is not there to be checked
    """Leaves rows without LoRA as they are. vLLM 0.32 adds the last slot's LoRA to them where rows
    with one stand beside them; mended there in 0.33 (vllm-project/vllm, pull request 48421).
    """

    def add_lora_linear(self, y: Tensor, *arguments: Any, **named: Any) -> Tensor | None:  # noqa: ANN401
        """See vLLM's."""
        if self.no_lora:
            return y
        bare = self.token_lora_indices < 0
        kept = y[bare]  # a copy
        super().add_lora_linear(y, *arguments, **named)
        y[bare] = kept
        return y
