"""mergekit's files: what is read means what it means there, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from mergeroute.adapters.build import build
from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.recipe_file import read_recipe

from ..experts import make_zoo
from ..tiny import make_model

BASE = {"model": "org/base"}
MODELS = [
    {"model": "org/one", "parameters": {"weight": 0.7}},
    {"model": "./two", "parameters": {"weight": 0.3}},
]


def read(folder: Path, **keys: Any) -> Recipe:
    document = {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [BASE, *MODELS],
        "dtype": "bfloat16",
        **keys,
    }
    path = folder / "ties.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return read_recipe(path)


def refuse(folder: Path, *texts: str, **keys: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        read(folder, **keys)
    for text in ("ties.yaml", *texts):
        assert text in str(caught.value)


def test_a_file_becomes_a_static_bank(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, parameters={"density": 0.4, "normalize": False, "lambda": 0.9, "int8_mask": True}
    )
    assert recipe.name == "ties"
    assert recipe.base == "org/base"
    assert [(e.name, e.path, e.weight) for e in recipe.experts] == [
        ("one", "org/one", 0.7),
        ("two", str(tmp_path / "two"), 0.3),
    ]
    assert recipe.backbone.method == "ties"
    assert recipe.backbone.parameters == {"density": 0.4, "normalize": False, "scale": 0.9}
    assert recipe.modules.method == "none"
    assert recipe.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"scale": 1.0}),
        ("ties", {"density": 1.0, "normalize": True, "scale": 1.0}),
        ("dare_linear", {"density": 1.0, "normalize": False, "scale": 1.0}),
        ("dare_ties", {"density": 1.0, "normalize": False, "scale": 1.0}),
        ("della", {"density": 1.0, "epsilon": 0.15, "normalize": True, "scale": 1.0}),
        ("della_linear", {"density": 1.0, "epsilon": 0.15, "normalize": False, "scale": 1.0}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.01, "normalize": False, "scale": 1.0}),
        ("breadcrumbs_ties", {"density": 1.0, "gamma": 0.01, "normalize": False, "scale": 1.0}),
        ("sce", {"select_topk": 1.0, "scale": 1.0}),
    ],
)
def test_what_a_file_leaves_out_has_mergekits_defaults(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    recipe = read(tmp_path, merge_method=method)
    assert recipe.backbone.method == method
    assert recipe.backbone.parameters == parameters


def test_linear_counts_the_base_as_a_model(tmp_path: Path) -> None:
    weighed = {**BASE, "parameters": {"weight": 1.0}}
    recipe = read(tmp_path, merge_method="linear", models=[weighed, *MODELS])
    assert [expert.weight for expert in recipe.experts] == pytest.approx([0.35, 0.15])
    assert recipe.backbone.parameters == {"normalize": False}
    alone = read(tmp_path, merge_method="linear", models=MODELS)
    assert [expert.weight for expert in alone.experts] == pytest.approx([0.7, 0.3])
    plain = {"normalize": False}
    assert read(tmp_path, merge_method="linear", models=MODELS, parameters=plain) == alone
    refuse(
        tmp_path,
        "add up to 2",
        merge_method="linear",
        models=[weighed, *MODELS],
        parameters={"normalize": False},
    )


def test_the_base_among_the_models_of_other_methods_adds_nothing(tmp_path: Path) -> None:
    with_base = read(tmp_path, models=[{**BASE, "parameters": {"weight": 5.0}}, *MODELS])
    assert with_base == read(tmp_path, models=MODELS)


def test_weights_do_not_count_in_sce(tmp_path: Path) -> None:
    recipe = read(tmp_path, merge_method="sce", parameters={"weight": 0.2})
    assert [expert.weight for expert in recipe.experts] == [1.0, 1.0]


def test_a_weight_for_all_counts_where_a_model_states_none(tmp_path: Path) -> None:
    recipe = read(tmp_path, models=[MODELS[0], {"model": "x"}], parameters={"weight": 0.2})
    assert [expert.weight for expert in recipe.experts] == [0.7, 0.2]


def test_a_parameter_may_stand_with_every_model_if_it_is_the_same(tmp_path: Path) -> None:
    models = [{"model": f"org/{n}", "parameters": {"density": 0.5}} for n in "ab"]
    assert read(tmp_path, models=models).backbone.parameters["density"] == 0.5
    models[1]["parameters"] = {"density": 0.6}
    refuse(tmp_path, "density differs between models", models=models)


def test_names_that_requests_could_not_use_are_changed(tmp_path: Path) -> None:
    paths = ["a/my model+v2", "b/auto", "c/x", "d/x", "e/ties"]
    recipe = read(tmp_path, models=[{"model": path} for path in paths], name="my file")
    assert recipe.name == "my-file"
    assert [e.name for e in recipe.experts] == ["my-model-v2", "expert1", "x", "x-3", "ties"]
    assert read(tmp_path, models=[{"model": "e/ties"}]).name == "ties"


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ({"slices": [{"sources": []}]}, ("'slices'", "no counterpart")),
        ({"tokenizer": {"source": "union"}}, ("'tokenizer'",)),
        ({3: 1, "slices": []}, ("no counterpart",)),
        ({"merge_method": "slerp"}, ("merge_method 'slerp' is not read", "known are linear")),
        ({"merge_method": ["ties"]}, ("merge_method ['ties'] is not read",)),
        ({"base_model": None}, ("base_model is missing",)),
        ({"models": None}, ("models is missing",)),
        ({"models": "all"}, ("models is missing",)),
        ({"models": ["org/one"]}, ("models holds 'org/one'",)),
        ({"models": [BASE]}, ("models holds the base alone",)),
        ({"models": [{"model": "x", "layers": 3}]}, ("'layers' of model 'x'",)),
        ({"models": [{"model": "x", "parameters": 3}]}, ("parameters is 3",)),
        ({"parameters": [1]}, ("parameters is [1]",)),
        ({"parameters": {"density": [0, 0.5, 1]}}, ("density is [0, 0.5, 1]", "gradients")),
        (
            {"models": [{"model": "x", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
            ("weight is", "gradients and filters are not read"),
        ),
        ({"parameters": {"rescale": True}}, ("'rescale' is not read", "density")),
        ({"parameters": {3: 1, "x": 1}}, ("is not read",)),
        ({"parameters": {"density": True}}, ("density is True",)),
        ({"parameters": {"density": 2.0}}, ("density", "less than or equal to 1")),
        ({"parameters": {"normalize": "perhaps"}}, ("normalize",)),
        ({"tokenizer_source": "union"}, ("tokenizer_source must be base",)),
        ({"dtype": "float64"}, ("dtype", "float64")),
    ],
)
def test_what_has_no_counterpart_is_refused(
    keys: dict[str, Any], texts: tuple[str, ...], tmp_path: Path
) -> None:
    document = {"merge_method": "ties", "base_model": "org/base", "models": MODELS, **keys}
    path = tmp_path / "ties.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    for text in ("ties.yaml", *texts):
        assert text in str(caught.value)


def test_a_linear_file_is_built_as_the_mean_of_its_models(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model())
    names = {"base": 2.0, "a": 1.0, "b": 1.0}
    recipe = read(
        tmp_path,
        merge_method="linear",
        base_model="./zoo/base",
        models=[{"model": f"./zoo/{n}", "parameters": {"weight": w}} for n, w in names.items()],
        dtype=None,
    )
    bank = build(recipe, tmp_path / "bank")
    assert not bank.modules
    found = load_file(bank.backbone.path / "model.safetensors")
    for name, before in zoo.base.items():
        wanted = (2 * before + zoo.experts["a"][name] + zoo.experts["b"][name]) / 4
        assert (found[name] - wanted).abs().max() < 1e-5
