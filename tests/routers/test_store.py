"""Routers on disk, and whole routers over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query
from mergeroute.routers.prototype import Prototype
from mergeroute.routers.signals import HiddenState
from mergeroute.routers.store import (
    CONFIG_FILE,
    TENSORS_FILE,
    PrototypeSettings,
    SignalSettings,
    load_router,
    modules_of,
    rename_modules,
    save_fixed,
    save_prototype,
)
from mergeroute.routers.training import Labelled, evaluate, fit_prototype

SETTINGS = PrototypeSettings(
    modules=("low", "high"),
    signal=SignalSettings(layer=1, pooling="mean"),
    policy="softmax | top_k(1) | abstain(0.01) | quantise",
)


def encode(token_ids: tuple[int, ...], layer: int) -> Tensor:
    """A stand-in for a backbone: tokens as they are, beside a fixed jitter."""
    states = torch.tensor([[t, (t * 7919 % 13) / 13, layer] for t in token_ids])
    return states.float()


def example(token: int, module: str | None) -> Labelled:
    return Labelled(Query((token, token + 1)), module)


EXAMPLES = [example(k, "low") for k in range(20)] + [example(100 + k, "high") for k in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_prototype(tmp_path, fit_prototype(EXAMPLES, SETTINGS, encode=encode), SETTINGS)
    return tmp_path


def test_a_router_comes_back_from_disk_as_it_was(folder: Path) -> None:
    router = load_router(folder, encode=encode)
    fitted = fit_prototype(EXAMPLES, SETTINGS, encode=encode)
    assert isinstance(router.scorer, Prototype)
    assert router.scorer.calibration == fitted.calibration
    assert torch.equal(router.scorer.means, fitted.means)
    assert modules_of(folder) == ("low", "high")
    decision = router.route(Query((105, 106)))
    assert decision.blend == Blend({"high": 1.0})
    assert decision.router == "prototype"
    assert decision.confidence > 0.99
    assert decision.runner_up == "low"
    assert decision.abstained == 0
    assert decision.milliseconds > 0
    assert router.route(Query((105, 106))).scores == decision.scores


def test_a_far_prompt_abstains_but_keeps_its_scores(folder: Path) -> None:
    decision = load_router(folder, encode=encode).route(Query((5000, 5001)))
    assert decision.blend == Blend()
    assert decision.abstained == 1
    assert set(decision.scores) == {"low", "high"}
    assert decision.threshold is not None


def test_evaluation_counts_right_rejected_and_kept(folder: Path) -> None:
    router = load_router(folder, encode=encode)
    wrong = example(103, "low")
    report = evaluate(router, [*EXAMPLES, wrong, example(9000, None), example(5, None)])
    assert report.accuracy == pytest.approx(40 / 41, abs=0.03)
    assert report.rejected <= 0.05
    assert report.kept == 0.5


def test_the_digest_follows_the_content(folder: Path, tmp_path: Path) -> None:
    before = load_router(folder, encode=encode).digest
    assert load_router(folder, encode=encode).digest == before
    settings = json.loads((folder / CONFIG_FILE).read_text())
    settings["policy"] = "softmax(2) | quantise"
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    assert load_router(folder, encode=encode).digest != before


def test_a_fixed_router_gives_its_blend_to_every_prompt(tmp_path: Path) -> None:
    save_fixed(tmp_path, Blend({"a": 0.75, "b": -0.25}))
    decision = load_router(tmp_path, encode=encode).route(Query((1,)))
    assert decision.blend == Blend({"a": 0.75, "b": -0.25})
    assert decision.router == "fixed"
    assert modules_of(tmp_path) == ("a", "b")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (CONFIG_FILE, b"{", "router.json"),
        (CONFIG_FILE, b'{"scorer": "oracle"}', "router.json"),
        (CONFIG_FILE, b'{"scorer": "prototype", "modules": [], "x": 1}', "router.json"),
        (CONFIG_FILE, b'{"scorer": "fixed", "blend": "a"}', "blend"),
        (TENSORS_FILE, b"not safetensors", "damaged"),
    ],
)
def test_a_damaged_router_is_an_error_that_names_the_file(
    folder: Path, file: str, content: bytes, words: str
) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(RouterError, match=words):
        load_router(folder, encode=encode)


def test_tensors_of_another_router_are_refused(folder: Path) -> None:
    settings = json.loads((folder / CONFIG_FILE).read_text())
    settings["modules"] = ["low", "middle", "high"]
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(RouterError, match="do not fit 3 modules"):
        load_router(folder, encode=encode)


def test_signals_pool_over_the_prompt_alone() -> None:
    query = Query((3, 5, 10))
    assert HiddenState(encode, 1, "mean").read(query)[0] == 6
    assert HiddenState(encode, 1, "last").read(query)[0] == 10
    with pytest.raises(RouterError, match="pooling"):
        HiddenState(encode, 1, "max")
    with pytest.raises(RouterError, match="layer 0"):
        HiddenState(encode, 0)


def test_renamed_modules_get_what_the_old_names_had(folder: Path) -> None:
    before = load_router(folder, encode=encode)
    rename_modules(folder, {"low": "all", "other": "unknown"})
    once = load_router(folder, encode=encode)
    assert modules_of(folder) == ("all", "high")
    assert once.digest != before.digest
    decision = once.route(Query((5, 6)))
    assert decision.blend == Blend({"all": 1.0})
    assert list(decision.scores) == ["all", "high"]
    assert decision.reason.endswith("; low is folded into all")
    assert "folded" not in once.route(Query((105, 106))).reason
    assert once.route(Query((5000, 5001))).blend == Blend()
    rename_modules(folder, {"all": "both", "high": "both"})
    assert json.loads((folder / CONFIG_FILE).read_text())["renamed"] == {
        "low": "both",
        "high": "both",
    }
    assert modules_of(folder) == ("both",)
    decision = load_router(folder, encode=encode).route(Query((5, 6)))
    assert decision.blend == Blend({"both": 1.0})
    assert decision.scores == {"both": pytest.approx(1.0)}
    assert decision.confidence == pytest.approx(1.0)
    assert decision.runner_up is None


def test_weights_that_meet_under_one_name_add_up(tmp_path: Path) -> None:
    save_fixed(tmp_path, Blend({"a": 0.75, "b": -0.25, "c": 1}))
    rename_modules(tmp_path, {"a": "ab", "b": "ab"})
    decision = load_router(tmp_path, encode=encode).route(Query((1,)))
    assert decision.blend == Blend({"ab": 0.5, "c": 1})
    assert decision.scores == {"ab": 0.5, "c": 1}
    save_fixed(tmp_path, Blend({"a": 6, "b": 6}))
    with pytest.raises(RouterError, match="add up beyond"):
        rename_modules(tmp_path, {"a": "ab", "b": "ab"})


def test_a_router_that_was_not_renamed_says_nothing_of_it(folder: Path) -> None:
    assert "renamed" not in json.loads((folder / CONFIG_FILE).read_text())
    before = load_router(folder, encode=encode)
    rename_modules(folder, {})
    assert load_router(folder, encode=encode).digest == before.digest
    settings = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**settings, "renamed": {"middle": "x"}}))
    with pytest.raises(RouterError, match="'middle', which is none of modules"):
        load_router(folder, encode=encode)
