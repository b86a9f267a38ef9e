"""The zoo in miniature: a few steps of training, but every file and the bank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from mergeroute.adapters.bank import Bank

ROOT = Path(__file__).parents[2]


def test_the_quick_zoo_makes_a_bank_and_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.zoo", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    bank = Bank.open(tmp_path / "bank")
    assert len(bank.modules) >= 8
    for entry in bank.modules:
        coverage = bank.load(entry).coverage(bank.backbone.layers)
        assert coverage.layers_matched == coverage.layers_total == 28
    sources = {score["source"] for score in json.loads((tmp_path / "summary.json").read_text())}
    assert sources == {"base", "lora", "full"}
    committed = (ROOT / "examples" / "zoo" / "test.jsonl").read_text("utf-8")
    assert (tmp_path / "data" / "test.jsonl").read_text("utf-8") == committed


def test_the_bundled_banks_router_is_fitted_on_the_committed_prompts(tmp_path: Path) -> None:
    """Again on the same machine to the last byte, elsewhere to rounding: settings are compared."""
    code = f"""
from pathlib import Path
from examples.zoo.bank import OPTIONS
from examples.zoo.data import write_router_data
from examples.zoo.tasks import load_tasks
from mergeroute.serving.cli import DEMO_BANK
from mergeroute.serving.fitting import fit_bank
folder = Path({str(tmp_path)!r})
write_router_data(load_tasks(), folder)
files = dict(data=folder / "router.jsonl", none=folder / "none.jsonl")
fit_bank(DEMO_BANK, folder / "bank", OPTIONS, device="cpu", **files)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    demo, again = ROOT / "serving" / "demo_bank", tmp_path / "bank"
    for folder in ("backbone", "modules"):
        for file in (demo / folder).rglob("*"):
            if file.is_file():
                assert file.read_bytes() == (again / file.relative_to(demo)).read_bytes()
    said = [json.loads((bank / "router" / "router.json").read_text()) for bank in (demo, again)]
    assert said[0] == said[1]
    tensors = [load_file(bank / "router" / "scorer.safetensors") for bank in (demo, again)]
    assert {name: t.shape for name, t in tensors[0].items()} == {
        name: t.shape for name, t in tensors[1].items()
    }


def test_no_prompt_of_none_is_one_of_the_tasks() -> None:
    code = """
from examples.zoo.none import none_prompts
from examples.zoo.tasks import evaluation_examples, load_tasks, router_examples
found = none_prompts()
assert len(found) == len(set(found)) > 900
assert found == none_prompts()
for task in load_tasks().values():
    asked = router_examples(task, 200)
    asked += [e for w in ("known", "held-out") for e in evaluation_examples(task, 200, wording=w)]
    assert not {example.prompt for example in asked} & set(found), task.name
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_no_test_input_or_held_out_wording_is_trained_on() -> None:
    code = """
from random import Random
from examples.zoo.tasks import evaluation_examples, load_tasks, router_examples, split_of
for task in load_tasks().values():
    assert len(task.known) >= 12 and len(task.held_out) >= 4, task.name
    assert not set(task.known) & set(task.held_out), task.name
    random = Random(0)
    trained = [task.example(random, split="train") for _ in range(300)]
    tested = [e for w in ("known", "held-out") for e in evaluation_examples(task, 50, wording=w)]
    assert all(example.wording == "known" for example in trained)
    assert not {e.prompt for e in trained} & {e.prompt for e in tested}, task.name
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
