"""What a sparse model does on prompts: against a slow reference, prompt by prompt, unpadded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.errors import DataError, UnsupportedModelError
from mergeroute.adapters.smoe.layout import ExpertWeights
from mergeroute.runtime.expert_usage import UsageOptions, expert_usage
from mergeroute.runtime.rendering import Rendered
from mergeroute.runtime.sparse_blocks import sparse_blocks

from ..moe import CAUSAL, EXPERTS, make_moe, make_prompts, run_expert_slowly
from ..tiny import make_model

PROMPTS = make_prompts(17, 5, 30, 9, 2)
EVERYTHING = UsageOptions(outputs=True, moments=True, sample=25)


@dataclass
class Seen:
    """What one block was given and chose, over all prompts. gates: [t, E], 0 where not chosen."""

    hidden: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)


def seen_by(model: Any, prompts: list[Rendered]) -> dict[str, Seen]:
    """One prompt at a time, by the routers' own outputs."""
    seen = {name: Seen() for name in sparse_blocks(model)}

    def note(name: str) -> Any:
        def hook(_block: Any, inputs: Any, output: Any) -> None:
            logits, gates, choice = output
            seen[name].hidden.append(inputs[0].flatten(0, -2).clone())
            seen[name].logits.append(logits)
            seen[name].gates.append(torch.zeros_like(logits).scatter(1, choice, gates))

        return hook

    handles = [b.gate.register_forward_hook(note(n)) for n, b in sparse_blocks(model).items()]
    with torch.inference_mode():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt.token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", CAUSAL)
def test_usage_is_that_of_the_prompts_one_by_one(name: str) -> None:
    model = make_moe(name)
    found = expert_usage(model, PROMPTS, EVERYTHING, batch_size=3)
    seen = seen_by(model, PROMPTS)
    assert found.keys() == seen.keys()
    for layer, usage in found.items():
        x, z, g = (
            torch.cat(part) for part in (seen[layer].hidden, seen[layer].logits, seen[layer].gates)
        )
        experts = sparse_blocks(model)[layer].experts
        weights = ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())
        outputs = [run_expert_slowly(weights, e, x, experts.act_fn) for e in range(EXPERTS)]
        assert usage.tokens == sum(len(prompt.token_ids) for prompt in PROMPTS)
        assert torch.equal(usage.counts, (g > 0).sum(0))
        assert torch.allclose(usage.logit_gram, (z.T @ z).double(), rtol=1e-4, atol=1e-2)
        own = torch.stack([(g[:, e] * outputs[e].norm(dim=1)).sum() for e in range(EXPERTS)])
        assert torch.allclose(
            usage.saliency, own / (g > 0).sum(0).clamp(min=1), rtol=1e-4, atol=1e-6
        )
        assert usage.mean_outputs is not None
        means = torch.stack([output.mean(0) for output in outputs])
        assert torch.allclose(
            usage.mean_outputs, means, rtol=1e-3, atol=1e-4 * float(means.abs().max())
        )
        assert usage.moment is not None
        moment = (x.T @ (x * g.square().sum(1, keepdim=True))) / g.square().sum()
        assert torch.allclose(
            usage.moment, moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max())
        )
        assert usage.hidden.shape == (25, x.shape[1])
        assert (torch.cdist(usage.hidden, x).min(1).values < 1e-3 * x.norm(dim=1).max()).all()


def test_switch_is_given_prompts_on_both_sides_and_pads_are_left_out() -> None:
    model = make_moe("switch")
    found = expert_usage(model, PROMPTS, EVERYTHING, batch_size=2)
    alone = expert_usage(model, PROMPTS, EVERYTHING, batch_size=1)
    assert set(found) == {"encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"}
    for layer, usage in found.items():
        assert usage.tokens == int(usage.counts.sum()) == 63  # one expert a token
        assert torch.equal(usage.counts, alone[layer].counts)
        assert torch.allclose(usage.saliency, alone[layer].saliency, rtol=1e-4)


def test_only_what_is_asked_for_is_measured_and_hooks_are_gone() -> None:
    model = make_moe()
    steps: list[None] = []
    found = expert_usage(model, PROMPTS, on_prompt=lambda: steps.append(None))
    usage = found["model.layers.0.mlp"]
    assert usage.mean_outputs is None
    assert usage.moment is None
    assert len(usage.hidden) == usage.tokens == 63
    assert len(steps) == len(PROMPTS)
    block: Any = sparse_blocks(model)["model.layers.0.mlp"]
    assert not block.experts._forward_pre_hooks
    assert not block.gate._forward_hooks


def test_fewer_prompts_than_a_batch_are_used_as_they_are() -> None:
    assert expert_usage(make_moe(), PROMPTS[:1], batch_size=8)["model.layers.0.mlp"].tokens == 17


def test_no_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="there are no calibration prompts"):
        expert_usage(make_moe(), [])


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no sparse layer"):
        expert_usage(make_model("llama"), PROMPTS)


def test_nan_is_refused() -> None:
    model = make_moe()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("inf")
    with pytest.raises(UnsupportedModelError, match="run the model in float32"):
        expert_usage(model, PROMPTS)
