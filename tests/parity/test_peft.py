"""Our merges beside PEFT's, where both mean the same, and where PEFT's differ from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from mergeroute.adapters.delta import LowRank, concat
from mergeroute.adapters.lora import Module
from mergeroute.adapters.merging.elementwise import dare_linear, dare_ties, task_arithmetic, ties
from mergeroute.adapters.merging.sparsify import drop, top
from mergeroute.adapters.merging.stack import Stack, gathered

from .oracles import assert_same, dense_deltas

RANKS = {"date": 3, "roman": 5}
WEIGHTS = {"date": 0.75, "roman": -0.5}
SHAPES = ((24, 16), (1, 40), (64, 64))


class Net(nn.Module):
    """One linear layer that PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def make_adapters(*, use_rslora: bool = False) -> PeftModel:
    """A net with two random LoRAs of different ranks."""
    torch.manual_seed(0)
    configs = {
        name: LoraConfig(r=rank, lora_alpha=7, target_modules=["layer"], use_rslora=use_rslora)
        for name, rank in RANKS.items()
    }
    model = get_peft_model(Net(), configs["date"], adapter_name="date")
    model.add_adapter("roman", configs["roman"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def read_deltas(model: PeftModel, folder: Path) -> list[LowRank]:
    """Our reading of both adapters as PEFT saves them, weighted."""
    model.save_pretrained(folder, selected_adapters=list(RANKS))
    modules = {name: Module.read(folder / name, name=name) for name in RANKS}
    return [module.deltas["layer"].scaled(WEIGHTS[name]) for name, module in modules.items()]


def peft_sum(model: PeftModel, how: str) -> Tensor:
    """The weighted sum of both adapters as PEFT computes it."""
    model.base_model.add_weighted_adapter(
        list(WEIGHTS),
        list(WEIGHTS.values()),
        adapter_name=how,
        combination_type=how,
        svd_rank=sum(RANKS.values()) if how == "svd" else None,
    )
    delta: Tensor = model.base_model.model.layer.get_delta_weight(how)
    return delta.detach()


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_sum_of_loras(how: str, tmp_path: Path) -> None:
    model = make_adapters()
    summed = concat(read_deltas(model, tmp_path))
    assert_same(summed.dense(), peft_sum(model, how), rtol=1e-4, atol=1e-5)


def test_a_sum_of_loras_in_fewer_components_is_pefts_default_svd(tmp_path: Path) -> None:
    model = make_adapters()
    compact = concat(read_deltas(model, tmp_path)).compact(rank=max(RANKS.values()))
    model.base_model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), adapter_name="svd", combination_type="svd"
    )
    theirs = model.base_model.model.layer.get_delta_weight("svd").detach()
    assert_same(compact.dense(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_peft_sums_rank_stabilised_loras_too_large_by_the_root_of_the_rank(
    how: str, tmp_path: Path
) -> None:
    model = make_adapters(use_rslora=True)
    summed = concat(read_deltas(model, tmp_path)).dense()
    too_large = math.sqrt(sum(RANKS.values()))
    assert_same(summed * too_large, peft_sum(model, how), rtol=1e-4, atol=1e-4)


def test_peft_linear_adds_factors_which_is_another_thing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["layer"], init_lora_weights=False)
    model = get_peft_model(Net(), config, adapter_name="date")
    model.add_adapter("roman", config)
    summed = concat(read_deltas(model, tmp_path)).dense()
    assert (peft_sum(model, "linear") - summed).norm() > 0.3 * summed.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99])
def test_trimming(shape: tuple[int, int], density: float) -> None:
    deltas = dense_deltas(*shape)
    theirs = [merge_utils.magnitude_based_pruning(delta, density) for delta in deltas]
    ours = torch.cat([block.x for block in top(Stack.of(deltas), density).read()], 1)
    assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape: tuple[int, int]) -> None:
    deltas, weights = dense_deltas(*shape), [0.5, -1.0, 2.0]
    ours = gathered(task_arithmetic(Stack.of(deltas, weights=weights), scale=0.3))
    theirs = 0.3 * merge_utils.task_arithmetic(deltas, torch.tensor(weights))
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.2, 0.7])
def test_ties_with_equal_weights(shape: tuple[int, int], density: float) -> None:
    deltas = dense_deltas(*shape, experts=5)
    ours = gathered(ties(Stack.of(deltas), density=density))
    assert_same(ours, merge_utils.ties(deltas, torch.ones(5), density))


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_peft_ties_elects_without_the_weights_and_divides_by_a_count() -> None:
    deltas = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-2.0, 1.0, 1.0])]
    ours = gathered(ties(Stack.of(deltas, weights=[5, 1]), density=1.0))
    assert ours.flatten().tolist() == pytest.approx([1, -2, 8 / 3])
    theirs = merge_utils.ties(deltas, torch.tensor([5.0, 1.0]), 1.0)
    assert theirs.tolist() == [-2, -10, 8]


def test_peft_trims_everything_where_the_share_is_less_than_one_entry() -> None:
    deltas = [torch.tensor([[1.0, -2.0, 3.0]])]
    assert not merge_utils.ties(deltas, torch.ones(1), 0.2).any()
    assert gathered(ties(Stack.of(deltas), density=0.2)).tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dropping_rescales_by_the_probability(density: float) -> None:
    delta = dense_deltas(64, 64)[0]
    torch.manual_seed(0)
    theirs = merge_utils.random_pruning(delta, density, rescale=True)
    (ours,) = torch.cat([block.x for block in drop(Stack.of([delta]), density).read()], 1)
    for draw in (ours, theirs):  # other random numbers, the same law
        assert_same(draw[draw != 0], (delta / density)[draw != 0])
        assert draw.count_nonzero() / delta.numel() == pytest.approx(density, abs=0.03)


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_after_the_same_drop(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    deltas, density = dense_deltas(24, 16), 0.4
    stack = Stack.of(deltas)
    masks = [x != 0 for x in torch.cat([b.x for b in drop(stack, density).read()], 1)]
    monkeypatch.setattr(torch, "bernoulli", lambda p: masks.pop(0).to(p))
    theirs = getattr(merge_utils, method.__name__)(deltas, torch.ones(3), density)
    assert_same(gathered(method(stack, density=density)), theirs)
