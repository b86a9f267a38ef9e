"""What is found out about a model before modules may change its outer layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from mergeroute.adapters.errors import UnsupportedModelError
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.compatibility import prepare_model
from mergeroute.runtime.probing import Probe

from ..tiny import CONFIGS, make_model


def make_probe(model: Any) -> Probe:
    return Probe(model, Shapes.of(model))


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_norm_gives_its_input_normalised(architecture: str, is_prepared: bool) -> None:
    model = make_model(architecture)
    if is_prepared:
        prepare_model(model)
    probe = make_probe(model)
    owners = {name.rpartition(".")[0] for name in Shapes.of(model).vectors}
    norms = {owner: probe.unit(owner) for owner in owners if probe.unit(owner) is not None}
    assert len(norms) >= 7
    for owner, unit in norms.items():
        assert unit is not None
        x = torch.randn(5, model.get_submodule(owner).weight.shape[0])
        normed = unit(x)
        torch.testing.assert_close(normed.square().mean(1), torch.ones(5), atol=1e-2, rtol=0)


def test_rows_lie_where_the_architecture_puts_them() -> None:
    for architecture, dim in (("qwen3", 1), ("gemma3", 2)):
        probe = make_probe(make_model(architecture))
        assert probe.row_dim("model.layers.0.self_attn.q_norm") == dim
        assert probe.row_dim("model.norm") == 1
        assert probe.row_dim("lm_head") == 1


def test_scales_are_the_architectures() -> None:
    assert make_probe(make_model("llama")).embedding_scale("model.embed_tokens") == 1
    scale = make_probe(make_model("gemma3")).embedding_scale("model.embed_tokens")
    assert scale == pytest.approx(32**0.5)
    half = make_model("gemma2").bfloat16()
    assert make_probe(half).embedding_scale("model.embed_tokens") == 5.65625


def test_a_short_context_is_enough() -> None:
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.n_positions = 8
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert make_probe(model).row_dim("transformer.wpe") == 1


def test_probing_leaves_no_trace() -> None:
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    probe = make_probe(model)
    probe.unit("model.norm")
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_positions_with_an_offset_are_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    probe = make_probe(model)
    with pytest.raises(UnsupportedModelError, match="embed_positions"):
        probe.embedding_scale("model.decoder.embed_positions")
    assert probe.embedding_scale("model.decoder.embed_tokens") == 1
