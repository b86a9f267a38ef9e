from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import ModuleError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.vllm.blends import module_key
from mergeroute.runtime.vllm.store import ModuleStore
from tests.tiny import make_module, make_rich_module


@pytest.fixture
def empty(tmp_path: Path) -> ModuleStore:
    return ModuleStore(tmp_path / "modules", slots=2, rank=8)


def test_a_module_is_written_as_a_plain_peft_folder(
    empty: ModuleStore, model: Any, shapes: Shapes
) -> None:
    module = make_module(model, "a", rank=3)
    key = empty.add(module, shapes)
    assert key == module_key(module.digest)
    assert empty.keys() == {key}
    assert key in empty
    assert Module.load(empty.path(key), name="b", layers=shapes).digest == module.digest


def test_equal_modules_are_one_and_removing_is_done_once(
    empty: ModuleStore, model: Any, shapes: Shapes
) -> None:
    module = make_module(model, "a")
    assert empty.add(module, shapes) == empty.add(replace(module, name="other"), shapes)
    empty.remove(module.digest)
    empty.remove(module.digest)
    assert empty.keys() == frozenset()
    assert list(empty.folder.iterdir()) == []


def test_layers_of_rank_zero_are_left_out(empty: ModuleStore, model: Any, shapes: Shapes) -> None:
    module = make_module(model, "a")
    layer, delta = next(iter(module.deltas.items()))
    none = LowRank(delta.left[:, :0], delta.right[:0])
    key = empty.add(replace(module, deltas={**module.deltas, layer: none}), shapes)
    names = load_file(empty.path(key) / "adapter_model.safetensors")
    assert not any(layer in name for name in names)


def test_no_more_modules_than_slots(empty: ModuleStore, model: Any, shapes: Shapes) -> None:
    for seed in range(2):
        empty.add(make_module(model, f"m{seed}", seed=seed), shapes)
    with pytest.raises(ModuleError, match=r"'m2' finds no slot: all 2 are taken"):
        empty.add(make_module(model, "m2", seed=2), shapes)
    assert len(empty.keys()) == 2


def test_no_larger_rank_than_the_slots(empty: ModuleStore, model: Any, shapes: Shapes) -> None:
    with pytest.raises(ModuleError, match=r"rank 9, vLLM was started for at most 8: .*rank 9"):
        empty.add(make_module(model, "a", rank=9), shapes)


def test_what_is_not_blended_inside_vllm_is_refused_by_name(
    empty: ModuleStore, model: Any, shapes: Shapes
) -> None:
    rich = make_rich_module(model, "rich", rank=2)
    with pytest.raises(ModuleError, match=r"changes the embedding \('model\.embed_tokens'\)"):
        empty.add(rich, shapes)
    inner = {k: d for k, d in rich.deltas.items() if k in shapes.linear}
    head = {"lm_head": rich.deltas["lm_head"]}
    plain = replace(rich, embeddings=frozenset(), vectors={}, gates={})
    with pytest.raises(ModuleError, match=r"the head \('lm_head'\)"):
        empty.add(replace(plain, deltas={**inner, **head}), shapes)
    with pytest.raises(ModuleError, match="norms or biases"):
        empty.add(replace(rich, embeddings=frozenset(), deltas=inner), shapes)
    expert = "model.layers.0.mlp.experts.3.up_proj"
    with pytest.raises(ModuleError, match=r"experts \('model\.layers\.0\.mlp\.experts\.3"):
        empty.add(
            Module("e", {expert: LowRank(torch.ones(4, 1), torch.ones(1, 4))}),
            Shapes(linear={expert: (4, 4)}),
        )
    assert empty.keys() == frozenset()
