"""Gate vectors of modules: a file of their own, checked, and part of the content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeroute.adapters.errors import ModuleError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.module_files import CONFIG_FILE, GATES_FILE, WEIGHTS_FILE, module_files
from mergeroute.adapters.pool import shrink_module
from mergeroute.adapters.shapes import Shapes

from ..tiny import make_model, make_module

MODEL = make_model()
SHAPES = Shapes.of(MODEL)
BARE = make_module(MODEL, "m")
LAYER = "model.layers.1.mlp.up_proj"


def make_gated(seed: int = 0) -> Module:
    generator = torch.Generator().manual_seed(seed)
    gates = {n: torch.randn(d.shape[1], generator=generator) for n, d in BARE.deltas.items()}
    return replace(BARE, gates=gates)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / GATES_FILE)
    change(tensors)
    save_file(tensors, folder / GATES_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_gates_lie_beside_the_factors_and_are_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    gated = make_gated()
    gated.save(tmp_path, dtype=dtype)
    found = Module.load(tmp_path, name="m", layers=SHAPES)
    assert found.gates.keys() == gated.gates.keys()
    assert all(torch.equal(found.gates[n], gated.gates[n]) for n in gated.gates)
    assert module_files(tmp_path)[-1].name == GATES_FILE
    BARE.save(tmp_path)
    assert [file.name for file in module_files(tmp_path)] == [CONFIG_FILE, WEIGHTS_FILE]
    assert not Module.load(tmp_path, name="m", layers=SHAPES).gates


def test_they_are_part_of_the_digest() -> None:
    assert len({BARE.digest, make_gated().digest, make_gated(1).digest}) == 3
    assert replace(make_gated(), gates={}).digest == BARE.digest


def test_peft_reads_the_folder_as_if_they_were_not_there(tmp_path: Path) -> None:
    make_gated().save(tmp_path)
    adapted = PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert torch.allclose(
        adapted.base_model.model.get_submodule(LAYER).get_delta_weight("default"),
        BARE.deltas[LAYER].dense(),
        atol=1e-6,
    )


def test_a_layer_that_is_dropped_takes_its_gate_along(tmp_path: Path) -> None:
    shrunk = shrink_module(make_gated(), {LAYER: 2}, "svd")
    shrunk.check(SHAPES)
    assert shrunk.gates.keys() == {LAYER}


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({LAYER: torch.ones(7)}, r"shape \(7,\) for '.*up_proj', whose input has 32"),
        ({LAYER: torch.zeros(32)}, "all entries equal, which points nowhere"),
        ({LAYER: torch.ones(32)}, "all entries equal"),
        ({LAYER: torch.full((32,), torch.nan)}, "NaN or inf in the gate of"),
        ({LAYER: torch.ones(2, 3)}, "a vector of floats is needed"),
        ({LAYER: torch.ones(32, dtype=torch.int32)}, "a vector of floats is needed"),
        ({"model.layers.9.mlp.up_proj": torch.rand(32)}, "which it does not change"),
        ({"model.embed_tokens": torch.rand(32)}, "which it does not change"),
    ],
)
def test_gates_that_make_no_sense_are_refused(
    tmp_path: Path, gate: dict[str, Tensor], message: str
) -> None:
    make_gated().save(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update(gate))
    with pytest.raises(ModuleError, match=message):
        Module.load(tmp_path, name="m", layers=SHAPES)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    make_gated().save(tmp_path)
    file = tmp_path / GATES_FILE
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModuleError, match="is damaged or truncated"):
        Module.load(tmp_path, name="m", layers=SHAPES)
