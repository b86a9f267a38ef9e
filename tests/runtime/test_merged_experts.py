"""Merged experts in a model: against a stock model with every expert written out."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import BackboneError, CheckpointError, UnsupportedModelError
from mergeroute.adapters.experts import Base
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.adapters.smoe.stored import REPORT, TENSORS, check_plain
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.merged_experts import MergedExperts
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.sparse_blocks import sparse_blocks
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams

from ..moe import CAUSAL, make_moe, save_moe, usage_of
from ..tiny import make_module, make_prompt, reference_tokens

CPU = torch.device("cpu")
SHARED = {"method": "shared", "residuals": {"rank": 5, "rows": 0.1, "dtype": "int8"}}
GROUPED = {"method": "m-smoe", "keep": 2, "residuals": {"rank": 3}}
ROUTED = {"method": "m-smoe", "keep": 3, "router": "groups"}
UNEVEN = {"method": "hc-smoe", "keep": 2, "router": "exact", "skip_layers": [0]}


NORMALISING = [
    ("mixtral", {}),
    *itertools.product(CAUSAL[1:], ({"norm_topk_prob": False}, {"norm_topk_prob": True})),
]
"""Every family, and whether it divides gates by their sum over the top-k; Mixtral always does."""


def merged_bank(name: str, experts: dict[str, Any], folder: Path, **sizes: Any) -> Bank:
    """A bank of a tiny model of a family, which lies beside it in `moe`."""
    model = make_moe(name, **sizes)
    save_moe(model, folder / "moe")
    recipe = MoeRecipe.model_validate(
        {"base": str(folder / "moe"), "experts": experts, "calibration": "prompts"}
    )
    tools = MoeTools(collect=lambda _: usage_of(model))
    return build_moe(recipe, folder / "bank", tools=tools)


def loaded(path: Path) -> Any:
    return load_model(path, device=CPU, dtype=torch.float32)


@torch.no_grad()
def written_out(folder: Path, merged: Any) -> Any:
    """The original model with its experts' weights replaced by centre plus residual."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "moe").eval()
    for name, block in sparse_blocks(model).items():
        found: Any = merged.get_submodule(name).experts
        plain: Any = block.experts
        for expert, group in enumerate(found.groups.tolist()):
            for part, target in (("gate_up", plain.gate_up_proj), ("down", plain.down_proj)):
                dense = getattr(found, part)[group].clone()
                if found.residuals is not None:
                    dense += getattr(found.residuals, part).split()[expert].dense()
                target[expert] = dense
    return model


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("experts", [SHARED, GROUPED, UNEVEN], ids=["shared", "grouped", "uneven"])
def test_merged_experts_compute_what_experts_written_out_do(
    name: str, experts: dict[str, Any], tmp_path: Path
) -> None:
    model = loaded(merged_bank(name, experts, tmp_path).backbone.path)
    assert all(isinstance(b.experts, MergedExperts) for b in sparse_blocks(model).values())
    reference = written_out(tmp_path, model)
    ids = torch.tensor([make_prompt(40, seed=3)])
    with torch.inference_mode():
        expected, found = (m(input_ids=ids).logits for m in (reference, model))
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "norm"), NORMALISING)
def test_full_rank_residuals_give_back_the_original_model(
    name: str, norm: dict[str, bool], tmp_path: Path
) -> None:
    experts = {"method": "shared", "residuals": {"rank": 999, "dtype": "float32"}}
    model = loaded(merged_bank(name, experts, tmp_path, **norm).backbone.path)
    original = loaded(tmp_path / "moe")
    ids = torch.tensor([make_prompt(50, seed=1)])
    with torch.inference_mode():
        expected, found = (m(input_ids=ids).logits for m in (original, model))
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("experts", [SHARED, UNEVEN, ROUTED], ids=["shared", "uneven", "routed"])
@torch.no_grad()
def test_in_bfloat16_a_layer_computes_nearly_what_it_does_in_float32(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    """Where the same experts are chosen, which rounded logits change for some tokens."""
    path = merged_bank("mixtral", experts, tmp_path).backbone.path
    exact, rounded = loaded(path), load_model(path, device=CPU, dtype=torch.bfloat16)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, block in sparse_blocks(rounded).items():
        whole: Any = exact.get_submodule(name)
        for parameter, own in zip(whole.parameters(), block.parameters(), strict=True):
            parameter.copy_(own)  # what is rounded once is no error of the arithmetic
        (_, gates, chosen), (_, own_gates, own_chosen) = whole.gate(x.float()), block.gate(x)
        same = (chosen == own_chosen).all(1)
        assert same.float().mean() > 0.9
        assert error(own_gates[same], gates[same]) < 0.02
        found = block.experts(x, own_chosen, own_gates.bfloat16())
        assert found.dtype == torch.bfloat16
        assert error(found[same], whole.experts(x.float(), chosen, gates)[same]) < 0.02


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The median over tokens of |found - wanted| / |wanted|."""
    return float(((found.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).median())


@pytest.mark.parametrize("experts", [SHARED, UNEVEN], ids=["shared", "uneven"])
def test_the_engine_gives_the_tokens_of_the_experts_written_out(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    path = merged_bank("mixtral", experts, tmp_path).backbone.path
    reference = written_out(tmp_path, loaded(path))
    prompts = [make_prompt(n, seed=n) for n in (3, 21, 11)]
    with TorchEngine.load(
        path, device="cpu", dtype="float32", options=EngineOptions(max_concurrency=3)
    ) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        generations = [engine.submit(GenerationRequest(p, sampling=sampling)) for p in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            tokens = [event.token_id for event in generation if event.token_id is not None]
            assert tokens == reference_tokens(reference, {}, Blend({}), prompt, 12)


@pytest.mark.parametrize("experts", [SHARED, UNEVEN], ids=["shared", "uneven"])
def test_task_modules_blend_on_merged_experts(experts: dict[str, Any], tmp_path: Path) -> None:
    path = merged_bank("qwen2_moe", experts, tmp_path).backbone.path
    reference, prompt = written_out(tmp_path, loaded(path)), make_prompt(17, seed=4)
    modules = {name: make_module(reference, name, seed=k) for k, name in enumerate("ab")}
    blend = {"a": 0.75, "b": 0.5}
    wanted = reference_tokens(reference, modules, Blend(blend), prompt, 12)
    assert wanted != reference_tokens(reference, {}, Blend({}), prompt, 12)
    with TorchEngine.load(path, device="cpu", dtype="float32") as engine:
        digests = {name: engine.load_module(module) for name, module in modules.items()}
        asked = Blend({digests[name]: weight for name, weight in blend.items()})
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        events = engine.submit(GenerationRequest(prompt, asked, sampling))
        assert [event.token_id for event in events if event.token_id is not None] == wanted


def test_a_merge_of_models_refuses_a_sparse_one(tmp_path: Path) -> None:
    path = merged_bank("mixtral", GROUPED, tmp_path).backbone.path
    with pytest.raises(BackboneError, match="is a sparse mixture of experts, stored one by one"):
        Base.open(path)


def test_experts_of_one_group_are_computed_once_for_a_token(tmp_path: Path) -> None:
    experts = {"method": "random", "keep": 1, "router": "exact"}
    model = loaded(merged_bank("mixtral", experts, tmp_path).backbone.path)
    merged: Any = model.model.layers[0].mlp.experts
    x, gates = torch.randn(7, 32), torch.full((7, 2), 0.5)
    rows: list[int] = []
    merged.act_fn.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    choice = torch.tensor([[0, 3]] * 7)
    found = merged(x, choice, gates)
    assert rows == [7]
    assert torch.allclose(found, merged(x, choice[:, :1], gates[:, :1] * 2), atol=1e-6)


@pytest.mark.parametrize(("name", "norm"), NORMALISING)
def test_groups_are_chosen_by_the_summed_probabilities_of_their_members(
    name: str, norm: dict[str, bool], tmp_path: Path
) -> None:
    experts = {"method": "random", "keep": 3, "router": "groups"}
    path = merged_bank(name, experts, tmp_path, **norm).backbone.path
    model = loaded(path).requires_grad_(False)
    block: Any = model.model.layers[0].mlp
    original: Any = loaded(tmp_path / "moe").requires_grad_(False).model.layers[0].mlp.gate
    x = torch.randn(40, 32)
    _, gates, chosen = block.gate(x)
    logits = original(x)[0]
    summed = torch.zeros(40, 3).index_add_(1, block.gate.groups, logits.softmax(1))
    expected, groups = summed.topk(2)
    if norm.get("norm_topk_prob", True):
        expected = expected / expected.sum(1, keepdim=True)
    assert torch.equal(chosen, groups)
    assert torch.allclose(gates, expected, atol=1e-6)
    dense = torch.zeros(40, 3).scatter_(1, groups, expected)
    found = block.experts(x, chosen, gates)
    act = block.experts.act_fn
    outputs = []
    for group in range(3):
        gate, up = (x @ block.experts.gate_up[group].T).chunk(2, 1)
        outputs.append((act(gate) * up) @ block.experts.down[group].T)
    slow = torch.einsum("gtd,tg->td", torch.stack(outputs), dense)
    assert torch.allclose(found, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))


def test_stock_transformers_load_the_plain_part(tmp_path: Path) -> None:
    path = merged_bank("mixtral", GROUPED, tmp_path).backbone.path
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.num_local_experts == 2
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 2


def test_what_reads_the_plain_part_alone_is_not_served_less(tmp_path: Path) -> None:
    whole = merged_bank("mixtral", GROUPED, tmp_path / "a").backbone.path
    with pytest.raises(UnsupportedModelError, match="serve it with --engine torch, or build it"):
        check_plain(whole)
    compact = {"method": "m-smoe", "keep": 2}
    check_plain(merged_bank("mixtral", compact, tmp_path / "b").backbone.path)
    check_plain(tmp_path / "b" / "moe")


def test_gradients_reach_centres_and_residuals(tmp_path: Path) -> None:
    model = loaded(merged_bank("mixtral", GROUPED, tmp_path).backbone.path).train()
    model(input_ids=torch.tensor([make_prompt(60, seed=2)])).logits.square().mean().backward()
    merged: Any = model.model.layers[2].mlp.experts
    beside = merged.residuals
    for parameter in (merged.gate_up, merged.down, beside.gate_up.b, beside.down.a):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def changed(path: Path, change: Any) -> None:
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS)


FIRST = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.groups"), "is damaged at 'model.layers.0.mlp'"),
        (lambda t: t[f"{FIRST}.groups"].fill_(7), "group 7 of 2"),
        (lambda t: t[f"{FIRST}.groups"].fill_(-1), "is damaged at"),
        (lambda t: t.update({f"{FIRST}.groups": torch.tensor(0)}), "is damaged at"),
        (lambda t: t.update({f"{FIRST}.groups": torch.zeros(4, 1)}), "is damaged at"),
        (lambda t: t.update({f"{FIRST}.extra_down": torch.zeros(1, 32, 24)}), "is damaged at"),
        (lambda t: t[f"{FIRST}.router"].fill_(float("nan")), "NaN or inf"),
        (lambda t: t.update({f"{FIRST}.router": torch.zeros(4, 31)}), "has router of"),
        (lambda t: t.update({f"{FIRST}.router": torch.zeros(5, 32)}), "is damaged at"),
        (lambda t: t.update({f"{FIRST}.down.left": torch.zeros(30, 12)}), "has down of"),
        (lambda t: t.pop(f"{FIRST}.down.right"), "is damaged at"),
        (lambda t: [t.pop(n) for n in list(t) if f"{FIRST}.down." in n], "the other has none"),
    ],
)
def test_what_lies_beside_the_plain_part_is_checked(
    change: Any, message: str, tmp_path: Path
) -> None:
    path = copy.copy(merged_bank("mixtral", GROUPED, tmp_path).backbone.path)
    changed(path, change)
    with pytest.raises(CheckpointError, match=message):
        loaded(path)


def test_a_report_that_is_damaged_or_alone_is_refused(tmp_path: Path) -> None:
    path = merged_bank("mixtral", GROUPED, tmp_path).backbone.path
    (path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"experts\.safetensors is missing"):
        loaded(path)
    report = json.loads((path / REPORT).read_text())
    (path / REPORT).write_text(json.dumps({**report, "version": 2}))
    with pytest.raises(CheckpointError, match=r"experts\.json is damaged"):
        loaded(path)
