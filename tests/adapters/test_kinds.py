"""Every parameter of every architecture is told what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.errors import BackboneError
from mergeroute.adapters.kinds import Kind, classify, empty_model, is_tied
from mergeroute.adapters.shapes import Shapes

from ..tiny import CONFIGS, make_model

VARIANTS = [(name, tied) for name in CONFIGS for tied in (False, True)]


@pytest.mark.parametrize(("architecture", "tied"), VARIANTS)
def test_kinds_agree_with_what_modules_may_change(architecture: str, tied: bool) -> None:
    model = make_model(architecture, tied=tied)
    found, shapes = classify(model), Shapes.of(model)
    assert is_tied(model) == tied
    assert found.keys() >= {name for name, _ in model.named_parameters()}

    def layers(kind: Kind) -> set[str]:
        return {p.layer for p in found.values() if p.kind is kind}

    heads = set() if tied else set(shapes.head)
    assert layers(Kind.LINEAR) == set(shapes.linear)
    assert layers(Kind.EMBEDDING) == set(shapes.embeddings) | (set(shapes.head) - heads)
    assert layers(Kind.HEAD) == heads
    vectors = {n for n, p in found.items() if p.kind in (Kind.NORM, Kind.BIAS)}
    assert vectors == set(shapes.vectors)
    assert not layers(Kind.OTHER) | layers(Kind.BUFFER)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_depth_runs_from_the_first_block_to_the_last(architecture: str) -> None:
    model = make_model(architecture)
    found = classify(model)
    depths = {parameter.depth for parameter in found.values()}
    assert depths == {None, 0.0, 0.5, 1.0}
    for name, parameter in found.items():
        digits = [part for part in name.split(".") if part.isdigit()]
        assert (parameter.depth is None) == (not digits), name
        if digits:
            assert parameter.depth == int(digits[0]) / 2


def test_eleven_blocks_are_told_apart() -> None:
    found = classify(make_model("llama", num_hidden_layers=11))
    for name, parameter in found.items():
        if parameter.depth is not None:
            assert parameter.depth == pytest.approx(int(name.split(".")[2]) / 10)


def test_the_only_block_lies_at_depth_zero() -> None:
    found = classify(make_model("llama", num_hidden_layers=1))
    assert {parameter.depth for parameter in found.values()} == {None, 0.0}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_only_conv1d_weights_are_stored_transposed(architecture: str) -> None:
    model = make_model(architecture)
    shapes = Shapes.of(model)
    for name, parameter in classify(model).items():
        shape = tuple(model.get_parameter(name).shape)
        if parameter.kind is Kind.LINEAR:
            stated = shapes.linear[parameter.layer]
            assert shape == (stated[::-1] if parameter.is_transposed else stated)
        assert parameter.is_transposed == (architecture == "gpt2" and parameter.kind is Kind.LINEAR)


def test_an_empty_model_takes_no_memory(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    model = empty_model(tmp_path)
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
    assert classify(model) == classify(make_model())


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "t5"}', '{"model_type": "nothing"}'])
def test_what_is_no_causal_model_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match="no causal language model"):
        empty_model(tmp_path)


def test_a_refusal_is_one_line_without_the_list_of_all_classes(tmp_path: Path) -> None:
    """But for the line in which a field's own error stands."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(BackboneError, match=r"T5Config.* AutoModelForCausalLM\.$") as refused:
        empty_model(tmp_path)
    assert "\n" not in str(refused.value)
    document = {**CONFIGS["llama"].to_dict(), "hidden_size": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(BackboneError, match=r"'hidden_size': TypeError: .* expected int, got str"):
        empty_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "abc"},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"hidden_act": "nothing"},
        {"vocab_size": -1},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    document = {**CONFIGS["llama"].to_dict(), "head_dim": None, **changes}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(BackboneError, match="no causal language model"):
        empty_model(tmp_path)
