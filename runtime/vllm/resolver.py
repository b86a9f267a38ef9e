"""BlendResolver: vLLM's public way to get LoRAs by name, which materialised blends go by."""

from __future__ import annotations

import asyncio

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ...adapters.errors import MergerouteError
from .blends import read_name
from .materialise import materialise
from .store import ModuleStore


class BlendResolver(LoRAResolver):  # type: ignore[misc] # vLLM is not there to be checked
    """Blends of a store's modules as LoRA folders."""

    def __init__(self, store: ModuleStore) -> None:
        self._store = store

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a blend; None, which vLLM answers by 404, for any other name and where a
        module is not registered.
        """
        try:
            if any(key not in self._store for key in read_name(lora_name)):
                return None
            folder = await asyncio.to_thread(materialise, self._store, lora_name)
        except MergerouteError:
            return None
        return LoRARequest(lora_name, 1, str(folder), base_model_name)  # vLLM sets the number
