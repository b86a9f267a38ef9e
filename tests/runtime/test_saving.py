"""A sparse model that was trained, written as it was loaded, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.errors import BackboneError, CheckpointError
from mergeroute.adapters.smoe.stored import TENSORS, read_report
from mergeroute.runtime.saving import save_trained

from ..moe import make_moe, save_moe
from ..tiny import make_model, make_prompt
from .test_merged_experts import GROUPED, SHARED, UNEVEN, loaded, merged_bank

BY_GROUPS = {"method": "random", "keep": 3, "router": "groups"}
COMPACT = {"method": "average", "keep": 3}
EXACT = {"method": "shared", "residuals": {"rank": 5, "rows": 0.1, "dtype": "float32"}}
FORMS: dict[str, dict[str, Any]] = {
    "shared": SHARED,
    "exact": EXACT,
    "grouped": GROUPED,
    "uneven": UNEVEN,
    "groups": BY_GROUPS,
    "compact": COMPACT,
}


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([make_prompt(30, seed=4)])).logits
    return logits


@torch.no_grad()
def train(model: Any) -> None:
    """Change every weight a little."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_the_trained_model(name: str, form: str, tmp_path: Path) -> None:
    source = merged_bank(name, FORMS[form], tmp_path).backbone.path
    model = loaded(source)
    before = logits_of(model)
    train(model)
    save_trained(model, source, tmp_path / "saved")
    found, expected = logits_of(loaded(tmp_path / "saved")), logits_of(model)
    scale = float(expected.abs().max())
    rounding = 5e-3 if form in ("shared", "grouped") else 1e-5  # residuals of int8 and bfloat16
    # of most tokens: rounding may send one at a tie to another expert
    assert float((found - expected).abs().amax(-1).median()) < rounding * scale
    assert float((found - before).abs().amax(-1).median()) > 2 * rounding * scale
    assert (
        Checkpoint.open(source).tensors.keys() == Checkpoint.open(tmp_path / "saved").tensors.keys()
    )
    report = read_report(tmp_path / "saved")
    assert report is not None
    assert report.is_recovered
    if report.router != "compact":
        one, other = (Checkpoint.of_file(f / TENSORS).tensors for f in (source, tmp_path / "saved"))
        assert {n: (i.shape, i.dtype) for n, i in one.items()} == {
            n: (i.shape, i.dtype) for n, i in other.items()
        }


@pytest.mark.parametrize("is_published", [True, False])
def test_a_model_that_is_not_merged_can_be_saved_too(is_published: bool, tmp_path: Path) -> None:
    make_moe(tie_word_embeddings=True).save_pretrained(
        tmp_path / "moe", save_original_format=is_published
    )
    model = loaded(tmp_path / "moe")
    train(model)
    save_trained(model, tmp_path / "moe", tmp_path / "saved")
    assert torch.equal(logits_of(loaded(tmp_path / "saved")), logits_of(model))


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    save_moe(make_moe(), tmp_path / "moe")
    model = loaded(tmp_path / "moe")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or inf"):
        save_trained(model, tmp_path / "moe", tmp_path / "saved")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "moe")
    with pytest.raises(BackboneError, match="no sparse mixture of experts"):
        save_trained(loaded(tmp_path / "moe"), tmp_path / "moe", tmp_path / "saved")
