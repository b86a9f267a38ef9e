"""Tiny random sparse mixtures of experts, one of each family, and what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mergeroute.adapters.smoe.layout import ExpertWeights
from mergeroute.adapters.smoe.usage import Usage
from mergeroute.runtime.expert_usage import UsageOptions, expert_usage
from mergeroute.runtime.rendering import Rendered

from .tiny import VOCABULARY, make_prompt, make_tokenizer

EXPERTS = 4
HIDDEN = 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "mixtral": transformers.MixtralConfig(**_SIZES, num_local_experts=EXPERTS),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **_SIZES,
        num_experts=EXPERTS,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **_SIZES, num_experts=EXPERTS, moe_intermediate_size=16, head_dim=8
    ),
    "olmoe": transformers.OlmoeConfig(**_SIZES, num_experts=EXPERTS),
}
CAUSAL = tuple(CONFIGS)
SWITCH = transformers.SwitchTransformersConfig(
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    num_heads=4,
    num_experts=EXPERTS,
)


def make_moe(name: str = "mixtral", *, seed: int = 0, **sizes: Any) -> Any:
    """A random float32 model whose routers are decided and whose experts matter."""
    torch.manual_seed(seed)
    if name == "switch":
        return transformers.SwitchTransformersForConditionalGeneration(copy.deepcopy(SWITCH)).eval()
    config = copy.deepcopy(CONFIGS[name])
    config.update(sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def save_moe(model: Any, folder: Path) -> Path:
    """Write a model with a tokenizer; where it is."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_prompts(*lengths: int) -> list[Rendered]:
    """Random prompts without answers."""
    return [Rendered(make_prompt(n, seed=k), n) for k, n in enumerate(lengths)]


def usage_of(model: Any, *, lengths: Sequence[int] = (40, 9, 33, 21, 40)) -> Usage:
    """Everything that can be measured, on a few prompts."""
    options = UsageOptions(outputs=True, moments=True)
    return expert_usage(model, make_prompts(*lengths), options)


def run_expert_slowly(weights: ExpertWeights, expert: int, x: Tensor, act: Any) -> Tensor:
    """What one expert makes of x [t, D], written out."""
    inner = x @ weights.gate_up[expert].T
    if weights.parts == 2:
        width = weights.down.shape[2]
        inner = act(inner[:, :width]) * inner[:, width:]
    else:
        inner = act(inner)
    output: Tensor = inner @ weights.down[expert].T
    return output
