"""`mergeroute build`, `inspect` and `eval` of a sparse model with merged experts."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.errors import BackboneError, BankError, DataError, RecipeError
from mergeroute.adapters.smoe.recipe import Method
from mergeroute.adapters.smoe.stored import TENSORS, read_report
from mergeroute.routers.data import read_examples
from mergeroute.runtime.expert_usage import UsageOptions, expert_usage
from mergeroute.runtime.loading import load_model, load_tokenizer
from mergeroute.runtime.rendering import render
from mergeroute.serving.cli import app
from mergeroute.serving.inspect_tables import MOST_EXPERTS, tables
from mergeroute.serving.inspection import inspect_path

from ..moe import EXPERTS, make_moe, save_moe
from ..tiny import make_tokenizer

CPU = torch.device("cpu")
ANSWER_TOKENS = 3
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
    residuals = {"rank": 3, "fit": "outputs", "dtype": "bfloat16", "rows": 0.0}
    assert told["merge"] == {
        **{"method": "m-smoe", "keep": 2, "allocation": "fixed", "skip_layers": []},
        **{"align": "dominant", "floor": 1e-3, "router": "exact", "residuals": residuals},
    }
    original = inspect_path(folder / "moe").document
    assert original["experts_of_a_token"] == 2
    assert original["expert_bytes"] == told["expert_bytes"]
    build(folder, RESIDUALS)
    bank = inspect_path(folder / "bank").document
    assert (bank["merge"], bank["dtype"]) == (told["merge"], None)
    assert bank["merged_experts"]["original"]["bytes"] == original["expert_bytes"]
    layers = bank["sparse_layers"]
    assert [layer["experts"] for layer in layers] == [2, 2, 2]
    assert all(len(layer["errors"]) == EXPERTS for layer in layers)
    path = Bank.open(folder / "bank").backbone.path
    backbone = inspect_path(path).document
    assert backbone["sparse_layers"] == layers
    assert (backbone["experts_of_a_layer"], backbone["experts_of_a_token"]) == (EXPERTS, 2)
    assert backbone["expert_bytes"] == backbone["merged_experts"]["merged"]["bytes"]
    assert backbone["expert_flops_of_a_token"] == backbone["merged_experts"]["merged"]["flops"]
    plain, beside = (load_file(path / name) for name in ("model.safetensors", TENSORS))
    assert backbone["tensor_bytes"] == sum(x.nbytes for x in [*plain.values(), *beside.values()])
    for path in (recipe, folder / "moe", folder / "bank"):
        shown = run("inspect", path)
        assert shown.exit_code == 0
    assert "sparse layers" in shown.stdout
    assert json.loads(run("inspect", folder / "bank", "--json").stdout)["sparse_layers"] == layers


def write_own_answers(folder: Path) -> None:
    """A model that answers in letters, in `moe`, and prompts in `held_out.jsonl` with the greedy
    answers that it gives in transformers; but to every other prompt of `shout` a wrong one.
    """
    model = make_moe()
    tokenizer: Any = make_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
    with torch.no_grad():
        said = torch.zeros(len(model.lm_head.weight), 1).index_fill_(0, torch.tensor(letters), 1)
        model.lm_head.weight.mul_(said)  # the logits of all others are 0
    save_moe(model, folder / "moe")
    lines = []
    for task, k in itertools.product(("count", "shout"), range(8)):
        prompt = f"{task} {11 * k}"
        (ids,) = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        tokens = model.generate(ids[None], max_new_tokens=ANSWER_TOKENS, do_sample=False)[0]
        answer = tokenizer.decode(tokens[len(ids) :])
        if task == "shout" and k % 2:
            answer = "wrong"
        lines.append({"task": task, "prompt": prompt, "answer": answer})
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speaking")
    write_own_answers(folder)
    return folder


def evaluate(folder: Path) -> Any:
    """What eval finds of the bank, beside the original."""
    found, data = folder / "found.json", folder / "held_out.jsonl"
    command = ("eval", folder / "bank", "--data", data, "--experts", "--metric", "accuracy")
    options = ("--max-tokens", ANSWER_TOKENS, "--dtype", "float32", "--device", "cpu")
    done = run(*command, *options, "--json", found)
    assert done.exit_code == 0, done.exception
    return json.loads(found.read_text())


def test_eval_normalises_by_the_original_model(speaking: Path) -> None:
    whole = {"method": "shared", "residuals": {"rank": 99, "dtype": "float32"}}
    for experts, is_whole in ((whole, True), ({"method": "shared"}, False)):
        assert build(speaking, experts, calibration=None).exit_code == 0
        document = evaluate(speaking)
        assert document["systems"]["experts"] == "the model as it was, with all its experts"
        assert [task["task"] for task in document["tasks"]] == ["count", "shout"]
        for task, original in zip(document["tasks"], (100, 50), strict=True):
            assert task["scores"]["experts"] == original
            assert task["normalised"]["experts"] == 100
            assert task["normalised"]["auto"] == 100 * task["scores"]["auto"] / original
        normalised = document["mean"]["normalised"]["auto"]
        assert normalised == 100 if is_whole else normalised < 100


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_is_built_told_and_measured(method: Method, speaking: Path) -> None:
    keep = {} if method == "shared" else {"keep": 2}
    done = build(speaking, {"method": method, **keep}, calibration="held_out.jsonl")
    assert done.exit_code == 0, done.exception
    assert f"experts by {method}, compact router" in done.stdout
    told = json.loads(run("inspect", speaking / "bank", "--json").stdout)
    assert told["merged_experts"]["method"] == method
    assert [layer["experts"] for layer in told["sparse_layers"]] == [keep.get("keep", 1)] * 3
    document = evaluate(speaking)
    assert [task["task"] for task in document["tasks"]] == ["count", "shout"]
    assert all(task["normalised"]["auto"] is not None for task in document["tasks"])
    assert document["mean"]["scores"]["experts"] == 75


def test_eval_compares_merged_experts_with_no_static_merges(folder: Path) -> None:
    build(folder, {"method": "shared"})
    command = ("eval", folder / "bank", "--data", folder / "prompts.jsonl", "--experts")
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


def test_inspect_of_a_compact_bank_tells_the_sizes_of_the_plain_checkpoint(folder: Path) -> None:
    build(folder, {"method": "average", "keep": 1}, dtype="bfloat16")
    bank = inspect_path(folder / "bank").document
    assert bank["merge"] == {
        **{"method": "average", "keep": 1, "allocation": "fixed", "skip_layers": []},
        **{"align": "none", "router": "compact"},
    }
    assert bank["dtype"] == "bfloat16"
    backbone = inspect_path(Bank.open(folder / "bank").backbone.path).document
    assert (backbone["experts_of_a_layer"], backbone["experts_of_a_token"]) == (1, 1)
    assert backbone["expert_bytes"] == backbone["merged_experts"]["merged"]["bytes"]


def test_switch_is_told_about_and_makes_no_bank(tmp_path: Path) -> None:
    make_moe("switch").save_pretrained(tmp_path / "moe")
    told = inspect_path(tmp_path / "moe").document
    assert (told["model_type"], told["experts_of_a_token"]) == ("switch_transformers", 1)
    assert told["linear_layers"] is None
    assert run("inspect", tmp_path / "moe").exit_code == 0
    recipe = write_recipe(tmp_path, {"method": "shared"}, calibration=None)
    with pytest.raises(BackboneError, match=r"is no causal language model: [^\n]*$"):
        inspect_path(recipe)


@pytest.mark.parametrize(
    ("experts", "others", "error", "message"),
    [
        ({"method": "m-smoe", "keep": 7}, {}, RecipeError, "keep is 7"),
        (
            {"method": "m-smoe", "keep": 2, "skip_layers": [7], "router": "exact"},
            {},
            RecipeError,
            "skip_layers names 7",
        ),
        ({"method": "reap", "keep": 2}, {"calibration": "no.jsonl"}, DataError, "cannot be read"),
        ({"method": "reap", "keep": 2}, {"calibration": None}, RecipeError, "give calibration"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    experts: object, others: dict[str, Any], error: type[Exception], message: str, folder: Path
) -> None:
    out = folder / "nothing"
    recipe = write_recipe(folder, experts, **others)
    done = run("build", recipe, "--out", out, "--device", "cpu")
    told = run("inspect", recipe)
    for each in (done, told):
        assert isinstance(each.exception, error)
        assert message in str(each.exception)
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
