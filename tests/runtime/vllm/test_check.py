from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm import check
from mergeroute.runtime.vllm.launch import Mode, PluginOptions
from mergeroute.runtime.vllm.plugin import is_virtual

SLOTS, RANK, WIDTH, SIZES = 3, 4, 6, (5, 7)


class Layer:
    """What the check asks of a layer of vLLM with LoRAs, two slices to its output."""

    tp_size = 1

    def __init__(self, *, error: float = 0.0) -> None:
        self.error = error
        self.base_layer = torch.randn(sum(SIZES), WIDTH)
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, WIDTH) for _ in SIZES)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, size, RANK) for size in SIZES)
        self.punica_wrapper = self
        self.weights = torch.zeros(0)

    def set_lora(self, slot: int, a: list[Tensor], b: list[Tensor]) -> None:
        for k in range(len(SIZES)):
            self.lora_a_stacked[k][slot, 0, : a[k].shape[0]] = a[k]
            self.lora_b_stacked[k][slot, 0, :, : b[k].shape[1]] = b[k]

    def reset_lora(self, slot: int) -> None:
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[slot] = 0

    def set_weights(self, rows: Tensor, places: Tensor) -> None:
        self.weights = rows[places]

    def _get_quant_method(self) -> Any:
        return SimpleNamespace(apply=lambda weight, x, _: x @ weight.T)

    def apply(self, x: Tensor) -> Tensor:
        parts = [
            torch.einsum("ts,sri,ti,sor->to", self.weights, a[:, 0], x, b[:, 0])
            for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)
        ]
        return x @ self.base_layer.T + torch.cat(parts, 1) * (1 + self.error)


def manager(**layers: Layer) -> Any:
    return SimpleNamespace(
        modules={f"model.layers.0.{name}": layer for name, layer in layers.items()},
        lora_slots=SLOTS,
    )


def test_layers_that_blend_as_they_should_pass_and_are_left_empty() -> None:
    layer = Layer()
    check.check_layers(manager(qkv_proj=layer))
    assert not any(stack.any() for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked))


def test_a_kind_of_layer_that_differs_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"blends in model\.layers\.0\.down_proj differ by"):
        check.check_layers(manager(qkv_proj=Layer(), down_proj=Layer(error=1e-3)))


def test_nan_is_no_match() -> None:
    with pytest.raises(EngineError, match="differ by nan"):
        check.check_layers(manager(o_proj=Layer(error=float("nan"))))


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "1.0"])
def test_another_vllm_is_refused_by_its_version(found: str) -> None:
    with pytest.raises(EngineError, match=rf"vLLM {found} was not tested .*materialise"):
        check.check_version(found)


def install(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that this vLLM is installed."""
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("found", "mode", "virtual"),
    [
        ("9.9+cpu", "auto", False),
        ("0.32.0", "auto", True),
        ("0.32.0", "virtual", True),
        ("0.32.0", "materialise", False),
    ],
)
def test_auto_materialises_where_the_version_was_not_tested(
    found: str, mode: Mode, virtual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, found, monkeypatch)
    assert is_virtual(PluginOptions(tmp_path, mode=mode)) == virtual


def test_auto_materialises_after_a_self_check_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "0.32.0", monkeypatch)
    options = PluginOptions(tmp_path, mode="auto")
    options.store.note_mismatch("0.32.1", "another vLLM")
    assert is_virtual(options)
    noted = options.store.note_mismatch("0.32.0", "blends differ")
    assert not is_virtual(options)
    assert is_virtual(replace(options, mode="virtual"))
    assert options.store.keys() == frozenset()
    left = sorted(path.name for path in tmp_path.glob(".*"))
    assert left == [".mismatch-0.32.0", ".mismatch-0.32.1"]
    noted.unlink()
    assert is_virtual(options)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.33.1"])
def test_a_tested_vllm_passes(found: str) -> None:
    check.check_version(found)
