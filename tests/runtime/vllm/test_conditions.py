"""What blends ask of vLLM's settings and of the layers it makes, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.launch import Mode, PluginOptions

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]


def settings(**changes: Any) -> Any:
    usual = {
        "fully_sharded_loras": False,
        "enable_tower_connector_lora": False,
        "lora_dtype": torch.float32,
        "max_lora_rank": 8,
        "dtype": torch.float32,
        "enable_sleep_mode": False,
        "_api_process_count": 1,
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
    }
    every = SimpleNamespace(**{**usual, **changes})
    return SimpleNamespace(lora_config=every, parallel_config=every, model_config=every)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"fully_sharded_loras": True}, "--fully-sharded-loras"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"_api_process_count": 2}, "--api-server-count"),
        ({"max_lora_rank": 16}, "--max-lora-rank 16, which is not 8"),
        ({"lora_dtype": torch.float16}, "--lora-dtype torch.float16, which is not torch.float32"),
        ({"use_ubatching": True}, "--enable-dbo or --ubatch-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
    ],
)
def test_what_blends_are_not_served_with_is_refused_by_name(
    changes: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    from mergeroute.runtime.vllm.conditions import check_settings

    options = PluginOptions(tmp_path, rank=8)
    check_settings(settings(), options)
    with pytest.raises(EngineError, match=flag):
        check_settings(settings(**changes), options)


@pytest.mark.parametrize("mode", ["virtual", "auto"])
def test_what_a_server_is_started_with_is_not_refused(mode: Mode, tmp_path: Path) -> None:
    from mergeroute.runtime.vllm.conditions import check_settings

    options = PluginOptions(tmp_path, slots=4, rank=8, mode=mode)
    flags = options.arguments(16)
    rank = int(flags[flags.index("--max-lora-rank") + 1])
    check_settings(settings(max_lora_rank=rank), options)
    with pytest.raises(EngineError, match="--max-lora-rank 1, which is not 8"):
        check_settings(settings(max_lora_rank=1), options)


def blank(kind: Any) -> Any:
    """A layer of this kind, as far as its kind goes."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def test_linear_layers_are_told_from_experts_and_their_routers() -> None:
    from vllm.model_executor.layers.fused_moe import GateLinear, MoERunner
    from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from mergeroute.runtime.vllm.conditions import linear_suffixes

    model = nn.Module()
    model.embed_tokens = blank(VocabParallelEmbedding)
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].o_proj = blank(RowParallelLinear)
    model.layers[0].shared_expert_gate = blank(ReplicatedLinear)
    model.layers[0].gate = blank(GateLinear)
    model.layers[0].experts = blank(MoERunner)
    assert linear_suffixes(model) == ["o_proj", "shared_expert_gate"]


def test_what_latent_attention_has_absorbed_is_not_blended() -> None:
    from mergeroute.runtime.vllm.conditions import blended_suffixes

    names = ["kv_b_proj", "o_proj"]
    assert blended_suffixes(names, use_mla=True) == ["o_proj"]
    assert blended_suffixes(names, use_mla=False) == names


def test_experts_that_run_by_kernels_for_loras_are_refused() -> None:
    from vllm.model_executor.layers.fused_moe import MoERunner

    from mergeroute.runtime.vllm.conditions import check_experts

    model: Any = nn.Module()
    model.experts = blank(MoERunner)
    model.experts.moe_config = SimpleNamespace(is_lora_enabled=False)
    check_experts(model, ["o_proj"])
    with pytest.raises(EngineError, match="leave experts out of --lora-target-modules"):
        check_experts(model, ["o_proj", "experts"])
    model.experts.moe_config.is_lora_enabled = True
    with pytest.raises(EngineError, match=r"the experts of experts .*torch engine"):
        check_experts(model, ["o_proj"])


def test_embeddings_and_heads_with_loras_are_refused_by_name() -> None:
    from vllm.lora.layers import RowParallelLinearWithLoRA, VocabParallelEmbeddingWithLoRA

    from mergeroute.runtime.vllm.conditions import check_wrapped

    layers = {"model.layers.0.o_proj": blank(RowParallelLinearWithLoRA)}
    check_wrapped(layers)
    layers["model.embed_tokens"] = blank(VocabParallelEmbeddingWithLoRA)
    with pytest.raises(EngineError, match=r"leave embed_tokens out of --lora-target-modules"):
        check_wrapped(layers)
