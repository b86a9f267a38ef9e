from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import BlendError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.vllm.blends import lora_name
from mergeroute.runtime.vllm.materialise import blended, clear, materialise
from mergeroute.runtime.vllm.store import ModuleStore
from tests.tiny import make_module


@pytest.fixture
def filled(tmp_path: Path, modules: dict[str, Module], shapes: Shapes) -> ModuleStore:
    store = ModuleStore(tmp_path / "modules", slots=4, rank=8)
    for module in modules.values():
        store.add(module, shapes)
    return store


def dense(modules: dict[str, Module], blend: Blend, layer: str) -> torch.Tensor:
    return sum(  # type: ignore[return-value] # never empty
        (
            modules[n].deltas[layer].dense() * w
            for n, w in blend.items()
            if layer in modules[n].deltas
        )
    )


def test_a_blend_is_one_module(modules: dict[str, Module]) -> None:
    blend = Blend({"m0": 0.75, "m1": -0.5, "m2": 1.25})
    one = blended(modules, blend)
    for layer, delta in one.deltas.items():
        torch.testing.assert_close(delta.dense(), dense(modules, blend, layer))
    assert one.rank == sum(modules[name].rank for name in blend)


def test_modules_may_change_different_layers(model: Any) -> None:
    whole = make_module(model, "whole")
    layer = next(iter(whole.deltas))
    rest = Module("rest", {k: d for k, d in whole.deltas.items() if k != layer})
    one = blended({"a": whole, "b": rest}, Blend({"a": 0.5, "b": 0.25}))
    torch.testing.assert_close(one.deltas[layer].dense(), whole.deltas[layer].dense() * 0.5)


def test_a_folder_is_written_once_and_read_back(
    filled: ModuleStore, modules: dict[str, Module], shapes: Shapes
) -> None:
    blend = Blend({"m0": 0.75, "m2": -0.5})
    name = lora_name(blend.renamed({n: m.digest for n, m in modules.items() if n in blend}))
    folder = materialise(filled, name)
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    read = Module.load(folder, name="x", layers=shapes)
    for layer, delta in read.deltas.items():
        torch.testing.assert_close(delta.dense(), dense(modules, blend, layer))
    assert materialise(filled, name) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert len(filled.keys()) == 3
    clear(filled)
    assert not folder.exists()


def test_a_server_that_starts_leaves_the_blends_of_one_that_runs(filled: ModuleStore) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    folders = [
        filled.folder / ".blends" / name
        for name in (
            f"{socket.gethostname()}-{os.getppid()}",
            f"{socket.gethostname()}-{ended.pid}",
            "other-machine-1",
        )
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    clear(filled)
    assert [folder.exists() for folder in folders] == [True, False, True]


def test_other_names_are_refused(filled: ModuleStore) -> None:
    with pytest.raises(BlendError):
        materialise(filled, "blend:../x=1")
