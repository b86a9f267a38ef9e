"""`mergeroute smoe recover`: merged experts that are trained against the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, write_bank
from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.errors import MergerouteError
from mergeroute.adapters.smoe.layout import MoeCheckpoint
from mergeroute.adapters.smoe.stored import read_report
from mergeroute.runtime.loading import load_model
from mergeroute.serving.cli import app

from ..moe import make_moe, save_moe
from ..tiny import make_model, make_prompt

SHARED = {"method": "shared", "residuals": {"rank": 3, "dtype": "int8"}}
QUICK = ("--steps", 8, "--learning-rate", "1e-2", "--batch-size", 8, "--device", "cpu")


def run(*arguments: object, fails: str = "") -> str:
    """What a command printed; of one that fails, what it says why."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if not fails:
        assert result.exit_code == 0, result.output
        return result.output
    assert isinstance(result.exception, MergerouteError)
    assert fails in str(result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture in `moe`, a bank made of it in `bank`, prompts in `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("sparse")
    save_moe(make_moe(), folder / "moe")
    lines = [{"prompt": f"say {11 * k}", "answer": "yes"} for k in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "few", "base": "./moe", "experts": SHARED})
    )
    run("build", folder / "recipe.yaml", "--out", folder / "bank", "--device", "cpu")
    return folder


def recover(folder: Path, source: str, out: Path, *more: object, fails: str = "") -> str:
    arguments = ("--teacher", folder / "moe", "--data", folder / "prompts.jsonl", "--out", out)
    return run("smoe", "recover", folder / source, *arguments, *QUICK, *more, fails=fails)


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([make_prompt(20, seed=1)])).logits
    return found


def record_of(bank: Path) -> Any:
    return json.loads((bank / "backbone" / "recovery.json").read_text())


def test_a_bank_is_recovered_into_a_bank(folder: Path, tmp_path: Path) -> None:
    """In the form in which it was stored; what is no expert stays as it was, as does the router
    of the plain checkpoint, which merged experts do not use.
    """
    said = recover(folder, "bank", tmp_path / "new")
    assert "held-out loss" in said
    before, after = Bank.open(folder / "bank"), Bank.open(tmp_path / "new")
    assert (after.name, after.recipe, after.sources) == (before.name, before.recipe, before.sources)
    assert after.digest != before.digest
    report = read_report(after.backbone.path)
    assert report is not None
    assert report.is_recovered
    record = record_of(tmp_path / "new")
    losses = record["held_out_losses"]
    assert losses[str(record["best_step"])] < losses["0"]
    one, other = (Checkpoint.open(bank.backbone.path) for bank in (before, after))
    for name in one.tensors:
        is_same = torch.equal(one.read(name), other.read(name))
        assert is_same == ("experts" not in name)
    assert not torch.equal(logits_of(before.backbone.path), logits_of(after.backbone.path))


def test_the_loss_of_what_was_written_is_told(folder: Path, tmp_path: Path) -> None:
    """It is not the one that was trained to, as residuals are rounded to int8; training that goes
    on from there begins with it.
    """
    said = recover(folder, "bank", tmp_path / "new")
    recover(folder, str(tmp_path / "new"), tmp_path / "again")
    record, again = (record_of(tmp_path / name) for name in ("new", "again"))
    stored = record["stored_held_out_loss"]
    assert f"{stored:.4f} as it is stored" in said
    assert stored == pytest.approx(again["held_out_losses"]["0"], rel=1e-6)
    assert stored != pytest.approx(record["held_out_losses"][str(record["best_step"])], rel=1e-6)


def test_a_checkpoint_is_recovered_into_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    recover(folder, "moe", tmp_path / "new")
    assert MoeCheckpoint.open(tmp_path / "new").experts == 4
    assert (tmp_path / "new" / "recovery.json").is_file()
    recover(folder, "moe", tmp_path / "new", fails="exists")
    recover(folder, "moe", tmp_path / "new", "--force", "--steps", 1)
    (tmp_path / "other").mkdir()
    recover(folder, "moe", tmp_path / "other", "--force", fails="replaces a checkpoint")
    recover(folder, "bank", tmp_path / "new", "--force", fails="replaces a bank")


def test_what_cannot_be_recovered_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    recover(folder, "gone", tmp_path / "out", fails="neither a folder nor a hub id")
    model = make_model()
    model.save_pretrained(tmp_path / "dense")
    save_moe(make_moe(vocab_size=310), tmp_path / "wide")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    arguments: list[tuple[Any, Any, str]] = [
        (tmp_path / "wide", folder / "prompts.jsonl", "the teacher has 310 tokens"),
        (folder / "moe", few, "1 different prompts are too few"),
    ]
    for teacher, data, words in arguments:
        run(
            *("smoe", "recover", folder / "bank", "--teacher", teacher, "--data", data),
            *("--out", tmp_path / "out", *QUICK),
            fails=words,
        )
    assert not (tmp_path / "out").exists()


def test_a_bank_with_modules_is_refused(bank: Bank, folder: Path, tmp_path: Path) -> None:
    source = bank.backbone.path.parent
    recover(folder, str(source), tmp_path / "out", fails="has modules or a router")
    write_bank(tmp_path / "bare", name="bare", backbone=bank.backbone, modules=[])
    recover(folder, str(tmp_path / "bare"), tmp_path / "out", fails="no sparse layer")
    assert Backbone.open(bank.backbone.path).digest == bank.backbone.digest
