"""PHATGOOSE gates of the zoo: trained on the demo bank's own base and modules."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.lora import Module

ROOT = Path(__file__).parents[2]
BANK = ROOT / "serving" / "demo_bank"


def test_gates_are_trained_for_every_layer_and_fit_their_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    zoo = importlib.import_module("examples.zoo.gates")
    task = importlib.import_module("examples.zoo.tasks").load_tasks()["caesar"]
    chance = random.Random(0)
    examples = [task.example(chance, split="train") for _ in range(16)]
    lora, schedule = BANK / "modules" / "caesar", zoo.GateSchedule(steps=2, batch_size=4)
    steps: list[int] = []
    gates = zoo.train_gates(
        BANK / "backbone", lora, examples, schedule=schedule, on_step=lambda: steps.append(1)
    )
    shapes = Backbone.open(BANK / "backbone").shapes
    module = Module.load(lora, name="caesar", layers=shapes)
    replace(module, gates=gates).check(shapes)
    assert gates.keys() == module.deltas.keys()
    assert len(steps) == schedule.steps
    again = zoo.train_gates(BANK / "backbone", lora, examples, schedule=schedule)
    assert all(torch.equal(gates[layer], again[layer]) for layer in gates)
