"""Recipes whose `experts:` is a mapping: what may stand in them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.recipe_file import read_any_recipe, read_recipe
from mergeroute.adapters.smoe.recipe import MoeRecipe

SHARED = {"method": "shared", "residuals": {"rank": 4}}


def read(folder: Path, experts: object, **others: object) -> Recipe | MoeRecipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "./moe", "experts": experts, **others}))
    return read_any_recipe(path)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    recipe = read(tmp_path, {"method": "reap", "keep": 3}, calibration="prompts.jsonl", name="x")
    assert isinstance(recipe, MoeRecipe)
    assert recipe.base == str(tmp_path / "moe")
    assert recipe.calibration == str(tmp_path / "prompts.jsonl")
    assert recipe.experts.form == "compact"
    document = recipe.model_dump(mode="json", exclude_none=True)
    assert MoeRecipe.model_validate(document) == recipe


def test_defaults_follow_the_method(tmp_path: Path) -> None:
    recipe = read(tmp_path, SHARED)
    assert isinstance(recipe, MoeRecipe)
    settings = recipe.experts
    assert (settings.count, settings.form, settings.is_aligned) == (1, "exact", False)
    grouped = read(tmp_path, {"method": "m-smoe", "keep": 2}, calibration="p")
    assert isinstance(grouped, MoeRecipe)
    assert (grouped.experts.form, grouped.experts.is_aligned) == ("compact", True)


def test_a_recipe_of_models_is_no_recipe_of_experts(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, [{"name": "a", "path": "b"}]), Recipe)
    read(tmp_path, SHARED)
    with pytest.raises(RecipeError, match="experts is a mapping, which merges the experts of one"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("experts", "others", "message"),
    [
        ({"method": "m-smoe"}, {}, "method m-smoe needs keep"),
        ({"method": "shared", "keep": 2}, {}, "method shared keeps one expert and keep is 2"),
        ({"method": "m-smoe", "keep": 0}, {}, "greater than or equal to 1"),
        ({"method": "wild", "keep": 1}, {}, "experts.method"),
        ({"method": "m-smoe", "keep": 2}, {}, "method m-smoe looks at how prompts are routed"),
        ({"method": "random", "keep": 2}, {}, "router: compact looks at how prompts are routed"),
        (
            {"method": "shared", "residuals": {"rank": 2, "fit": "outputs"}},
            {},
            "residuals: {fit: outputs} looks at how prompts",
        ),
        ({**SHARED, "router": "compact"}, {}, "residuals are chosen by the experts' own router"),
        ({**SHARED, "router": "groups"}, {}, "residuals are chosen by the experts' own router"),
        (
            {"method": "m-smoe", "keep": 2, "allocation": "adaptive"},
            {"calibration": "p"},
            "allocation: adaptive leaves more experts in one layer than in another",
        ),
        (
            {"method": "hc-smoe", "keep": 2, "skip_layers": [0]},
            {"calibration": "p"},
            "skip_layers leaves more experts in one layer.*or use router: exact",
        ),
        (
            {"method": "reap", "keep": 2, "residuals": {"rank": 2}},
            {"calibration": "p"},
            "residuals means nothing to method reap",
        ),
        (
            {"method": "reap", "keep": 2, "align": "none"},
            {"calibration": "p"},
            "align means nothing to method reap",
        ),
        (
            {"method": "reap", "keep": 2, "router": "exact"},
            {"calibration": "p"},
            "method reap leaves experts out",
        ),
        (
            {"method": "random", "keep": 2, "router": "exact", "allocation": "adaptive"},
            {},
            "allocation adaptive means nothing to method random",
        ),
        ({"method": "shared", "residuals": {"rank": 0}}, {}, "experts.residuals.rank"),
        ({"method": "shared", "residuals": {"rank": 2, "rows": 1.5}}, {}, "experts.residuals.rows"),
        ({"method": "shared", "residuals": {"ranks": 2}}, {}, "allowed there: rank, dtype, rows"),
        ({"method": "shared", "topk": 2}, {}, "allowed there: method, keep"),
        (SHARED, {"modules": {"method": "svd"}}, "modules is unknown; allowed there: name, base"),
        (SHARED, {"backbone": {"method": "none"}}, "backbone is unknown"),
    ],
)
def test_what_means_nothing_is_refused(
    experts: Any, others: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, experts, **others)
