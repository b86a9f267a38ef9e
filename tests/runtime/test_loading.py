"""Checkpoints that would load into something else than they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeroute.adapters.errors import EngineError, UnsupportedModelError
from mergeroute.runtime.loading import choose_device, choose_dtype, load_model

from ..tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def test_a_complete_checkpoint_loads(weights: Path) -> None:
    model = load_model(weights.parent, device=CPU, dtype=torch.float32)
    for name, tensor in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_missing_tensor_is_not_made_up(weights: Path) -> None:
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj"):
        load_model(weights.parent, device=CPU, dtype=torch.float32)


def test_a_truncated_or_misshapen_checkpoint_is_an_error_of_ours(weights: Path) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        load_model(weights.parent, device=CPU, dtype=torch.float32)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError):
        load_model(weights.parent, device=CPU, dtype=torch.float32)


def test_devices_and_dtypes() -> None:
    assert choose_dtype("float16", CPU) is torch.float16
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    assert choose_device("cpu") == CPU
    with pytest.raises(EngineError, match="dtype 'int3'"):
        choose_dtype("int3", CPU)
    with pytest.raises(EngineError, match="device 'tpu9'"):
        choose_device("tpu9")
