"""Fitted gates send an expert's prompts to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch

from mergeroute.adapters.build import open_sources
from mergeroute.adapters.merge import Merger
from mergeroute.adapters.smoe.upcycling import upcycle
from mergeroute.runtime.gate_fitting import SHARPNESS, fitted_gates
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.rendering import Rendered

from ..experts import make_zoo
from ..tiny import make_model


def drawn_prompts(names: str, *, seed: int) -> dict[str, list[Rendered]]:
    """Prompts of several lengths, every expert's of tokens of its own."""
    random = Random(seed)
    found: dict[str, list[Rendered]] = {}
    for k, name in enumerate(names):
        lengths = [random.randint(4, 12) for _ in range(12)]
        own = [tuple(random.randrange(60 * k, 60 * k + 6) for _ in range(n)) for n in lengths]
        found[name] = [Rendered(ids, len(ids)) for ids in own]
    return found


def test_prompts_go_to_their_experts(tmp_path: Path) -> None:
    """By other prompts of the same tokens; the first layer's inputs do not depend on experts."""
    zoo = make_zoo(tmp_path, make_model())
    names = "abcd"
    merged = {"backbone": {"method": "linear"}, "modules": {"method": "none"}}
    recipe = zoo.recipe(names, **merged)
    told: list[int] = []
    prompts = drawn_prompts(names, seed=1)
    gates = {}

    def fit(merger: Merger) -> dict[int, torch.Tensor]:
        gates.update(fitted_gates(merger, prompts, on_prompt=lambda: told.append(1)))
        return gates

    out = upcycle(recipe, tmp_path / "moe", gates=fit)
    assert len(told) == sum(map(len, prompts.values()))
    model = load_model(out, device=torch.device("cpu"), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *call: seen.append(call[2][0]))
    for k, own in enumerate(drawn_prompts(names, seed=2).values()):
        seen.clear()
        with torch.no_grad():
            for prompt in own:
                model(torch.tensor([prompt.token_ids]))
        logits = torch.cat(seen)  # [t, experts]
        assert float((logits.argmax(1) == k).float().mean()) > 0.9
        assert float(logits[:, k].mean()) > SHARPNESS / 2


def test_what_experts_share_is_merged_once_for_all_of_them(tmp_path: Path) -> None:
    merged: list[str] = []

    class Noting(Merger):
        def backbone_rows(self, name: str) -> Iterator[torch.Tensor]:
            merged.append(name)
            return super().backbone_rows(name)

    zoo = make_zoo(tmp_path, make_model())
    recipe = zoo.recipe("abc", backbone={"method": "linear"}, modules={"method": "none"})
    fitted_gates(Noting(*open_sources(recipe), recipe), drawn_prompts("abc", seed=1))
    assert len(merged) == len(set(merged)) > 0


def test_long_prompts_count_as_much_as_short_ones(tmp_path: Path) -> None:
    """Repeating all prompts of one expert changes nothing."""
    zoo = make_zoo(tmp_path, make_model())
    recipe = zoo.recipe("ab", backbone={"method": "linear"}, modules={"method": "none"})
    merger = Merger(*open_sources(recipe), recipe)
    prompts = drawn_prompts("ab", seed=1)
    once = fitted_gates(merger, prompts)
    thrice = fitted_gates(merger, {**prompts, "a": prompts["a"] * 3})
    for layer, rows in once.items():
        torch.testing.assert_close(thrice[layer], rows, rtol=1e-3, atol=1e-3)
