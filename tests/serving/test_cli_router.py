"""The commands about routers: what they write, print and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import BankError, DataError, MergerouteError, RouterError
from mergeroute.routers.base import Decision, Query
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.settings import FixedSettings, TokenSettings
from mergeroute.routers.store import save_router
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.serving.cli import app
from mergeroute.serving.errors import UsageError
from mergeroute.serving.figures import shortfalls
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.router_evaluation import AnswerOptions, evaluate_router
from mergeroute.serving.router_report import abstaining_rate, explanation

from .conftest import WORDS, write_ruled_bank
from .test_fitting import none_rows, own_rows, written

PLACEMENT = Placement(device="cpu", dtype="float32")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    written(folder / "own.jsonl", own_rows())
    written(folder / "none.jsonl", none_rows())
    return folder


@pytest.fixture(scope="module")
def fitted(bank: Bank, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bank, and the report of its fit."""
    folder = tmp_path_factory.mktemp("fitted")
    files = ("--data", data / "own.jsonl", "--none", data / "none.jsonl")
    where = ("--out", folder / "bank", "--report", folder / "report", "--name", "fitted")
    signal = ("--signal", "layer=1,ngrams=64", "--device", "cpu")
    printed = run("router", "fit", bank.backbone.path.parent, *files, *where, *signal).stdout
    assert "prototype router fitted on 60 prompts of modules and 40 of none" in printed
    assert "accuracy 100.0 %" in printed
    return folder


def test_fit_writes_a_bank_and_its_report(fitted: Path) -> None:
    bank = Bank.open(fitted / "bank")
    assert bank.name == "fitted"
    document = json.loads((fitted / "report" / "report.json").read_text())
    assert document["router"]["signal"]["ngrams"] == 64
    assert document["prompts"] == {"own": 60, "none": 40, "equal": 0}
    held_out = document["held_out"]
    assert held_out["accuracy"] == held_out["kept"] == held_out["auroc"] == 1.0
    assert held_out["labels"] == ["upper", "digit", "none"]
    assert [point["samples"] for point in held_out["curve"]][:2] == [5, 10]
    pictures = {file.name for file in (fitted / "report").glob("*.png")}
    assert pictures == {"reliability.png", "confusion.png", "distances.png", "samples.png"}


def test_fit_takes_rules_a_scorer_and_a_policy(bank: Bank, data: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("[{module: digit, keyword: count}]")
    settings = ("--rules", tmp_path / "rules.yaml", "--scorer", "mlp")
    policy = ("--policy", "softmax | top_k(1) | quantise", "--force")
    (tmp_path / "new").mkdir()
    arguments = (*settings, *policy, "--data", data / "own.jsonl", "--out", tmp_path / "new")
    printed = run("router", "fit", bank.backbone.path.parent, *arguments).stdout
    assert "give some (docs/routers.md)" in printed
    said = json.loads((tmp_path / "new" / "router" / "router.json").read_text())
    assert [member["scorer"] for member in said["members"]] == ["rules", "mlp"]
    assert said["policy"] == "softmax | top_k(1) | quantise"


def test_eval_measures_through_the_server(fitted: Path, data: Path, tmp_path: Path) -> None:
    rows = [
        *(
            {"task": name, "prompt": f"{words} {k}"}
            for name, words in WORDS.items()
            for k in range(60, 65)
        ),
        {"task": "strange", "prompt": "who is 77?"},
    ]
    file = written(tmp_path / "test.jsonl", rows)
    output = ("--json", tmp_path / "eval.json", "--plot", tmp_path / "plots")
    none = ("--none", data / "none.jsonl", "--dtype", "float32")
    printed = run("router", "eval", fitted / "bank", "--data", file, *none, *output).stdout
    assert re.search(r"accuracy before abstention +│ +100.0 %", printed)
    assert "tasks of no module, counted as none: strange" in printed
    document = json.loads((tmp_path / "eval.json").read_text())
    assert (document["object"], document["own"], document["none"]) == ("router-evaluation", 10, 41)
    assert document["accuracy"] == 1.0
    assert document["kept"] == 1.0
    assert document["answers"] is None
    assert document["bank"]["digest"] == Bank.open(fitted / "bank").digest
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"reliability.png", "confusion.png", "distances.png"}


def test_answers_tell_what_the_router_loses(fitted: Path, tmp_path: Path) -> None:
    rows = [
        {"task": name, "prompt": f"{words} 7", "answer": "certainly not this"}
        for name, words in WORDS.items()
    ]
    rows.append({"task": "upper", "prompt": "shout the word 9"})
    file = written(tmp_path / "test.jsonl", rows)
    none = written(tmp_path / "none.jsonl", [{"prompt": "who is 3?", "answer": "nor this"}])
    found = evaluate_router(
        Bank.open(fitted / "bank"),
        file,
        none=none,
        answers=AnswerOptions(max_tokens=3),
        placement=PLACEMENT,
    )
    assert [(task.task, task.prompts) for task in found.own] == [("upper", 1), ("digit", 1)]
    assert [task.task for task in found.none] == ["none"]
    assert list(found.own[0].scores) == ["auto", "oracle", "backbone", "uniform"]
    assert found.own[0].regret == 0
    assert any("routing does not beat the backbone" in note for note in found.notes)
    assert any("does not beat uniform" in note for note in found.notes)
    assert found.document()["answers"]["means"][0]["regret"] == 0


def test_routing_that_pays_says_nothing() -> None:
    scores = {"auto": 90.0, "oracle": 95.0, "experts": 96.0, "backbone": 50.0, "ties": 90.0}
    (said,) = shortfalls(scores)
    assert "ties" in said
    assert "90.0 %" in said


def test_a_router_of_tokens_has_no_decision_to_judge(
    bank: Bank, data: Path, tmp_path: Path
) -> None:
    modules = [BankModule(entry.name, entry.path) for entry in bank.modules]
    arrow = write_bank(
        tmp_path / "bank",
        name="arrows",
        backbone=bank.backbone,
        modules=modules,
        write_router=lambda folder: save_router(folder, TokenSettings(scorer="arrow")),
    )
    found = evaluate_router(arrow, data / "own.jsonl", placement=PLACEMENT)
    assert (found.report.own, found.report.accuracy) == (0, None)
    assert any("token" in note for note in found.notes)
    printed = run("route", tmp_path / "bank", "hello", "--dtype", "float32").stdout
    assert "layers choose for every token" in printed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--data", "{tmp}/gone.jsonl"), DataError, "cannot be read"),
        (("--data", "{data}/none.jsonl"), DataError, "task is missing"),
        (("--data", "{data}/own.jsonl", "--answers"), DataError, "holds no answers"),
        (("--data", "{data}/own.jsonl", "--none", "{data}/own.jsonl"), DataError, "is a module's"),
        (("--data", "{data}/own.jsonl", "--plot", "{data}/own.jsonl/x"), MergerouteError, "made"),
        (("--data", "{data}/own.jsonl", "--json", "{tmp}/x/y"), MergerouteError, "in a folder"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(
    arguments: tuple[str, ...],
    error: type[MergerouteError],
    message: str,
    fitted: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    given = [text.format(tmp=tmp_path, data=data) for text in arguments]
    with pytest.raises(error, match=message):
        run("router", "eval", fitted / "bank", *given)


def test_a_bank_without_a_router_has_none_to_measure(
    bank: Bank, data: Path, tmp_path: Path
) -> None:
    write_bank(tmp_path / "bare", name="bare", backbone=bank.backbone, modules=[])
    with pytest.raises(BankError, match="has no router"):
        run("router", "eval", tmp_path / "bare", "--data", data / "own.jsonl")


def test_fit_refuses_what_it_is_told_wrongly(bank: Bank, data: Path, tmp_path: Path) -> None:
    path = bank.backbone.path.parent
    files = ("--data", data / "own.jsonl", "--out")
    with pytest.raises(RouterError, match="is not KEY=VALUE"):
        run("router", "fit", path, *files, tmp_path / "new", "--signal", "depth=3")
    with pytest.raises(BankError, match="banks do not change"):
        run("router", "fit", path, *files, path, "--force")
    with pytest.raises(BankError, match="is no bank"):
        run("router", "fit", tmp_path / "gone", *files, tmp_path / "new")
    with pytest.raises(UsageError, match="--policy is empty"):
        run("router", "fit", path, *files, tmp_path / "new", "--policy", " ")
    report = ("--report", tmp_path / "report")
    with pytest.raises(RouterError, match="'guess' is unknown"):
        run("router", "fit", path, *files, tmp_path / "new", *report, "--policy", "guess")
    with pytest.raises(UsageError, match=r"cannot be made: .*is no folder"):
        run("router", "fit", path, *files, tmp_path / "new", "--report", data / "own.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_all_keys_of_a_signal() -> None:
    shown = re.sub(r"[\s│]+", " ", run("router", "fit", "--help").stdout)
    assert "layer=3, pooling=last, ngrams=256, window=256, embedding=..., recency=0.5; def" in shown
    assert "twelfth of the layers." in shown


# Explanations.


def test_route_takes_the_labels_that_rules_look_at(tmp_path: Path, checkpoint: Backbone) -> None:
    write_ruled_bank(tmp_path / "bank", name="ruled", backbone=checkpoint)

    def blend(*labels: str) -> object:
        printed = run("route", tmp_path / "bank", "shout the word 7", *labels, "--json").stdout
        return json.loads(printed)["blend"]

    assert blend() == {"upper": 1.0}
    assert blend("--header", "X-Team=Digits") == {"digit": 1.0}
    assert blend("--metadata", "tier=iron", "--metadata", "a=b=c") == {}
    printed = run("route", tmp_path / "bank", "7", "--header", "x-team=Digits").stdout
    assert "rule 2 (header x-team 'Digits') matches" in printed
    for labels, message in (
        (("--header", "x-team=\udcff"), r"'x-team=\\udcff' is not UTF-8: convert it"),
        (("--header", "x-team"), "--header 'x-team' is not NAME=VALUE"),
        (("--metadata", "=x"), "--metadata '=x' is not NAME=VALUE"),
        (("--metadata", "a=1", "--metadata", "a=2"), "--metadata a is given twice"),
        (("--metadata", "header:x-team=Digits"), "stands for the request's headers"),
    ):
        with pytest.raises(MergerouteError, match=message):
            blend(*labels)


def test_route_explains(fitted: Path) -> None:
    def route(prompt: str) -> str:
        return run("route", fitted / "bank", prompt, "--dtype", "float32").stdout

    own = route("shout the word 77")
    assert "blend       upper=1" in own
    assert "below the threshold" in own
    assert "runner-up   digit" in own
    other = route("who is 99?")
    assert "blend       none (the backbone)" in other
    assert "above the threshold" in other
    assert "no module" in other
    assert "what would change it" in other


def lines(decision: Decision, rate: float | None) -> str:
    return "\n".join(explanation(decision, rate))


def decision(**changes: Any) -> Decision:
    fields: dict[str, Any] = {
        "blend": Blend({"a": 1.0}),
        "scores": {"a": 0.9, "b": 0.06},
        "distance": 3.0,
        "threshold": 5.0,
        "typicality": 0.04,
        "router": "prototype",
        "basis": {"a": "10 samples"},
    }
    return Decision(**{**fields, **changes})


def test_an_explanation_says_what_would_change_it() -> None:
    kept = lines(decision(), 0.04)
    assert "distance    3, 2 below the threshold 5" in kept
    assert "scores      a 0.9000, b 0.0600; no module 0.0400" in kept
    assert "basis       a: 10 samples" in kept
    assert "abstain(r) with r of 0.04 or more would leave it to the backbone" in kept
    assert "top_p(p) with p above 0.9375 would let b join" in kept
    left = lines(decision(blend=Blend(), threshold=2.0), 0.04)
    assert "1 above the threshold 2" in left
    assert "abstain(r) with r below 0.04 would give it to a" in left
    assert "top_p" not in left
    assert "every one keeps it" in lines(decision(), 1.0)
    assert "every one leaves it" in lines(decision(blend=Blend(), threshold=2.0), 0.0)
    assert "the policy has no abstain" in lines(decision(threshold=None), 0.5)
    assert "measures no distance" in lines(decision(distance=None, threshold=None), None)
    assert "a rule or a fixed blend decided" in lines(decision(is_certain=True), None)
    token = Decision(blend=Blend(), token_routing=TokenRouting("arrow"), router="arrow")
    assert "layers choose for every token" in lines(token, None)


def test_the_rate_that_flips_a_decision_is_the_one_that_does(fitted: Path) -> None:
    (hosted,) = host_banks([Bank.open(fitted / "bank")], PLACEMENT)
    try:
        router = hosted.router
        assert isinstance(router, RequestRouter)
        for text in ("shout the word 7", "shout the words", "0 1 shout", "who is 7?"):
            query = Query.of(tuple(hosted.tokenizer(text)["input_ids"]), text)
            rate = abstaining_rate(router, query)
            assert rate is not None
            for tried in (rate * 0.99, rate * 1.01):
                if 0 < tried < 1:
                    policy = Policy.parse(f"softmax | abstain({tried:f}) | quantise")
                    flipped = RequestRouter(router.scorer, policy).route(query)
                    assert (flipped.best is None) == (tried > rate)
    finally:
        hosted.engine.stop()


def test_nothing_flips_what_has_no_distance(bank: Bank, tmp_path: Path) -> None:
    modules = [BankModule(entry.name, entry.path) for entry in bank.modules]
    write_bank(
        tmp_path / "bank",
        name="fixed",
        backbone=bank.backbone,
        modules=modules,
        write_router=lambda folder: save_router(folder, FixedSettings(blend="upper=0.5")),
    )
    printed = run("route", tmp_path / "bank", "hello", "--dtype", "float32").stdout
    assert "blend       upper=0.5" in printed
    assert "a rule or a fixed blend decided" in printed
    document = json.loads(run("route", tmp_path / "bank", "hello", "--json").stdout)
    assert document["blend"] == {"upper": 0.5}
