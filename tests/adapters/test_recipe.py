"""Recipes: what is read, what is refused, and that a refusal names key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.adapters.checkpoint import MODEL_DTYPES
from mergeroute.adapters.errors import BackboneError, RecipeError
from mergeroute.adapters.experts import Base
from mergeroute.adapters.merging.methods import find_method
from mergeroute.adapters.recipe import (
    DEFAULT_RANK,
    FITTED_SCORERS,
    TOKEN_SCORERS,
    Recipe,
    RouterSection,
    parse_size,
)
from mergeroute.adapters.recipe_file import read_recipe
from mergeroute.routers.settings import DEFAULT_POLICY, SignalSettings
from mergeroute.routers.token_routing import METHODS
from mergeroute.routers.training import SCORERS

EXPERTS: list[dict[str, Any]] = [
    {"name": "a", "path": "./a"},
    {"name": "b", "path": "owner/b", "weight": 0.5},
]
MINIMAL: dict[str, Any] = {"base": "./base", "experts": EXPERTS}
FULL = """
name: zoo-twin
base: ./base
experts:
  - {name: roman, path: ./full/roman, weight: 1.0, description: "Roman", samples: ["Write 14."]}
  - {name: date, path: owner/date}
backbone: {method: ties, scale: 0.3, density: 0.4, lines: {alpha: 0.2, beta: 0.8}}
shared: folded
modules: {method: svd, bytes: 2MB, dtype: int8, allocation: energy, fit: outputs, scale: 1.1}
kinds: {embedding: svd, head: drop, norm: exact, bias: exact}
router:
  scorer: prototype
  signal: {layer: 2, pooling: mean}
  policy: "softmax(0.5) | abstain(0.005) | quantise"
  data: prompts.jsonl
  none: generic.jsonl
calibration: ./calibration.jsonl
seed: 3
dtype: bfloat16
"""


def write(folder: Path, document: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def refuse(folder: Path, changes: dict[str, Any] | str, *texts: str) -> None:
    document = changes if isinstance(changes, str) else {**MINIMAL, **changes}
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(folder, document))
    for text in ("recipe.yaml", *texts):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value) or isinstance(changes, str)


def test_every_key_of_the_documentation_is_read(tmp_path: Path) -> None:
    for name in ("base", "full/roman"):
        (tmp_path / name).mkdir(parents=True)
    recipe = read_recipe(write(tmp_path, FULL))
    assert recipe.name == "zoo-twin"
    assert recipe.base == str(tmp_path / "base")
    assert recipe.experts[0].path == str(tmp_path / "full" / "roman")
    assert recipe.experts[0].samples == ("Write 14.",)
    assert recipe.experts[1].path == "owner/date"
    assert recipe.backbone.parameters == {"density": 0.4, "normalize": True, "scale": 0.3}
    assert recipe.backbone.lines is not None
    assert recipe.backbone.lines.beta == 0.8
    assert recipe.modules.bytes == 2_000_000
    assert recipe.modules.fixed_rank is None
    assert recipe.kinds.head == "drop"
    assert recipe.router is not None
    assert recipe.router.data == str(tmp_path / "prompts.jsonl")
    assert recipe.router.none == str(tmp_path / "generic.jsonl")
    assert recipe.calibration == str(tmp_path / "calibration.jsonl")
    assert recipe.dtype == "bfloat16"
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_none=True)) == recipe


def test_the_defaults_are_those_that_won(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, MINIMAL))
    assert (recipe.backbone.method, recipe.backbone.parameters) == (
        "task_arithmetic",
        {"scale": 0.3},
    )
    assert (recipe.modules.method, recipe.modules.fixed_rank) == ("svd", DEFAULT_RANK)
    assert (recipe.shared, recipe.seed, recipe.dtype, recipe.router) == ("folded", 0, None, None)
    assert {recipe.kinds.embedding, recipe.kinds.head, recipe.kinds.norm, recipe.kinds.bias} == {
        "shared"
    }


def test_every_dtype_name_is_a_dtype() -> None:
    for name, dtype in MODEL_DTYPES.items():
        assert Recipe.model_validate({**MINIMAL, "dtype": name}).dtype == name
        assert dtype == getattr(torch, name)


def test_paths_are_relative_to_the_file_unless_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "owner" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe(write(tmp_path / "there", MINIMAL))
    assert recipe.base == str(tmp_path / "there" / "base")
    assert recipe.experts[1].path == str(tmp_path / "there" / "owner" / "b")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_recipe(write(tmp_path, {**MINIMAL, "base": "~/x"})).base == str(tmp_path / "x")


# Refusals.


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"modle": 1}, ("modle is unknown", "allowed there: name, base, experts")),
        ({"modules": {"rnak": 3}}, ("modules.rnak is unknown", "method, rank, energy, bytes")),
        ({"kinds": {"emb": "svd"}}, ("kinds.emb is unknown", "embedding, head, norm, bias")),
        (
            {"router": {"data": "x", "signal": {"layr": 2}}},
            ("router.signal.layr is unknown", "layer, pooling"),
        ),
        ({"router": {"dta": "x"}}, ("router.dta is unknown", "scorer, signal, policy")),
        (
            {"experts": [{**EXPERTS[0], "wieght": 1}]},
            ("experts.0.wieght is unknown", "name, path, weight, description, samples"),
        ),
        (
            {"backbone": {"method": "ties", "densty": 0.2}},
            ("backbone", "densty is no parameter of method ties", "density, normalize, scale"),
        ),
        ({"backbone": {"method": "none", "scale": 1}}, ("scale is no parameter", "none")),
        (
            {"backbone": {"lines": {"alhpa": 1, "beta": 1}}},
            ("backbone.lines.alhpa is unknown", "alpha, beta"),
        ),
    ],
)
def test_an_unknown_key_is_named_with_what_is_allowed_there(
    changes: dict[str, Any], texts: tuple[str, ...], tmp_path: Path
) -> None:
    refuse(tmp_path, changes, *texts)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"backbone": {"method": "tie"}}, ("backbone", "'tie' is unknown", "known are", "ties")),
        (
            {"backbone": {"method": "ties", "density": 1.5}},
            ("backbone", "ties", "density", "less than or equal to 1", "1.5"),
        ),
        ({"backbone": {"method": "ties", "density": 0}}, ("density", "greater than 0")),
        ({"backbone": {"method": "ties", "scale": float("nan")}}, ("scale", "finite")),
        ({"backbone": {"method": "ties", "density": "lots"}}, ("density", "number", "lots")),
        ({"backbone": {"method": "lego"}}, ("lego", "rank")),
        ({"backbone": {"method": "knots", "density": 0}}, ("density",)),
        ({"backbone": {"method": "mwa"}}, ("mwa", "losses")),
        ({"backbone": {"lines": {"alpha": 1}}}, ("backbone.lines.beta is missing",)),
        ({"modules": {"rank": 0}}, ("modules.rank", "greater than or equal to 1", "it is 0")),
        ({"modules": {"rank": 1.5}}, ("modules.rank", "integer", "1.5")),
        ({"modules": {"energy": 1.1}}, ("modules.energy", "less than or equal to 1")),
        ({"modules": {"bytes": "2 stones"}}, ("modules.bytes", "'2 stones' is no size", "2MB")),
        ({"modules": {"bytes": "0.1B"}}, ("modules.bytes", "no size")),
        ({"modules": {"dtype": "int4"}}, ("modules.dtype", "float32", "int8", "int4")),
        ({"modules": {"method": "svdd"}}, ("modules.method", "'svd'", "svdd")),
        ({"modules": {"density": 0}}, ("modules.density", "greater than 0")),
        ({"modules": {"scale": 0}}, ("modules.scale", "greater than 0")),
        ({"kinds": {"norm": "svd"}}, ("kinds.norm", "'exact'", "svd")),
        ({"shared": "beside"}, ("shared", "'folded'", "beside")),
        ({"seed": -1}, ("seed", "greater than or equal to 0")),
        ({"dtype": "float64"}, ("dtype", "bfloat16", "float64")),
        ({"experts": []}, ("experts is empty", "list at least one")),
        ({"experts": "a, b"}, ("experts", "tuple")),
        ({"experts": [{"name": "a"}]}, ("experts.0.path is missing",)),
        ({"experts": [{"name": "a b", "path": "x"}]}, ("experts.0.name", "'a b' is not allowed")),
        ({"experts": [{"name": "base", "path": "x"}]}, ("experts.0.name", "reserved")),
        ({"experts": [{**EXPERTS[0], "weight": float("inf")}]}, ("experts.0.weight", "finite")),
        ({"experts": [{**EXPERTS[0], "samples": "x"}]}, ("experts.0.samples",)),
        ({"base": 7}, ("base", "string", "7")),
        ({"base": ""}, ("base", "at least 1 character")),
        ({"name": "auto"}, ("name", "reserved")),
        ({"modules": None}, ("modules",)),
        ({"modules": {"rank": True}}, ("modules.rank", "true or false", "yes, no")),
        ({"seed": False}, ("seed", "true or false")),
        ({"experts": [{**EXPERTS[0], "weight": True}]}, ("experts.0.weight", "true or false")),
        ({"backbone": {"method": "ties", "density": True}}, ("density is True", "number")),
        ({"backbone": {"method": "lego", "rank": True}}, ("rank is True",)),
        ({"backbone": {"method": "ties", "normalize": 3}}, ("normalize", "boolean")),
        ({"router": {"scorer": "prototype"}}, ("router", "prototype needs data")),
        ({"router": {"scorer": "fixed"}}, ("router", "fixed needs blend")),
        ({"router": {"scorer": "mlp"}}, ("router", "scorer mlp needs data")),
        ({"router": {"scorer": "oracle"}}, ("router.scorer", "'phatgoose'")),
        ({"router": {"data": "x", "signal": {"layer": 0}}}, ("router.signal", "layer is 0")),
        ({"router": {"data": "x", "signal": {"layer": [1, -2]}}}, ("router.signal", "layer is -2")),
        ({"router": {"data": "x", "signal": {"pooling": "max"}}}, ("router.signal.pooling", "max")),
        ({"router": {"data": "x", "signal": {"window": 1}}}, ("router.signal.window", "it is 1")),
        ({"router": {"data": "x", "signal": {"ngrams": -1}}}, ("router.signal.ngrams", "it is -1")),
        ({"router": {"data": "x", "signal": {"recency": 1}}}, ("router.signal.recency", "it is 1")),
        (
            {"router": {"data": "x", "signal": {"layer": [], "ngrams": 0}}},
            ("router.signal", "reads nothing"),
        ),
        (
            {"backbone": {"lines": {"alpha": float("nan"), "beta": 1}}},
            ("backbone.lines.alpha", "finite"),
        ),
        ({"backbone": {"lines": {"beta": float("inf")}}}, ("backbone.lines.beta", "finite")),
    ],
)
def test_a_value_out_of_range_is_named(
    changes: dict[str, Any], texts: tuple[str, ...], tmp_path: Path
) -> None:
    refuse(tmp_path, changes, *texts)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    refuse(tmp_path, "experts: [{name: a, path: x}]", "base is missing")
    refuse(tmp_path, "base: x", "experts is missing")


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"modules": {"rank": 4, "energy": 0.9}}, ("modules", "rank and energy", "one of them")),
        ({"modules": {"rank": 4, "bytes": 99}}, ("modules", "rank and bytes")),
        ({"modules": {"energy": 0.9, "bytes": 99}}, ("modules", "energy and bytes")),
        ({"modules": {"method": "none", "rank": 4}}, ("modules", "rank means nothing", "none")),
        ({"modules": {"method": "lego", "energy": 0.5}}, ("modules", "lego needs rank")),
        (
            {"modules": {"method": "bitdelta"}},
            ("modules", "bitdelta", "give rank, energy or bytes"),
        ),
        ({"modules": {"allocation": "energy", "rank": 4}}, ("modules", "give bytes")),
        ({"modules": {"rank": 4, "density": 0.5}}, ("modules", "density means nothing", "svd")),
        ({"modules": {"method": "none", "scale": 2}}, ("modules", "scale means nothing")),
        (
            {"modules": {"method": "none", "fit": "outputs"}, "calibration": "x"},
            ("modules", "fit outputs means nothing"),
        ),
        ({"modules": {"fit": "outputs"}}, ("fit: outputs", "looks at data: give calibration")),
        ({"backbone": {"method": "fisher"}}, ("fisher looks at data: give calibration",)),
        ({"backbone": {"method": "regmean"}}, ("regmean looks at data",)),
        ({"experts": [EXPERTS[0], EXPERTS[0]]}, ("two experts are called 'a'", "its own")),
        ({"name": "a"}, ("both called 'a'", "set another name")),
        (
            {"router": {"scorer": "fixed", "blend": "a=1", "data": "x"}},
            ("router", "data means nothing to scorer fixed", "remove it"),
        ),
        ({"router": {"scorer": "fixed", "blend": "a=1", "none": "x"}}, ("none means nothing",)),
        (
            {"router": {"scorer": "fixed", "blend": "a=1", "signal": {"layer": 2}}},
            ("signal means nothing",),
        ),
        (
            {"router": {"scorer": "fixed", "blend": "a=1", "policy": "top_k(1)"}},
            ("policy means nothing",),
        ),
        ({"router": {"data": "x", "settings": {"top_k": 1}}}, ("settings means nothing",)),
        ({"router": {"scorer": "arrow", "data": "x"}}, ("data means nothing to scorer arrow",)),
        (
            {"router": {"data": "x", "blend": "a=1"}},
            ("blend means nothing to scorer prototype", "remove it"),
        ),
        (
            {"backbone": {"method": "none", "lines": {"beta": 1}}},
            ("backbone", "lines", "method none", "remove it"),
        ),
        (
            {"backbone": {"method": "mwa", "losses": [1, 2, 3]}},
            ("backbone", "3 losses for 2 experts", "one for each"),
        ),
        (
            {"backbone": {"method": "layer_swap", "outer": "a", "inner": "x"}},
            ("backbone: layer_swap: 'x' is no expert", "inner", "a, b"),
        ),
        ({"backbone": {"method": "layer_swap", "outer": "x", "inner": "a"}}, ("outer", "'x'")),
        (
            {"backbone": {"method": "della", "density": 0.1, "epsilon": 0.2}},
            ("backbone", "density 0.1 with epsilon 0.2", "-0.1 to 0.3", "smaller epsilon"),
        ),
        (
            {"backbone": {"method": "della_linear", "density": 0.9, "epsilon": 0.2}},
            ("0.7 to 1.1",),
        ),
        ({"shared": "none"}, ("shared none keeps the base", "method: none")),
        (
            {"experts": [{**entry, "weight": 0} for entry in EXPERTS]},
            ("the weights of all experts are 0",),
        ),
        (
            {
                "experts": [
                    {**entry, "weight": weight}
                    for entry, weight in zip(EXPERTS, (1, -1), strict=True)
                ],
                "backbone": {"method": "linear"},
            },
            ("add up to 0", "normalize: false"),
        ),
        ({"backbone": {"method": "ties", "scale": 0}}, ("scale is 0", "method: none")),
        (
            {
                "experts": [EXPERTS[0], {**EXPERTS[1], "weight": -1}],
                "backbone": {"method": "regmean"},
                "calibration": "x",
            },
            ("expert 'b' has weight -1", "regmean takes none below 0"),
        ),
        (
            {"modules": {"method": "lora"}},
            ("keeps factors that stand on the base", "{method: none}"),
        ),
        ({"modules": {"method": "emr", "rank": 4}}, ("masks a merged change", "{method: emr}")),
        (
            {
                "modules": {"method": "tall", "rank": 4},
                "backbone": {"method": "task_arithmetic"},
                "shared": "module",
            },
            ("masks a merged change", "shared: folded"),
        ),
        (
            {"modules": {"method": "tall", "rank": 4}, "experts": EXPERTS[:1]},
            ("tall", "plain sum", "scale"),
        ),
        (
            {
                "modules": {"method": "tall", "rank": 4},
                "backbone": {"method": "task_arithmetic"},
            },
            ("tall", "plain sum", "weights"),
        ),
        (
            {"backbone": {"method": "regmean_plus_plus", "lines": {"beta": 1}}, "calibration": "x"},
            ("once and in order", "state alpha"),
        ),
        (
            {
                "backbone": {"method": "regmean_plus_plus"},
                "shared": "module",
                "calibration": "x",
            },
            ("once and in order", "shared: folded"),
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], texts: tuple[str, ...], tmp_path: Path
) -> None:
    refuse(tmp_path, changes, *texts)


@pytest.mark.parametrize(
    "backbone",
    [
        {"method": "mwa", "losses": [1, 2]},
        {"method": "layer_swap", "outer": "b", "inner": "a"},
        {"method": "della", "density": 0.5, "epsilon": 0.2},
        {"method": "della", "density": 1.0, "epsilon": 0.2},
    ],
)
def test_parameters_that_fit_the_experts_are_read(backbone: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, {**MINIMAL, "backbone": backbone}))
    assert recipe.backbone.method == backbone["method"]


@pytest.mark.parametrize(
    "router",
    [
        {"scorer": "fixed", "blend": "a=1"},
        {"data": "x.jsonl"},
        {"scorer": "mlp", "data": "x.jsonl", "signal": {"layer": [1, 2], "recency": 0.5}},
        {"scorer": "spectr", "settings": {"top_k": 2, "none": 0.5}},
    ],
)
def test_a_written_router_is_read_again(router: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, {**MINIMAL, "router": router}))
    document = recipe.model_dump(mode="json", exclude_none=True)
    assert Recipe.model_validate(document) == recipe
    again = read_recipe(write(tmp_path, recipe.model_dump(mode="json")))
    assert again == recipe


def test_a_router_says_by_default_what_a_fitted_one_does() -> None:
    section = RouterSection(data="x")
    assert section.signal.model_dump() == SignalSettings().model_dump()
    assert section.policy == DEFAULT_POLICY
    assert set(FITTED_SCORERS) == set(SCORERS)
    assert set(TOKEN_SCORERS) == set(METHODS)


def test_an_embedding_is_a_folder_beside_the_file_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    for said, expected in (("./minilm", str(tmp_path / "minilm")), ("owner/model", "owner/model")):
        router = {"data": "x", "signal": {"embedding": said}}
        recipe = read_recipe(write(tmp_path, {**MINIMAL, "router": router}))
        assert recipe.router is not None
        assert recipe.router.signal.embedding == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "cannot be read as YAML"),
        ("base: x\n\tname: y", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("base: " + "[" * 3000 + "]" * 3000, "cannot be read as YAML"),
        ("", "no mapping of keys"),
        ("- a\n- b", "no mapping of keys"),
        ("just words", "no mapping of keys"),
        ("3: x\nbase: y", "3 is unknown; allowed there: name"),
        ("bse: y", "bse is unknown; allowed there: name, base"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    refuse(tmp_path, text, message)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml does not exist"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"x\.yaml cannot be read"):
        read_recipe(tmp_path / "x.yaml")


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(1, 10**6),
    unit=st.sampled_from([("", 1), ("B", 1), ("kB", 10**3), (" MB", 10**6), ("GB ", 10**9)]),
)
def test_sizes_are_numbers_with_decimal_units(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]
    assert parse_size(number) == number


def test_sizes_may_be_broken() -> None:
    assert parse_size("1.5MB") == 1_500_000
    for text in ("", "MB", "-1MB", "0", "1TB", "2MiB", "1e6", None, True):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML takes the last of them without a word."""
    file = tmp_path / "recipe.yaml"
    file.write_text("base: a\nmodules: {rank: 4}\nmodules: {rank: 8}\n")
    with pytest.raises(RecipeError, match="line 1 holds 'modules' twice"):
        read_recipe(file)


def test_nothing_is_looked_for_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "recipe.yaml"
    text = "base: zoo/base\nexperts: [{name: a, path: zoo}]\nmodules: {method: none}\n"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(file)
    assert recipe.base == "zoo/base"  # a hub id
    assert recipe.experts[0].path == str(tmp_path / "elsewhere" / "zoo")
    with pytest.raises(BackboneError, match="could not be fetched from the hub"):
        Base.open(recipe.base)


def test_a_folder_and_tabs_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder: name the recipe in it"):
        read_recipe(tmp_path)
    (tmp_path / "tabs.yaml").write_text("base:\n\ta: 1\n")
    with pytest.raises(RecipeError, match="use spaces"):
        read_recipe(tmp_path / "tabs.yaml")
    (tmp_path / "kind.yaml").write_text("base: a\nexperts: [b]\nbackbone: ties\n")
    with pytest.raises(RecipeError, match=r"experts\.0 is 'b', keys are needed"):
        read_recipe(tmp_path / "kind.yaml")


def test_a_method_that_is_misspelt_is_guessed() -> None:
    with pytest.raises(RecipeError, match="did you mean ties"):
        find_method("tie")
