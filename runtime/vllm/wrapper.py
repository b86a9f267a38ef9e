"""BlendWrapper: what both wrappers share. vLLM calls a wrapper for every layer that has LoRAs, with
stacks of all slots' factors; ours scales each slot by a weight per token.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from .token_weights import RowOf, token_weights


class BlendWrapper(PunicaWrapperBase):  # type: ignore[misc] # vLLM is not there to be checked
    """Weights by token instead of one LoRA a token.

    slots: of modules. row_of: the weights of a LoRA id; the manager sets it. joins_neighbours:
    whether modules in neighbouring slots cost less than others.
    """

    joins_neighbours = False

    row_of: RowOf

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.slots: int = settings["lora_config"].max_loras

    def update_metadata(self, mapping: Any, *_: object, **__: object) -> None:  # noqa: ANN401
        """Called before every step: mapping.index_mapping holds a LoRA id per token, 0 for none."""
        rows, places = token_weights(mapping.index_mapping, self.row_of, slots=self.slots)
        self.set_weights(rows, places)

    def set_weights(self, rows: Tensor, places: Tensor) -> None:
        """Keep the next step's weights. rows: [rows, slots]. places: a row per token, [t]."""
        raise NotImplementedError

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            "mergeroute: only inner linear layers are blended; start vLLM without "
            "--fully-sharded-loras, and with no embedding, head or experts in --lora-target-modules"
        )

    add_shrink = add_expand = add_lora_embedding = add_lora_logits = _refuse
    apply_lora_full_linear = add_lora_fused_moe = _refuse
