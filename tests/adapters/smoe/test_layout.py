"""Where experts are in checkpoints of every family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeroute.adapters.errors import BackboneError, CheckpointError
from mergeroute.adapters.smoe.layout import MoeCheckpoint

from ...moe import CAUSAL, EXPERTS, HIDDEN, make_moe
from ...tiny import make_model

FIRST = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("is_published", [True, False])
def test_experts_and_routers_are_read_as_transformers_holds_them(
    name: str, is_published: bool, tmp_path: Path
) -> None:
    model = make_moe(name)
    model.save_pretrained(tmp_path, save_original_format=is_published)
    moe = MoeCheckpoint.open(tmp_path)
    parameters = dict(model.named_parameters())
    sparse = [0, 2] if name == "qwen2_moe" else [0, 1, 2]
    assert [layer.name for layer in moe.layers] == [f"model.layers.{k}.mlp" for k in sparse]
    assert (moe.experts, moe.top_k) == (EXPERTS, 2)
    for layer in moe.layers:
        assert layer.is_fused is not is_published
        weights = moe.read(layer)
        assert len(weights) == EXPERTS
        assert weights.parts == 2
        assert torch.equal(weights.gate_up, parameters[f"{layer.name}.experts.gate_up_proj"])
        assert torch.equal(weights.down, parameters[f"{layer.name}.experts.down_proj"])
        assert torch.equal(moe.router(layer), parameters[f"{layer.name}.gate.weight"])
        assert moe.tensors_of(layer) <= moe.checkpoint.tensors.keys()
    rest = moe.checkpoint.tensors.keys() - {n for k in moe.layers for n in moe.tensors_of(k)}
    assert not any("experts." in tensor for tensor in rest)
    assert any("shared_expert" in tensor for tensor in rest) is (name == "qwen2_moe")


def test_switch_has_ungated_experts_in_encoder_and_decoder(tmp_path: Path) -> None:
    model = make_moe("switch")
    model.save_pretrained(tmp_path)
    moe = MoeCheckpoint.open(tmp_path)
    assert [layer.name for layer in moe.layers] == [
        "decoder.block.1.layer.2.mlp",
        "encoder.block.1.layer.1.mlp",
    ]
    assert moe.top_k == 1
    weights = moe.read(moe.layers[1])
    expert = model.encoder.block[1].layer[1].mlp.experts["expert_3"]
    assert weights.parts == 1
    assert torch.equal(weights.gate_up[3], expert.wi.weight)
    assert torch.equal(weights.down[3], expert.wo.weight)
    assert moe.router(moe.layers[1]).shape == (EXPERTS, HIDDEN)


def test_bytes_count_the_experts_alone(tmp_path: Path) -> None:
    make_moe("mixtral").to(torch.bfloat16).save_pretrained(tmp_path)
    assert MoeCheckpoint.open(tmp_path).expert_bytes == 3 * EXPERTS * 3 * 24 * HIDDEN * 2


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"is a llama model, no sparse mixture of experts"):
        MoeCheckpoint.open(tmp_path)


def test_a_sparse_family_with_dense_layers_alone_is_refused(tmp_path: Path) -> None:
    make_moe("qwen2_moe", mlp_only_layers=[0, 1, 2]).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="all its layers are dense"):
        MoeCheckpoint.open(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    make_moe().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BackboneError, match="is quantised: merge the experts of the bfloat16"):
        MoeCheckpoint.open(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), f"lacks the tensor '{FIRST}'"),
        (lambda t: t.update({ROUTER: torch.zeros(4)}), r"of shape \[4\], a router has rows"),
        (lambda t: t.update({FIRST: torch.zeros(HIDDEN, 23)}), r"of shape \[24, 32\] in float32"),
        (
            lambda t: t.update({FIRST: torch.zeros(HIDDEN, 24, dtype=torch.int8)}),
            r"of shape \[32, 24\] in int8, its router and the other experts need floats",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    make_moe().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        MoeCheckpoint.open(tmp_path)


def test_experts_of_nan_are_refused_when_they_are_read(tmp_path: Path) -> None:
    make_moe().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[FIRST][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    moe = MoeCheckpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaN or inf in 'model\.layers\.0"):
        moe.read(moe.layers[0])
