"""mergekit's own files, built by both: the same weights come out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from mergeroute.adapters.build import build
from mergeroute.adapters.recipe_file import read_recipe

from ..experts import make_zoo
from ..tiny import make_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the oracles' own imports
]

CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {},
    "dare_ties": {},
    "dare_linear": {},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05},
    "sce": {},
}
"""Parameters by method; the rest are mergekit's defaults. At density 1 nothing is random."""


@pytest.mark.parametrize("method", CASES)
def test_a_file_means_what_it_means_there(method: str, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model())
    weights = {"a": 0.7, "b": 0.4} | ({"base": 0.5} if method == "linear" else {})
    models: list[dict[str, Any]] = [{"model": str(zoo.folder / name)} for name in weights]
    for model, weight in zip(models, weights.values(), strict=True):
        model["parameters"] = {"weight": weight}
    document = {
        "merge_method": method,
        "base_model": str(zoo.folder / "base"),
        "models": models,
        "parameters": CASES[method],
        "dtype": "float32",
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(tmp_path / "out")]
    subprocess.run([*command, "--quiet"], check=True, capture_output=True, timeout=200)
    wanted = {
        name: tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    found = load_file(
        build(read_recipe(path), tmp_path / "bank").backbone.path / "model.safetensors"
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-6, name
