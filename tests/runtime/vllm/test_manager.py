"""BlendLoRAManager beside the parts of vLLM that it stands on, without a model."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]


def test_after_all_blends_are_forgotten_the_same_numbers_get_new_weights() -> None:
    """As in a trial run between two steps, whose blends are numbered from 1 too."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import LoRAModelManager

    from mergeroute.runtime.vllm.manager import BlendLoRAManager

    class Slots:
        """vLLM's own, as far as mappings go."""

        _last_mapping = _last_slot_layout = None
        lora_index_to_id = (7, None)
        set_adapter_mapping = LoRAModelManager.set_adapter_mapping

        def __init__(self) -> None:
            self.made: list[Any] = []

        def _set_adapter_mapping(self, mapping: Any) -> None:
            self.made.append(mapping)

    manager = BlendLoRAManager.__new__(BlendLoRAManager)
    manager._adapter_manager = slots = Slots()
    manager._blends = OrderedDict()
    mapping = LoRAMapping((1,), (1,), is_prefill=True)
    trial = SimpleNamespace(lora_int_id=1)
    for _ in range(2):
        manager.add_dummy_lora(trial, rank=8)
        slots.set_adapter_mapping(mapping)
    assert len(slots.made) == 1
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()
    slots.set_adapter_mapping(mapping)
    assert len(slots.made) == 2
