"""What of a model a module may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.adapters.backbone import Backbone, linear_layers
from mergeroute.adapters.shapes import Shapes

from ..tiny import CONFIGS, VOCABULARY, make_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_parameter_can_be_changed(architecture: str, tied: bool) -> None:
    model = make_model(architecture, tied=tied)
    shapes = Shapes.of(model)
    named = {f"{layer}.weight" for layer in shapes.matrices} | shapes.vectors.keys()
    assert named >= {name for name, _ in model.named_parameters()}
    assert list(shapes.head.values()) == [(VOCABULARY, 32)]
    assert (VOCABULARY, 32) in shapes.embeddings.values()
    assert not shapes.linear.keys() & (shapes.head.keys() | shapes.embeddings.keys())
    assert shapes.linear == linear_layers(model)
    assert (shapes.tied is not None) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_checkpoints_shapes_need_no_weights(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    model = make_model(architecture, tied=tied)
    model.save_pretrained(tmp_path)
    backbone = Backbone.open(tmp_path)
    assert backbone.shapes == Shapes.of(model)
    assert backbone.layers == linear_layers(model)
