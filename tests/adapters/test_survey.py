"""What a survey tells of real tiny checkpoints and LoRAs, against whole models in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import CheckpointError
from mergeroute.adapters.experts import Base, Expert, open_expert
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.lora import Module
from mergeroute.adapters.survey import Survey, survey_experts, survey_modules, surveyed_names
from mergeroute.runtime.merging import merge_into

from ..tiny import make_model, make_module, make_rich_module


def write_expert(folder: Path, architecture: str, *, seed: int) -> dict[str, Tensor]:
    """A full fine-tune of everything but the first norm; its parameters."""
    model = make_model(architecture)
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, _ in model.named_parameters()]
    unchanged = next(n for n in names if "norm" in n or "ln_" in n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != unchanged:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return parameters_of(model)


def write_lora(folder: Path, architecture: str, *, seed: int) -> dict[str, Tensor]:
    """A LoRA over all but the first linear layer; the parameters of the merged model."""
    model = make_model(architecture)
    module = make_module(model, folder.name, seed=seed)
    module.save(folder)
    merge_into(model, {"m": module}, Blend({"m": 1.0}))
    return parameters_of(model)


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


@dataclass(frozen=True)
class Zoo:
    """A base with experts, and the dense deltas of each by parameter."""

    base: Base
    experts: list[Expert]
    deltas: list[dict[str, Tensor]]

    def linear(self, name: str) -> bool:
        return self.base.parameters[name].kind is Kind.LINEAR

    def whole(self, expert: int) -> Tensor:
        """All linear layers' deltas of an expert as one vector."""
        return torch.cat([d.flatten() for n, d in self.deltas[expert].items() if self.linear(n)])


def make_zoo(folder: Path, architecture: str, kinds: str) -> Zoo:
    """kinds: f for a full expert, l for a LoRA."""
    model = make_model(architecture)
    model.save_pretrained(folder / "base")
    before = parameters_of(model)
    base = Base.open(folder / "base")
    experts, deltas = [], []
    for k, kind in enumerate(kinds):
        write = write_expert if kind == "f" else write_lora
        after = write(folder / f"e{k}", architecture, seed=k + 1)
        deltas.append({name: after[name] - before[name] for name in before})
        experts.append(open_expert(f"e{k}", folder / f"e{k}", base))
    return Zoo(base, experts, deltas)


@pytest.fixture(scope="module", params=["llama fll", "gpt2 fl", "qwen2 ll", "llama ff"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    architecture, kinds = request.param.split()
    return make_zoo(tmp_path_factory.mktemp("zoo"), architecture, kinds)


@pytest.fixture(scope="module")
def survey(zoo: Zoo) -> Survey:
    return survey_experts(zoo.base, zoo.experts)


def test_cosines_over_all_linear_layers_are_the_dense_ones(zoo: Zoo, survey: Survey) -> None:
    for i in range(len(zoo.experts)):
        for j in range(len(zoo.experts)):
            expected = torch.cosine_similarity(zoo.whole(i), zoo.whole(j), dim=0)
            assert_close(survey.cosine()[i, j], expected, rtol=1e-4, atol=1e-5)


def test_inner_products_by_parameter_are_the_dense_ones(zoo: Zoo, survey: Survey) -> None:
    assert {p.name for p in survey.parameters} == zoo.deltas[0].keys()
    for parameter in survey.parameters:
        dense = torch.stack([own[parameter.name].flatten() for own in zoo.deltas])
        assert_close(parameter.inner, dense @ dense.T, rtol=1e-3, atol=1e-5)


def test_spectra_are_those_of_the_dense_deltas(zoo: Zoo, survey: Survey) -> None:
    for parameter in survey.parameters:
        assert zoo.linear(parameter.name) or not parameter.spectra
        for name, found in parameter.spectra.items():
            dense = zoo.deltas[survey.names.index(name)][parameter.name]
            expected = torch.linalg.svdvals(dense)[: len(found.values)]
            assert_close(found.values.double(), expected, rtol=1e-3, atol=1e-5)


def test_changed_parameters_and_relative_norms_by_kind(zoo: Zoo, survey: Survey) -> None:
    before = parameters_of(make_model(zoo.base.config["model_type"]))  # type: ignore[arg-type]
    for name, deltas in zip(survey.names, zoo.deltas, strict=True):
        assert set(survey.changed(name)) == {n for n, d in deltas.items() if d.any()}
        assert len(survey.changed(name)) < len(deltas)
        for kind, norm in survey.relative_norms(name).items():
            own = [n for n in deltas if zoo.base.parameters[n].kind is kind]
            change = sum(float(deltas[n].square().sum()) for n in own) ** 0.5
            base = sum(float(before[n].square().sum()) for n in own) ** 0.5
            assert norm == (pytest.approx(change / base, rel=1e-4) if base else None)


def test_shapes_are_out_times_in_also_where_stored_transposed(zoo: Zoo, survey: Survey) -> None:
    for parameter in survey.linear:
        layer = zoo.base.parameters[parameter.name].layer
        assert parameter.shape == zoo.base.shapes.linear[layer]


def test_every_parameter_is_reported_once_and_block_after_block(zoo: Zoo) -> None:
    calls = []
    found = survey_experts(zoo.base, zoo.experts, on_parameter=lambda: calls.append(1))
    names = [p.name for p in found.parameters]
    assert names == surveyed_names(zoo.base)
    assert len(calls) == len(names) == len(set(names))
    depths = [zoo.base.parameters[name].depth or 0.0 for name in names]
    assert depths == sorted(depths)


def test_modules_are_compared_on_the_layers_named() -> None:
    model = make_model()
    modules = [make_rich_module(model, "a", seed=1), make_module(model, "b", seed=2)]
    layers = {n: d.shape for n, d in modules[1].deltas.items()}
    found = survey_modules(modules, [*layers, "model.layers.9.absent"])
    assert [p.name for p in found.parameters] == list(layers)
    one, other = (
        torch.cat([module.deltas[layer].dense().double().flatten() for layer in layers])
        for module in modules
    )
    expected = torch.cosine_similarity(one, other, dim=0)
    assert_close(found.cosine()[0, 1], expected, rtol=1e-5, atol=1e-7)


def test_an_expert_without_linear_changes_has_no_cosine() -> None:
    module = make_module(make_model(), "m")
    nothing = Module("none", {})
    found = survey_modules([module, nothing], module.deltas).cosine()
    assert found[0, 0] == 1
    assert found[0, 1].isnan()
    assert found[1, 1].isnan()


def test_nan_in_the_base_is_named(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path, "llama", "l")
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"base .* holds NaN or inf in 'model.norm.weight'"):
        survey_experts(Base.open(tmp_path / "base"), zoo.experts)
