"""FirstLayers: the bits of the whole backbone, from a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeroute.adapters.errors import RouterError
from mergeroute.runtime.compatibility import prepare_model
from mergeroute.runtime.encoder import Encoder
from mergeroute.runtime.first_layers import FirstLayers
from mergeroute.runtime.loading import load_model

from ..tiny import CONFIGS, make_model

PROMPTS = [(1, 2, 3), (4, 5, 6, 7)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_those_of_the_whole_backbone(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    first = FirstLayers(tmp_path, model.config, device=CPU, dtype=torch.float32)
    (one,) = first.encode(PROMPTS[:1], [1])
    whole = load_model(tmp_path, device=CPU, dtype=torch.float32)
    prepare_model(whole)
    assert torch.equal(one, Encoder(whole, layers=[1]).encode(PROMPTS[:1])[0])
    for found, expected in zip(
        first.encode(PROMPTS, [1, 2]), Encoder(whole, layers=[1, 2]).encode(PROMPTS), strict=True
    ):
        assert torch.equal(found, expected)
    assert "REPORT" not in capfd.readouterr().err


def test_no_other_layer_is_in_memory(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    first = FirstLayers(tmp_path, model.config, device=CPU, dtype=torch.float32)
    first.encode(PROMPTS, [2])
    kept = sum(parameter.numel() for parameter in first._model.parameters())
    per_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert kept == whole - per_layer - model.lm_head.weight.numel()


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = make_model()
    first = FirstLayers(tmp_path, model.config, device=CPU, dtype=torch.float32)
    for layer in (0, 4):
        with pytest.raises(RouterError, match=f"layer {layer} does not exist.* 1 to 3"):
            first.encode(PROMPTS, [layer])
