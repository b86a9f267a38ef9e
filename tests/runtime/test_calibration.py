"""Moments and Fisher diagonals against autograd and loops over single prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.errors import DataError, UnsupportedModelError
from mergeroute.runtime.calibration import Moment, fisher_diagonals, input_moments
from mergeroute.runtime.rendering import Rendered
from tests.tiny import CONFIGS, make_model, make_prompt

LENGTHS = (3, 9, 5, 9, 1)
PROMPTS = [Rendered(make_prompt(n, seed=k), n) for k, n in enumerate(LENGTHS)]
ANSWERED = [Rendered(make_prompt(n + 3, seed=k), n) for k, n in enumerate((3, 6))]


class Bigram(nn.Module):
    """One linear layer on one-hot tokens: logits [b, t, 4]."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        one_hot = nn.functional.one_hot(input_ids, 4).float()
        return type("Output", (), {"logits": self.layer(one_hot)})()


def inputs_of(model: Any, name: str, prompt: Rendered) -> Tensor:
    """What a layer is given for a single prompt, [t, i]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt.token_ids]))
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_prompts_one_by_one(name: str) -> None:
    model = make_model(name)
    moments = input_moments(model, PROMPTS, dtype=torch.float64, batch_size=3)
    assert moments.keys() == linear_layers(model).keys()
    for layer, (_, size) in linear_layers(model).items():
        rows = torch.cat([inputs_of(model, layer, prompt) for prompt in PROMPTS]).double()
        expected = torch.zeros(size, size, dtype=torch.float64)
        for row in rows:
            expected += torch.outer(row, row)
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(moments[layer].gram, expected, atol=1e-4 * scale, rtol=1e-4)
        assert moments[layer].count == sum(LENGTHS)
        torch.testing.assert_close(moments[layer].mean, moments[layer].gram / sum(LENGTHS))


def test_padding_would_show() -> None:
    """The padded rows are not zero: were they counted, the test above would fail."""
    model = make_model("llama")
    layer = next(iter(linear_layers(model)))
    alone = input_moments(model, PROMPTS[:1], layers=[layer])[layer]
    both = input_moments(model, PROMPTS[:2], layers=[layer], batch_size=2)[layer]
    padding = Rendered((*PROMPTS[0].token_ids, *[0] * 6), 9)
    padded = input_moments(model, [padding, PROMPTS[1]], layers=[layer], batch_size=2)[layer]
    assert (alone.count, both.count, padded.count) == (3, 12, 18)
    assert not torch.allclose(both.gram, padded.gram, rtol=0.01, atol=0.01)


def test_layers_can_be_chosen_and_the_head_is_one() -> None:
    model = make_model("llama")
    layers = ["model.layers.1.mlp.down_proj", "lm_head"]
    moments = input_moments(model, PROMPTS, layers=layers)
    assert list(moments) == layers
    everything = input_moments(model, PROMPTS)
    torch.testing.assert_close(moments[layers[0]].gram, everything[layers[0]].gram)
    assert "lm_head" not in everything
    hidden = torch.cat([inputs_of(model, "lm_head", prompt) for prompt in PROMPTS])
    torch.testing.assert_close(moments["lm_head"].gram, hidden.T @ hidden, atol=1e-3, rtol=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"'model\.norm' is no linear layer"):
        input_moments(model, PROMPTS, layers=["model.norm"])


def test_moments_leave_no_hook_and_count_prompts() -> None:
    model, done = make_model("llama"), []
    input_moments(model, PROMPTS, on_prompt=lambda: done.append(1))
    assert len(done) == len(PROMPTS)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(UnsupportedModelError, match="hold NaN or inf"):
        input_moments(model, PROMPTS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_prompts_are_no_tokens() -> None:
    moments = input_moments(make_model("llama"), [])
    assert {moment.count for moment in moments.values()} == {0}
    assert not any(moment.gram.any() for moment in moments.values())
    assert not Moment(torch.zeros(2, 2), 0).mean.any()


def test_fisher_of_one_layer_is_what_the_formula_says() -> None:
    """Softmax regression: the gradient of log p(y | x) is (onehot(y) - p) xᵀ."""
    torch.manual_seed(0)
    model = Bigram()
    prompts = [Rendered((0, 1, 2, 3), 2), Rendered((3, 3, 1), 2), Rendered((2, 0), 1)]
    expected = torch.zeros(4, 4)
    for prompt in prompts:
        gradient = torch.zeros(4, 4)
        for position in range(prompt.prompt_length, len(prompt.token_ids)):
            before, label = prompt.token_ids[position - 1], prompt.token_ids[position]
            p = model.layer.weight[:, before].detach().softmax(0)
            gradient[:, before] += nn.functional.one_hot(torch.tensor(label), 4) - p
        expected += gradient.square() / len(prompts)
    found = fisher_diagonals(model, prompts)
    torch.testing.assert_close(found["layer.weight"], expected)


def test_labels_drawn_from_the_model_give_its_own_fisher() -> None:
    """Expectation over labels: p (1 - p) for the row of each label, by position."""
    torch.manual_seed(1)
    model = Bigram()
    prompt = Rendered((0, 1, 2), 3)
    p = model.layer.weight[:, :3].detach().softmax(0)
    found = fisher_diagonals(model, [prompt] * 4000)["layer.weight"]
    torch.testing.assert_close(found[:, :3], p * (1 - p), atol=0.02, rtol=0)
    assert not found[:, 3].any()


def test_answers_are_labels_unless_labels_are_to_be_drawn() -> None:
    model = make_model("llama")
    given = fisher_diagonals(model, ANSWERED)
    drawn = fisher_diagonals(model, ANSWERED, labels="sampled")
    again = fisher_diagonals(model, ANSWERED, labels="sampled")
    other = fisher_diagonals(model, ANSWERED, labels="sampled", seed=1)
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.allclose(given[name], drawn[name])
    assert torch.equal(drawn[name], again[name])
    assert not torch.equal(drawn[name], other[name])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fisher_is_the_mean_of_squared_gradients(name: str) -> None:
    model = make_model(name)
    found = fisher_diagonals(model, ANSWERED)
    assert found.keys() == dict(model.named_parameters()).keys()
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for example in ANSWERED:
        model.zero_grad()
        ids = torch.tensor([example.token_ids])
        labels = ids.clone()
        labels[0, : example.prompt_length] = -100
        (model(input_ids=ids, labels=labels).loss * 3).backward()  # the mean over three tokens
        for n, parameter in model.named_parameters():
            expected[n] += parameter.grad.square() / len(ANSWERED)
    for n, diagonal in found.items():
        torch.testing.assert_close(diagonal, expected[n], rtol=1e-3, atol=1e-4)


def test_fisher_of_some_parameters_leaves_the_model_as_it_was() -> None:
    model, done = make_model("llama"), []
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = fisher_diagonals(model, ANSWERED, parameters=[name], on_prompt=lambda: done.append(1))
    assert list(found) == [name]
    assert found[name].dtype == torch.float32
    assert len(done) == len(ANSWERED)
    required = [n for n, p in model.named_parameters() if p.requires_grad]
    assert required == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    everything = fisher_diagonals(model, ANSWERED)[name]
    torch.testing.assert_close(found[name], everything)


def test_fisher_of_nothing_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(DataError, match="no prompts"):
        fisher_diagonals(model, [])
    with pytest.raises(UnsupportedModelError, match="'x' is no parameter"):
        fisher_diagonals(model, ANSWERED, parameters=["x"])
