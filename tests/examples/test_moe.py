"""The zoo's mixture of experts: training that goes on where it stopped, and how it is scored."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.smoe.upcycling import upcycle

ROOT = Path(__file__).parents[2]
BANK = ROOT / "serving" / "demo_bank"


@pytest.fixture(autouse=True)
def examples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def make_mixture(folder: Path) -> Path:
    """Of two of the demo bank's LoRAs."""
    document = {
        "base": str(BANK / "backbone"),
        "experts": [{"name": n, "path": str(BANK / "modules" / n)} for n in ("caesar", "roman")],
        "backbone": {"method": "linear"},
        "modules": {"method": "none"},
    }
    gates = {layer: torch.ones(2, 128) for layer in range(4)}
    return upcycle(Recipe.model_validate(document), folder, gates=lambda _: gates)


def train(moe: Any, folder: Path, state: Path, *, steps: int) -> Any:
    """The model after so many steps in all, from what is kept in `state` on."""
    model = moe.load_model(folder).train()
    tokenizer = moe.load_tokenizer(folder)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3)
    done = moe.restore(state, named, optimizer)
    for batch in islice(moe.stream(tokenizer), done, steps):
        moe.train_step(model, batch, optimizer)
    moe.keep(state, named, optimizer, steps)
    return model


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """To the same weights, bit for bit."""
    moe = importlib.import_module("examples.zoo.moe")
    folder = make_mixture(tmp_path / "moe")
    whole = train(moe, folder, tmp_path / "whole.safetensors", steps=2)
    state = tmp_path / "parts.safetensors"
    train(moe, folder, state, steps=1)
    parts = train(moe, folder, state, steps=2)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_forward_pass_scores_as_greedy_answers_do() -> None:
    evaluate = importlib.import_module("examples.zoo.evaluate")
    model_files = importlib.import_module("examples.zoo.model")
    tasks = importlib.import_module("examples.zoo.tasks")
    model = model_files.load_model(BANK / "backbone")
    tokenizer = model_files.load_tokenizer(BANK / "backbone")
    for name in ("reverse", "roman"):
        examples = tasks.evaluation_examples(tasks.load_tasks()[name], 30)
        greedy = evaluate.accuracy(model, tokenizer, examples)
        assert 0 < greedy < 1
        assert evaluate.forced_accuracy(model, tokenizer, examples) == greedy
