from __future__ import annotations

import pytest

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.options import VllmOptions


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("lora_target_modules", ["embed_tokens"], "its inner linear layers"),
        ("no-enable-lora", True, "always set"),
        ("enable_lora", False, "always set"),
        ("lora-dtype", "bfloat16", "the backbone's"),
        ("enable_dbo", True, "whole batches"),
        ("ubatch_size", 2, "whole batches"),
        ("prefill_context_parallel_size", 2, "whole batches"),
    ],
)
def test_what_blends_need_is_not_for_options_to_say(name: str, value: bool, why: str) -> None:
    with pytest.raises(EngineError, match=f"engine.options may not hold '{name}': .*{why}"):
        VllmOptions(flags={name: value})
