"""`mergeroute smoe upcycle` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.smoe.layout import MoeCheckpoint
from mergeroute.serving.cli import app

from ..experts import make_zoo
from ..tiny import make_model


def test_dense_experts_become_a_mixture(tmp_path: Path) -> None:
    make_zoo(tmp_path, make_model())
    lines = [{"task": name, "prompt": f"{name} {k}"} for name in "abc" for k in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    document = {
        "base": "base",
        "experts": [{"name": name, "path": name} for name in "abc"],
        "backbone": {"method": "linear"},
        "modules": {"method": "none"},
        "calibration": "prompts.jsonl",
    }
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "moe"
    arguments = ["smoe", "upcycle", str(recipe), "--out", str(out), "--top-k", "1"]
    recipe.write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    moe = MoeCheckpoint.open(out)
    assert (moe.top_k, moe.experts) == (1, 3)
    assert all(moe.router(layer).norm() > 0 for layer in moe.layers)
    del document["calibration"]
    recipe.write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(app, [*arguments, "--force"])
    assert isinstance(result.exception, RecipeError)
    assert "gates are fitted on prompts" in str(result.exception)
