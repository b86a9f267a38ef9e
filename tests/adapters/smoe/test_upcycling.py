"""Upcycling: equal to what is put together by hand, equal to the dense model where all are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.errors import BackboneError, BankError, RecipeError
from mergeroute.adapters.merge import Merger
from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.smoe.layout import MoeCheckpoint
from mergeroute.adapters.smoe.upcycling import upcycle
from mergeroute.runtime.loading import load_model

from ...experts import Zoo, make_zoo, write_model
from ...tiny import make_model, make_prompt

PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"), make_model())


def recipe_of(zoo: Zoo, names: str = "abc", **keys: Any) -> Recipe:
    merged = {"backbone": {"method": "linear"}, "modules": {"method": "none"}}
    return zoo.recipe(names, **{**merged, **keys})


def drawn(experts: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {k: torch.randn(experts, 32, generator=generator) for k in range(3)}


def drawn_gates(merger: Merger) -> dict[int, Tensor]:
    """As many rows as there are experts, at random."""
    return drawn(len(merger.experts))


def logits_of(path: Path) -> Tensor:
    model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(torch.tensor([make_prompt(24, seed=1)])).logits
    return found


def test_it_is_what_is_put_together_by_hand(zoo: Zoo, tmp_path: Path) -> None:
    """Two full experts and a LoRA; what is no feed-forward part is their mean."""
    out = upcycle(recipe_of(zoo), tmp_path / "moe", gates=drawn_gates)
    tensors = Checkpoint.open(out).tensors
    read = Checkpoint.open(out).read
    own = [zoo.experts[name] for name in "abc"]
    checked = set()
    for layer in range(3):
        block = f"model.layers.{layer}.block_sparse_moe"
        for expert, weights in enumerate(own):
            for part, dense in PARTS.items():
                name = f"{block}.experts.{expert}.{part}.weight"
                wanted = weights[f"model.layers.{layer}.mlp.{dense}.weight"]
                torch.testing.assert_close(read(name), wanted, rtol=1e-5, atol=1e-6)
                checked.add(name)
        checked.add(f"{block}.gate.weight")
    for name in tensors.keys() - checked:
        mean = torch.stack([weights[name] for weights in own]).mean(0)
        torch.testing.assert_close(read(name), mean, rtol=1e-5, atol=1e-6)
    moe = MoeCheckpoint.open(out)
    assert (moe.experts, moe.top_k, len(moe.layers)) == (3, 2, 3)
    for k, sparse in enumerate(moe.layers):
        torch.testing.assert_close(moe.router(sparse), drawn(3)[k])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_that_are_all_alike_make_the_dense_model(
    zoo: Zoo, top_k: int, tmp_path: Path
) -> None:
    """Whatever the gates say."""
    names = ("x", "y", "z")
    document = recipe_of(zoo, "a").model_dump()
    document["experts"] = [{"name": n, "path": str(zoo.folder / "a")} for n in names]
    out = upcycle(Recipe.model_validate(document), tmp_path / "moe", gates=drawn_gates, top_k=top_k)
    dense = logits_of(zoo.folder / "a")
    torch.testing.assert_close(logits_of(out), dense, rtol=1e-4, atol=1e-4)


def test_the_configuration_says_what_the_base_was(zoo: Zoo, tmp_path: Path) -> None:
    out = upcycle(recipe_of(zoo, dtype="bfloat16"), tmp_path / "moe", gates=drawn_gates)
    found = json.loads((out / "config.json").read_text())
    before = json.loads((zoo.folder / "base" / "config.json").read_text())
    assert (found["model_type"], found["num_local_experts"]) == ("mixtral", 3)
    for key in ("hidden_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert found[key] == before[key]
    assert found["dtype"] == "bfloat16"
    stored = Checkpoint.open(out).tensors.values()
    assert {info.dtype for info in stored} == {torch.bfloat16}
    assert (out / "tokenizer.json").is_file()


def test_a_mistral_keeps_its_window(tmp_path: Path) -> None:
    model = make_model("mistral")
    zoo = make_zoo(tmp_path, model)
    out = upcycle(recipe_of(zoo, "ab"), tmp_path / "moe", gates=drawn_gates)
    assert json.loads((out / "config.json").read_text())["sliding_window"] == 24


@pytest.mark.parametrize(
    ("keys", "top_k", "words"),
    [
        ({"modules": {"rank": 4}}, 2, "set modules"),
        ({"backbone": {"method": "none"}}, 2, "give backbone a merge method"),
        ({"backbone": {"method": "fisher"}, "calibration": "x.jsonl"}, 2, "looks at fishers"),
        ({}, 4, "cannot be sent to 4 of 3 experts"),
        ({}, 0, "cannot be sent to 0 of 3 experts"),
    ],
)
def test_recipes_that_make_no_mixture_are_refused(
    keys: dict[str, Any], top_k: int, words: str, zoo: Zoo, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        upcycle(recipe_of(zoo, **keys), tmp_path / "moe", gates=drawn_gates, top_k=top_k)
    assert not (tmp_path / "moe").exists()


def test_bases_that_mixtral_has_no_room_for_are_refused(tmp_path: Path) -> None:
    for name, model in (("qwen2", make_model("qwen2")), ("b", make_model(attention_bias=True))):
        folder = tmp_path / name
        zoo = make_zoo(folder, model)
        with pytest.raises(BackboneError, match="without biases"):
            upcycle(recipe_of(zoo, "ab"), folder / "moe", gates=drawn_gates)


def test_nothing_but_a_checkpoint_is_replaced(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    with pytest.raises(BankError, match="exists"):
        upcycle(recipe_of(zoo), tmp_path / "moe", gates=drawn_gates, force=True)
    write_model(tmp_path / "other", make_model())
    with pytest.raises(BankError, match="exists"):
        upcycle(recipe_of(zoo), tmp_path / "other", gates=drawn_gates)
    upcycle(recipe_of(zoo), tmp_path / "other", gates=drawn_gates, force=True)
    assert MoeCheckpoint.open(tmp_path / "other").experts == 3
