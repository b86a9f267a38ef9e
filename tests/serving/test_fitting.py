"""Routers fitted on files: what is refused, what is measured, and what the server decides then."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, write_bank
from mergeroute.adapters.errors import BankError, DataError, MergerouteError, RouterError
from mergeroute.routers.data import read_examples
from mergeroute.routers.settings import EnsembleSettings, LearnedSettings, SignalSettings
from mergeroute.routers.store import read_settings
from mergeroute.runtime.loading import load_tokenizer
from mergeroute.serving.fitting import FittedRouter, fit_bank, query_of, read_prompts
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.router_options import (
    FitOptions,
    parse_signal,
    read_rules,
    usual_signal,
)
from mergeroute.serving.schemas.completions import ChatRequest
from mergeroute.serving.service import Service

from .conftest import WORDS

PLACEMENT = Placement(device="cpu", dtype="float32")
CERTAIN = "softmax | top_k(1) | quantise"
TOPICS = ("weather in", "who is", "recipe for", "sum of", "play", "way to", "price of", "bye")

Row = dict[str, Any]


def own_rows(count: int = 30) -> list[Row]:
    return [
        {"task": name, "prompt": f"{words} {k}"}
        for name, words in WORDS.items()
        for k in range(count)
    ]


def none_rows(count: int = 40) -> list[Row]:
    return [{"prompt": f"{TOPICS[k % len(TOPICS)]} {k}?"} for k in range(count)]


def written(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    written(folder / "own.jsonl", own_rows())
    written(folder / "none.jsonl", none_rows())
    return folder


def fit(bank: Bank, data: Path, out: Path, *, none: bool = True, **options: Any) -> FittedRouter:
    _, router = fit_bank(
        bank.backbone.path.parent,
        out,
        FitOptions(**options),
        data=data / "own.jsonl",
        none=data / "none.jsonl" if none else None,
        device="cpu",
    )
    return router


def decisions(path: Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """What a server of the bank decides."""
    service = Service(host_banks([Bank.open(path)], PLACEMENT))
    try:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        bodies = [ChatRequest.model_validate({"messages": each}) for each in messages]
        return [asyncio.run(service.preview(body)) for body in bodies]
    finally:
        service.stop()


@pytest.mark.parametrize("scorer", ["prototype", "mlp", "retriever"])
def test_a_server_of_the_new_bank_decides_by_the_new_router(
    scorer: Any, bank: Bank, data: Path, tmp_path: Path
) -> None:
    router = fit(bank, data, tmp_path / "new", scorer=scorer, policy=CERTAIN)
    new = Bank.open(tmp_path / "new")
    assert new.router_path is not None
    said = read_settings(new.router_path)
    assert isinstance(said, LearnedSettings)
    assert (said.scorer, said.backbone) == (scorer, bank.backbone.digest)
    assert bank.router_path is not None
    assert said.signal == usual_signal(bank.router_path)
    assert (router.own, router.none, router.equal) == (60, 40, 0)
    found = decisions(tmp_path / "new", [f"{words} 77" for words in WORDS.values()])
    assert [decision["blend"] for decision in found] == [{name: 1.0} for name in WORDS]
    assert {decision["router"] for decision in found} == {scorer}


def test_prompts_that_no_module_serves_are_left_alone(
    bank: Bank, data: Path, tmp_path: Path
) -> None:
    signal = SignalSettings(layer=1)
    router = fit(bank, data, tmp_path / "new", signal=signal)
    (decision,) = decisions(tmp_path / "new", ["who is 99?"])
    assert decision["blend"] == {}
    assert decision["distance"] > decision["threshold"]
    assert router.trial is not None
    assert router.trial.report.kept == 1.0
    assert router.trial.report.accuracy == 1.0
    assert router.trial.curve == ()
    assert (router.trial.report.own + router.trial.report.none) < 100 / 3
    json.dumps(router.document(), allow_nan=False)


def test_the_trial_has_a_curve_when_it_is_asked_for(bank: Bank, data: Path, tmp_path: Path) -> None:
    router = fit(bank, data, tmp_path / "new", with_curve=True)
    assert router.trial is not None
    assert [point.samples for point in router.trial.curve][:2] == [5, 10]
    assert router.trial.curve[-1].is_all


def test_too_few_prompts_to_measure_are_enough_to_fit(bank: Bank, tmp_path: Path) -> None:
    written(tmp_path / "own.jsonl", own_rows(5))
    router = fit(bank, tmp_path, tmp_path / "new", none=False)
    assert router.trial is None
    assert decisions(tmp_path / "new", [f"{WORDS['digit']} 2"])[0]["router"] == "prototype"


def test_equal_prompts_are_counted_and_count_once(bank: Bank, data: Path, tmp_path: Path) -> None:
    written(tmp_path / "own.jsonl", own_rows() * 2)
    router = fit(bank, tmp_path, tmp_path / "twice", none=False)
    assert (router.own, router.equal) == (60, 60)
    fit(bank, data, tmp_path / "once", none=False)
    files = [tmp_path / name / "router" / "scorer.safetensors" for name in ("once", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rules_go_before_what_is_learned(bank: Bank, data: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "- {module: digit, keyword: count}\n- {regex: '^[A-Z]+$'}\n"
    )
    rules = read_rules(tmp_path / "rules.yaml")
    router = fit(bank, data, tmp_path / "new", rules=rules)
    assert isinstance(router.settings, EnsembleSettings)
    said = decisions(tmp_path / "new", ["count shout the word 3", "HELLO", "shout the word 3"])
    assert [decision["blend"] for decision in said] == [{"digit": 1.0}, {}, {"upper": 1.0}]
    assert "rule 1 (keyword 'count') matches" in said[0]["reason"]
    assert {decision["router"] for decision in said} == {"ensemble"}
    again = fit(Bank.open(tmp_path / "new"), data, tmp_path / "plain")
    assert isinstance(again.settings, LearnedSettings)
    assert again.settings.signal == usual_signal(tmp_path / "new" / "router")


def test_a_conversation_is_its_last_turn(bank: Bank, tmp_path: Path) -> None:
    rows = [
        {
            "task": row["task"],
            "messages": [
                {"role": "user", "content": f"hello {k}"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": row["prompt"]},
            ],
        }
        for k, row in enumerate(own_rows())
    ]
    written(tmp_path / "own.jsonl", rows)
    fit(bank, tmp_path, tmp_path / "new", none=False, policy=CERTAIN)
    (decision,) = decisions(tmp_path / "new", [f"{WORDS['upper']} 77"])
    assert decision["blend"] == {"upper": 1.0}


Change = Callable[[list[Row], list[Row]], None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda own, none: own.append({"task": "x", "prompt": "y"}),
            DataError,
            "line 61: task 'x'",
        ),
        (lambda own, none: own.append({"prompt": "y"}), DataError, "line 61: task is missing"),
        (
            lambda own, none: own.__delitem__(slice(30, 60)),
            DataError,
            "no prompt of module 'digit'",
        ),
        (lambda own, none: own.__delitem__(slice(34, 60)), RouterError, "'digit' has 4 prompts"),
        (
            lambda own, none: own.append({**own[0], "task": "digit"}),
            DataError,
            r"line 61: .* given for 'digit', and in .*line 1 for 'upper': decide for one",
        ),
        (
            lambda own, none: none.append({"prompt": own[3]["prompt"]}),
            DataError,
            r"none.jsonl, line 41: .* for no module, and in .*own.jsonl, line 4 for 'upper'",
        ),
        (
            lambda own, none: none.append({"task": "digit", "prompt": "y"}),
            DataError,
            r"none.jsonl, line 41: task 'digit' is a module's: move the line to data, or drop",
        ),
        (lambda own, none: own.append({"task": "upper", "prompt": " \n"}), DataError, "is blank"),
        (lambda own, none: own.append({"task": "upper", "prompt": ""}), DataError, "not empty"),
        (lambda own, none: own.append({"task": "upper", "prompt": 7}), DataError, "line 61"),
        (lambda own, none: none.__delitem__(slice(3, 40)), RouterError, "3 prompts that no module"),
        (lambda own, none: none.clear(), DataError, "holds no examples"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_and_nothing_is_written(
    change: Change, error: type[MergerouteError], message: str, bank: Bank, tmp_path: Path
) -> None:
    own, none = own_rows(), none_rows()
    change(own, none)
    written(tmp_path / "own.jsonl", own)
    written(tmp_path / "none.jsonl", none)
    with pytest.raises(error, match=message):
        fit(bank, tmp_path, tmp_path / "deep" / "new")
    assert not (tmp_path / "deep").exists()


def test_a_prompt_of_none_is_of_no_module_that_was_folded_either(tmp_path: Path) -> None:
    own = written(tmp_path / "own.jsonl", [{"task": "letters", "prompt": "x"}])
    none = written(tmp_path / "none.jsonl", [{"task": "upper", "prompt": "y"}])
    homes = {"letters": "letters", "upper": "letters"}
    with pytest.raises(DataError, match=r"none\.jsonl, line 1: task 'upper' is a module's"):
        read_prompts(own, none, homes.get, modules=["letters"])
    found = read_prompts(own, none, {"letters": "letters"}.get, modules=["letters"])
    assert [module for _, module in found] == ["letters", None]


def test_a_long_prompt_is_fitted_on_without_a_word(
    bank: Bank, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(bank.backbone.path)
    tokenizer.model_max_length = 64
    (line,) = read_examples(written(tmp_path / "long.jsonl", [{"prompt": "x" * 300}]))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        assert len(query_of(tokenizer, line).token_ids) >= 300
    assert caplog.text == ""


def test_a_file_that_is_no_utf_8_is_refused(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(b'{"task": "upper", "prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"own\.jsonl, line 1"):
        fit(bank, tmp_path, tmp_path / "new", none=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "softmax | guess"}, "policy step 'guess' is unknown"),
        ({"signal": SignalSettings(layer=9)}, "layer 9 does not exist"),
    ],
)
def test_options_that_fit_nothing_are_refused(
    options: dict[str, Any], message: str, bank: Bank, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RouterError, match=message):
        fit(bank, data, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_rule_for_an_absent_module_is_refused(bank: Bank, data: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("[{module: gone, keyword: x}]")
    rules = read_rules(tmp_path / "rules.yaml")
    with pytest.raises(RouterError, match="a rule names 'gone', which is no module: upper, digit"):
        fit(bank, data, tmp_path / "new", rules=rules)


def test_a_bank_without_modules_has_nothing_to_choose(
    checkpoint: Backbone, data: Path, tmp_path: Path
) -> None:
    bare = write_bank(tmp_path / "bare", name="bare", backbone=checkpoint, modules=[])
    with pytest.raises(BankError, match="has no modules"):
        fit(bare, data, tmp_path / "new")


# What is said.

USUAL = SignalSettings(layer=3, ngrams=64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layer=2", {"layer": 2}),
        ("layer=2+3, pooling=both", {"layer": (2, 3), "pooling": "both"}),
        ("layer=none", {"layer": ()}),
        ("ngrams=none,window=128", {"ngrams": 0, "window": 128}),
        ("embedding=owner/model,recency=0.5", {"embedding": "owner/model", "recency": 0.5}),
        ("recency=none", {"recency": None}),
    ],
)
def test_a_signal_is_read_on_top_of_the_usual_one(text: str, expected: dict[str, Any]) -> None:
    assert parse_signal(text, USUAL) == USUAL.model_copy(update=expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layr=2", "'layr=2' is not KEY=VALUE with a key of layer, pooling"),
        ("layer", "'layer' is not KEY=VALUE"),
        ("", "is not KEY=VALUE"),
        ("layer=2,layer=3", "layer is given twice"),
        ("layer=two", "layer 'two'"),
        ("layer=0", "counted from 1"),
        ("layer=none,ngrams=0", "reads nothing"),
        ("pooling=max", "pooling 'max'"),
        ("recency=1", "recency '1'"),
        ("window=1", "window '1'"),
    ],
)
def test_a_signal_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(RouterError, match=message):
        parse_signal(text, USUAL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a: [b", r"cannot be read: line 1, column 8: expected ',' or '\]', but got [^\n]*$"),
        ("- \x01", r"cannot be read: unacceptable character #x0001[^\n]*$"),
        ("[" * 9999, "cannot be read: it is nested too deeply"),
        ("[]", "no list of rules"),
        ("a: b", "no list of rules"),
        (
            "- {module: a, keywrd: x}",
            "rule 1: the key 'keywrd' is unknown: module, keyword, regex, metadata, header are",
        ),
        ("- {module: a, keyword: x}\n- 3", "rule 2 is 3: write {module"),
        ("- {header: {x: 3}}", "rule 1: header.x is 3: "),
        ("- {module: a}", r"rules.yaml: rule 1 cannot be used: it has no condition"),
        ("- {module: a, header: {Cookie: x}}", "rule 1 cannot be used: header cookie holds a"),
    ],
)
def test_rules_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(RouterError, match=message):
        read_rules(tmp_path / "rules.yaml")


def test_a_file_of_rules_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match=r"nothing\.yaml cannot be read: No such file[^/]*$"):
        read_rules(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes("- {module: a, keyword: ü}".encode("latin-1"))
    with pytest.raises(RouterError, match="cannot be read: it is not UTF-8: convert it"):
        read_rules(tmp_path / "latin.yaml")


def test_the_usual_signal_is_the_routers_own(bank: Bank, tmp_path: Path) -> None:
    assert bank.router_path is not None
    said = read_settings(bank.router_path)
    assert isinstance(said, LearnedSettings)
    assert usual_signal(bank.router_path) == said.signal
    assert usual_signal(None) == usual_signal(tmp_path) == SignalSettings()
    assert FitOptions().with_signal(USUAL, layers=36).signal == USUAL
    assert [
        FitOptions(signal=SignalSettings()).with_signal(USUAL, layers=count).signal
        for count in (1, 12, 36)
    ] == [SignalSettings(layer=layer) for layer in (1, 1, 3)]
