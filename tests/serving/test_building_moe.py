"""`mergeroute build`, `inspect` and `eval` of a sparse model with merged experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.errors import BankError, DataError, RecipeError
from mergeroute.adapters.smoe.stored import read_report
from mergeroute.routers.data import read_examples
from mergeroute.runtime.expert_usage import UsageOptions, expert_usage
from mergeroute.runtime.loading import load_model, load_tokenizer
from mergeroute.runtime.rendering import render
from mergeroute.serving.cli import app
from mergeroute.serving.inspect_tables import MOST_EXPERTS, tables
from mergeroute.serving.inspection import inspect_path

from ..moe import EXPERTS, make_moe, save_moe

CPU = torch.device("cpu")
RESIDUALS = {"method": "m-smoe", "keep": 2, "residuals": {"rank": 3, "fit": "outputs"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `moe` and prompts in `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("sparse")
    save_moe(make_moe(), folder / "moe")
    lines = [
        {"task": task, "prompt": f"{task} {11 * k}", "answer": str(k)}
        for task in ("count", "shout")
        for k in range(3)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def write_recipe(folder: Path, experts: object, **others: object) -> Path:
    path = folder / "recipe.yaml"
    document = {"name": "few", "base": "./moe", "experts": experts, "calibration": "prompts.jsonl"}
    path.write_text(yaml.safe_dump({**document, **others}))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def build(folder: Path, experts: object, **others: object) -> Any:
    recipe = write_recipe(folder, experts, **others)
    return run("build", recipe, "--out", folder / "bank", "--device", "cpu", "--force")


def test_a_recipe_becomes_a_bank_and_its_table_says_what_is_left(folder: Path) -> None:
    done = build(folder, RESIDUALS)
    assert done.exit_code == 0, done.exception
    assert "experts by m-smoe, exact router" in done.stdout
    assert f"2 of {EXPERTS}" in done.stdout
    bank = Bank.open(folder / "bank")
    report = read_report(bank.backbone.path)
    assert report is not None
    assert not bank.modules
    assert bank.recipe is not None
    assert bank.recipe["experts"]["keep"] == 2
    prompts = read_examples(folder / "prompts.jsonl")
    tokenizer = load_tokenizer(folder / "moe")
    model = load_model(folder / "moe", device=CPU, dtype=torch.float32)
    usage = expert_usage(model, [render(tokenizer, e) for e in prompts], UsageOptions())
    for layer in report.layers:
        assert layer.counts == tuple(usage[layer.layer].counts.tolist())


def test_inspect_tells_of_recipes_checkpoints_and_banks(folder: Path) -> None:
    recipe = write_recipe(folder, RESIDUALS)
    told = inspect_path(recipe).document
    assert told["kind"] == "recipe"
    assert told["experts_of_a_layer"] == EXPERTS
    assert told["merge"]["residuals"] == {"rank": 3, "fit": "outputs"}
    original = inspect_path(folder / "moe").document
    assert original["experts_of_a_token"] == 2
    assert original["expert_bytes"] == told["expert_bytes"]
    build(folder, RESIDUALS)
    bank = inspect_path(folder / "bank").document
    assert bank["merged_experts"]["original"]["bytes"] == original["expert_bytes"]
    layers = bank["sparse_layers"]
    assert [layer["experts"] for layer in layers] == [2, 2, 2]
    assert all(len(layer["errors"]) == EXPERTS for layer in layers)
    backbone = inspect_path(Bank.open(folder / "bank").backbone.path).document
    assert backbone["sparse_layers"] == layers
    assert backbone["experts_of_a_layer"] == 2
    for path in (recipe, folder / "moe", folder / "bank"):
        shown = run("inspect", path)
        assert shown.exit_code == 0
    assert "sparse layers" in shown.stdout
    assert json.loads(run("inspect", folder / "bank", "--json").stdout)["sparse_layers"] == layers


def test_eval_normalises_by_the_original_model(folder: Path) -> None:
    build(folder, {"method": "shared", "residuals": {"rank": 99, "dtype": "float32"}})
    answers = folder / "answers.json"
    command = ("eval", folder / "bank", "--data", folder / "prompts.jsonl", "--experts")
    done = run(
        *command, "--max-tokens", 2, "--dtype", "float32", "--device", "cpu", "--json", answers
    )
    assert done.exit_code == 0, done.exception
    document = json.loads(answers.read_text())
    assert document["systems"]["experts"] == "the model as it was, with all its experts"
    assert [task["task"] for task in document["tasks"]] == ["count", "shout"]
    refused = run(*command, "--compare", "ties")
    assert isinstance(refused.exception, BankError)
    assert "leave out --compare" in str(refused.exception)


def test_eval_tells_when_the_original_was_changed(folder: Path, tmp_path: Path) -> None:
    save_moe(make_moe(seed=3), tmp_path / "moe")
    recipe = write_recipe(tmp_path, {"method": "shared"}, calibration=None)
    assert run("build", recipe, "--out", tmp_path / "bank").exit_code == 0
    path = tmp_path / "moe" / "model.safetensors"
    save_file({n: x + 1 for n, x in load_file(path).items()}, path, metadata={"format": "pt"})
    done = run("eval", tmp_path / "bank", "--data", folder / "prompts.jsonl", "--experts")
    assert isinstance(done.exception, BankError)
    assert "put the same files there" in str(done.exception)


@pytest.mark.parametrize(
    ("experts", "others", "error", "message"),
    [
        ({"method": "m-smoe", "keep": 7}, {}, RecipeError, "keep is 7"),
        ({"method": "reap", "keep": 2}, {"calibration": "no.jsonl"}, DataError, "cannot be read"),
        ({"method": "reap", "keep": 2}, {"calibration": None}, RecipeError, "give calibration"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    experts: object, others: dict[str, Any], error: type[Exception], message: str, folder: Path
) -> None:
    out = folder / "nothing"
    done = run("build", write_recipe(folder, experts, **others), "--out", out, "--device", "cpu")
    assert isinstance(done.exception, error)
    assert message in str(done.exception)
    assert not out.exists()


def test_tables_of_many_experts_are_condensed() -> None:
    layer = {
        "layer": "model.layers.0.mlp",
        "experts": 4,
        "groups": [k % 4 for k in range(MOST_EXPERTS + 1)],
        "unused": [],
        "centre_errors": [0.5] * (MOST_EXPERTS + 1),
        "errors": [0.25] + [0.5] * MOST_EXPERTS,
        "router_kl": None,
        "router_agreement": None,
    }
    _, table = tables({"kind": "bank", "sparse_layers": [layer]})
    assert [column.header for column in table.columns] == [
        "layer",
        "experts",
        "error of centres",
        "error of experts",
    ]
    assert list(table.columns[-1].cells) == ["0.250 to 0.500"]
