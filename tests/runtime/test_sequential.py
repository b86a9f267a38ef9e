"""RegMean++ moments against whole models, rebuilt and run from the first token for every block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.errors import UnsupportedModelError
from mergeroute.adapters.merging.calibrated import regmean_dense
from mergeroute.runtime.calibration import input_moments
from mergeroute.runtime.rendering import Rendered
from mergeroute.runtime.sequential import SequentialMoments, decoder_blocks
from tests.tiny import CONFIGS, make_model, make_prompt

LENGTHS = ((3, 9, 5), (30, 4))
PROMPTS = [
    [Rendered(make_prompt(n, seed=10 * k + n), n) for n in lengths]
    for k, lengths in enumerate(LENGTHS)
]


def make_expert(model: Any, *, seed: int) -> Any:
    """The model with noise on everything inside its blocks."""
    expert = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    _, blocks = decoder_blocks(expert)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return expert


def block_weights(model: Any, index: int) -> dict[str, Tensor]:
    prefix = f"{decoder_blocks(model)[0]}.{index}."
    return {n: p.detach() for n, p in model.named_parameters() if n.startswith(prefix)}


def average(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}


def with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    changed = copy.deepcopy(model)
    changed.load_state_dict(weights, strict=False)
    return changed


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_the_experts_block_behind_merged_blocks(name: str) -> None:
    base = make_model(name)
    experts = [make_expert(base, seed=k) for k in (1, 2)]
    sequential = SequentialMoments(copy.deepcopy(base), PROMPTS, batch_size=2)
    prefix: dict[str, Tensor] = {}  # the merged blocks so far
    for index in range(sequential.blocks):
        weights = [block_weights(expert, index) for expert in experts]
        found = sequential.block(index, weights)
        assert list(found) == [
            layer
            for layer in linear_layers(base)
            if layer.startswith(f"{decoder_blocks(base)[0]}.{index}.")
        ]
        for k, own in enumerate(weights):
            model = with_weights(base, prefix | own)
            expected = input_moments(model, PROMPTS[k], layers=list(found), batch_size=1)
            for layer, moment in expected.items():
                scale = float(moment.gram.diagonal().max())
                assert found[layer][k].count == moment.count == sum(LENGTHS[k])
                torch.testing.assert_close(
                    found[layer][k].gram, moment.gram, atol=1e-4 * scale, rtol=1e-3
                )
        merged = average(weights)
        sequential.merged(index, merged)
        prefix |= merged


def test_merging_and_running_in_turn_leaves_the_merged_model() -> None:
    base = make_model("llama")
    experts = [make_expert(base, seed=k) for k in (1, 2)]
    model, done = copy.deepcopy(base), []
    sequential = SequentialMoments(model, PROMPTS, on_prompt=lambda: done.append(1))
    for index in range(sequential.blocks):
        assert sequential.parameters(index) == list(block_weights(base, index))
        weights = [block_weights(expert, index) for expert in experts]
        merged = average(weights)
        for layer, moments in sequential.block(index, iter(weights)).items():
            matrices = [own[f"{layer}.weight"] for own in weights]
            merged[f"{layer}.weight"] = regmean_dense(matrices, [m.mean for m in moments])
        sequential.merged(index, merged)
        for parameter, value in merged.items():
            assert torch.equal(model.get_parameter(parameter), value)
    assert len(done) == 5 * (3 + 2)  # 3 runs of experts' blocks, 2 of merged ones
    changed = model.model.layers[0].mlp.up_proj.weight
    assert not torch.allclose(
        changed,
        average([block_weights(e, 0) for e in experts])["model.layers.0.mlp.up_proj.weight"],
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_of_one_expert_sees_what_regmean_sees() -> None:
    model = make_model("qwen2")
    plain = input_moments(model, PROMPTS[0])
    sequential = SequentialMoments(model, PROMPTS[:1])
    for index in range(sequential.blocks):
        for layer, (moment,) in sequential.block(index, [{}]).items():
            torch.testing.assert_close(moment.gram, plain[layer].gram, rtol=1e-4, atol=1e-3)
        sequential.merged(index, {})


def test_blocks_come_in_order_with_their_own_weights() -> None:
    base = make_model("llama")
    sequential = SequentialMoments(base, PROMPTS)
    with pytest.raises(ValueError, match="block 1 is not the next one, 0"):
        sequential.block(1, [{}, {}])
    with pytest.raises(ValueError, match="shorter"):
        sequential.block(0, [{}])
    other = block_weights(base, 1)
    with pytest.raises(ValueError, match=r"is no parameter of model\.layers\.0"):
        sequential.block(0, [other, other])
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"\(2, 2\) is no parameter"):
        sequential.merged(0, {name: torch.zeros(2, 2)})
    sequential.merged(0, {})
    with pytest.raises(ValueError, match="block 0 is not the next one, 1"):
        sequential.merged(0, {})


def test_a_model_whose_blocks_share_a_state_is_refused() -> None:
    class Stateful(nn.Module):
        """Adds how often it was called."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            self.calls += 1
            out: Tensor = self.inner(hidden, **kwargs)
            return out + self.calls

    model = make_model("llama")
    model.model.layers[1] = Stateful(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match="more than hidden states"):
        SequentialMoments(model, PROMPTS)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = make_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="keeps its layers where they are not found"):
        decoder_blocks(model)
