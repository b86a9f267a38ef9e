"""Evaluation against reference models with merged weights; the command as users run it."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.backbone import Backbone, linear_layers
from mergeroute.adapters.bank import Bank, BankModule
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.build import build
from mergeroute.adapters.digest import file_digest
from mergeroute.adapters.errors import BankError, DataError, RecipeError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.recipe import Recipe
from mergeroute.routers.base import Query
from mergeroute.routers.data import read_examples
from mergeroute.routers.loading import load_router
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.cli import DEMO_BANK, main
from mergeroute.serving.eval_plot import plot_report
from mergeroute.serving.evaluation import EvalOptions, evaluate
from mergeroute.serving.figures import BACKBONE, EXPERTS, Figures, Report, mean_of
from mergeroute.serving.hosting import Placement
from mergeroute.serving.scoring import MetricName
from mergeroute.serving.variants import recorded_recipe, static_recipe

from ..tiny import make_model, make_module, make_tokenizer, reference_tokens
from .conftest import WORDS, chat_ids, write_checkpoint

PLACEMENT = Placement(dtype="float32")
MAX_TOKENS = 4
LABELS = EvalOptions(metric=MetricName.ACCURACY, max_tokens=MAX_TOKENS)
TEST_SET = Path(__file__).parents[2] / "examples" / "zoo" / "test.jsonl"


def load(path: Path) -> Any:
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


def said(backbone: Backbone, model: Any, prompt: str, modules: Mapping[str, Module] = {}) -> str:
    """What a model answers with modules merged into its weights."""
    blend = Blend(dict.fromkeys(modules, 1.0))
    tokens = reference_tokens(model, modules, blend, chat_ids(backbone, prompt), MAX_TOKENS)
    text: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
    return text


def written(file: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def figures(report: Report, task: str) -> Figures:
    return next(row for row in (*report.tasks, *report.generic) if row.task == task)


def decisions(bank: Bank, data: Path, task: str) -> list[Blend]:
    """What the bank's router decides for the prompts of a task."""
    assert bank.router_path is not None
    examples = [example for example in read_examples(data) if example.task == task]
    with TorchEngine.load(bank.backbone.path, dtype="float32") as engine:
        router = load_router(bank.router_path, encode=engine.encode, backbone=bank.backbone.digest)
        queries = [
            Query.of(chat_ids(bank.backbone, example.prompt), example.prompt)
            for example in examples
        ]
        return [router.route(query).blend for query in queries]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, bank: Bank) -> Path:
    """Six prompts a module, answered as the merged model does, the last two wrong; four of no
    module's, answered as the backbone does.
    """
    model = load(bank.backbone.path)
    rows: list[dict[str, object]] = []
    for entry in bank.modules:
        module = {entry.name: bank.load(entry)}
        for k in range(6):
            prompt = f"{WORDS[entry.name]} {50 + k}"
            answer = said(bank.backbone, model, prompt, module) if k < 4 else "wrong!"
            rows.append({"task": entry.name, "prompt": prompt, "answer": answer, "wording": "x"})
    for k in range(4):
        prompt = f"zzz {k}"
        rows.append({"task": "zzz", "prompt": prompt, "answer": said(bank.backbone, model, prompt)})
    return written(tmp_path_factory.mktemp("data") / "test.jsonl", rows)


def test_scores_are_those_of_the_merged_models(bank: Bank, data: Path) -> None:
    options = EvalOptions(metric=MetricName.ACCURACY, max_tokens=MAX_TOKENS, oracle=True)
    report = evaluate(bank, data, options, placement=PLACEMENT)
    assert [row.task for row in report.tasks] == list(WORDS)
    for task in WORDS:
        row, decided = figures(report, task), decisions(bank, data, task)
        assert (row.prompts, row.failed, row.normalised) == (6, 0, None)
        assert row.scores["oracle"] == pytest.approx(100 * 4 / 6)
        assert row.scores[BACKBONE] == 0
        right = sum(blend == Blend({task: 1.0}) for blend in decided[:4])
        assert row.scores["auto"] == pytest.approx(100 * right / 6)
        routed = sum(blend == Blend({task: 1.0}) for blend in decided)
        assert row.routed == pytest.approx(100 * routed / 6)
        assert row.abstained == pytest.approx(100 * sum(not blend for blend in decided) / 6)
        assert routed >= 4
    weights = bank.modules[0].path / "adapter_model.safetensors"
    assert report.tasks[0].module_bytes == weights.stat().st_size
    assert report.mean is not None
    assert report.mean.prompts == 12
    assert report.mean.scores["oracle"] == pytest.approx(100 * 4 / 6)


def test_tasks_that_no_module_serves_stand_apart(bank: Bank, data: Path) -> None:
    report = evaluate(bank, data, LABELS, placement=PLACEMENT)
    assert [row.task for row in report.generic] == ["zzz"]
    (row,) = report.generic
    assert row.scores[BACKBONE] == 100
    assert (row.routed, row.module_bytes) == (None, None)
    assert row.abstained is not None
    assert "oracle" not in report.systems


def test_a_run_is_repeated_to_the_last_figure(bank: Bank, data: Path) -> None:
    first, second = (evaluate(bank, data, LABELS, placement=PLACEMENT) for _ in range(2))
    assert first.document() == second.document()
    document = json.loads(json.dumps(first.document()))
    assert document["bank"]["digest"] == bank.digest
    assert document["data"]["digest"] == file_digest(data)
    assert document["data"]["unused_keys"] == ["wording"]
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    assert "torch" in document["versions"]


def test_limit_takes_the_first_prompts_of_each_task(bank: Bank, data: Path) -> None:
    options = EvalOptions(metric=MetricName.ACCURACY, max_tokens=MAX_TOKENS, limit=3)
    report = evaluate(bank, data, options, placement=PLACEMENT)
    assert [row.prompts for row in (*report.tasks, *report.generic)] == [3, 3, 3]
    assert figures(report, "upper").scores["auto"] == 100


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, checkpoint: Backbone) -> Bank:
    """A bank of a full expert and a LoRA expert, at full rank: pinned modules are the experts."""
    folder = tmp_path_factory.mktemp("built")
    full = load(checkpoint.path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, shape in linear_layers(full).items():
            full.get_submodule(name).weight += 0.2 * torch.randn(shape, generator=generator)
    full.save_pretrained(folder / "upper")
    make_tokenizer().save_pretrained(folder / "upper")
    make_module(make_model(), "digit", seed=4).save(folder / "digit")
    recipe = {
        "name": "built",
        "base": str(checkpoint.path),
        "experts": [{"name": name, "path": str(folder / name)} for name in WORDS],
        "backbone": {"method": "average"},
        "modules": {"method": "svd", "rank": 32, "dtype": "float32"},
        "dtype": "float32",
    }
    return build(Recipe.model_validate(recipe), folder / "bank")


def average_of(base: Any, full: Any, lora: Module) -> Any:
    """The mean of a full expert and a LoRA expert, from the definition."""
    averaged = copy.deepcopy(base)
    with torch.no_grad():
        for name in linear_layers(base):
            delta = full.get_submodule(name).weight - base.get_submodule(name).weight
            if name in lora.deltas:
                delta = delta + lora.deltas[name].dense()
            averaged.get_submodule(name).weight += delta / 2
    return averaged


def test_experts_and_merges_are_measured_beside_the_bank(
    built: Bank, checkpoint: Backbone, tmp_path: Path
) -> None:
    assert built.recipe is not None
    paths = {entry["name"]: Path(entry["path"]) for entry in built.recipe["experts"]}
    base, full = load(checkpoint.path), load(paths["upper"])
    digit = Module.load(paths["digit"], name="digit", layers=checkpoint.shapes)
    averaged = average_of(base, full, digit)
    rows, expected = [], []
    for k in range(4):
        shout, count = f"{WORDS['upper']} {k}", f"{WORDS['digit']} {k}"
        answer = said(checkpoint, averaged, count)
        rows.append({"task": "upper", "prompt": shout, "answer": said(checkpoint, full, shout)})
        rows.append({"task": "digit", "prompt": count, "answer": answer})
        expected.append(said(checkpoint, base, count, {"digit": digit}) == answer)
    options = EvalOptions(
        metric=MetricName.ACCURACY,
        max_tokens=MAX_TOKENS,
        oracle=True,
        experts=True,
        compare=("average", "task_arithmetic:scale=0.5"),
    )
    file = written(tmp_path / "data.jsonl", rows)
    report = evaluate(built, file, options, placement=PLACEMENT)
    upper, lora = figures(report, "upper"), figures(report, "digit")
    assert upper.scores[EXPERTS] == upper.scores["oracle"] == 100
    assert upper.normalised is not None
    assert upper.normalised["oracle"] == 100
    assert upper.normalised[BACKBONE] == upper.scores[BACKBONE]
    assert lora.scores[EXPERTS] == lora.scores["oracle"] == 25 * sum(expected)
    for merge in (BACKBONE, "average", "task_arithmetic:scale=0.5"):
        assert lora.scores[merge] == 100, merge
    assert (lora.normalised is None) == (report.left_out == ("digit",)) == (sum(expected) == 0)
    size = (paths["upper"] / "model.safetensors").stat().st_size
    assert (upper.expert_bytes, upper.routed) == (size, None)
    assert any("no router" in note for note in report.notes)


@pytest.mark.parametrize("name", ["upper", "digit", "base"])
@pytest.mark.parametrize(
    "options", [EvalOptions(experts=True), EvalOptions(compare=("average",), limit=1)]
)
def test_sources_that_are_no_longer_what_the_bank_was_built_from_are_refused(
    name: str, options: EvalOptions, built: Bank, data: Path
) -> None:
    assert set(built.sources) == {"base", "upper", "digit"}
    changed = replace(built, sources={**built.sources, name: "sha256:0"})
    assert built.recipe is not None
    paths = {entry["name"]: entry["path"] for entry in built.recipe["experts"]}
    path = paths.get(name, built.recipe["base"])
    with pytest.raises(BankError, match=f"{name}.* at {path} has digest .*, .* from sha256:0: put"):
        evaluate(changed, data, options, placement=PLACEMENT)


def test_an_expert_that_was_replaced_on_disk_is_refused(
    checkpoint: Backbone, data: Path, tmp_path: Path
) -> None:
    for name, seed in (("upper", 1), ("digit", 2)):
        make_module(make_model(), name, seed=seed).save(tmp_path / name)
    recipe = {
        "base": str(checkpoint.path),
        "experts": [{"name": name, "path": str(tmp_path / name)} for name in WORDS],
    }
    bank = build(Recipe.model_validate(recipe), tmp_path / "bank")
    options = EvalOptions(max_tokens=1, experts=True, limit=1)
    assert EXPERTS in evaluate(bank, data, options, placement=PLACEMENT).systems
    make_module(make_model(), "digit", seed=3).save(tmp_path / "digit")
    with pytest.raises(BankError, match=r"expert 'digit' at .*digit has digest .*build the bank"):
        evaluate(bank, data, options, placement=PLACEMENT)


def test_static_merges_treat_kinds_as_the_bank_does(built: Bank) -> None:
    assert built.recipe is not None
    kinds = {"norm": "drop", "bias": "exact"}
    recipe = recorded_recipe(replace(built, recipe={**built.recipe, "kinds": kinds}))
    assert recipe is not None
    assert static_recipe(recipe, "ties").kinds.model_dump(exclude_unset=True) == kinds


def test_a_task_whose_expert_scores_zero_is_left_out_of_the_normalised_mean() -> None:
    good = Figures("a", 2, {EXPERTS: 50.0, "auto": 40.0}, {EXPERTS: 100.0, "auto": 80.0})
    bad = Figures("b", 3, {EXPERTS: 0.0, "auto": 20.0})
    mean = mean_of([good, bad], "mean")
    assert mean is not None
    assert mean.scores == {EXPERTS: 25.0, "auto": 30.0}
    assert mean.normalised == {EXPERTS: 100.0, "auto": 80.0}
    assert (mean.prompts, mean.routed, mean.module_bytes) == (5, None, None)
    assert mean_of([], "mean") is None


def test_an_answer_the_engine_gives_up_on_scores_zero_and_is_counted(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    make_module(make_model(), "wild", scale=1e18).save(tmp_path / "wild")
    wild = Bank.adhoc("wilds", checkpoint, [BankModule("wild", tmp_path / "wild")])
    row = {"task": "wild", "prompt": "x", "answer": "y"}
    options = EvalOptions(max_tokens=MAX_TOKENS, oracle=True)
    file = written(tmp_path / "data.jsonl", [row, row])
    report = evaluate(wild, file, options, placement=PLACEMENT)
    assert figures(report, "wild").failed == 2
    assert figures(report, "wild").scores["oracle"] == 0


def test_without_a_chat_template_prompts_go_as_texts(tmp_path: Path) -> None:
    backbone = write_checkpoint(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    plain = Bank.adhoc("texts", Backbone.open(tmp_path / "plain"), [])
    tokens = make_tokenizer()("once upon")["input_ids"]
    reference = reference_tokens(load(backbone.path), {}, Blend(), tokens, MAX_TOKENS)
    answer = make_tokenizer().decode(reference, skip_special_tokens=True)
    rows: list[dict[str, object]] = [{"task": "t", "prompt": "once upon", "answer": answer}]
    report = evaluate(plain, written(tmp_path / "a.jsonl", rows), LABELS, placement=PLACEMENT)
    assert figures(report, "t").scores["auto"] == 100
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2
    rows.append({"task": "t", "messages": turns})
    file = written(tmp_path / "b.jsonl", rows)
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: this backbone has no chat template"):
        evaluate(plain, file, LABELS, placement=PLACEMENT)


def test_the_limit_gives_way_to_the_context_and_a_long_prompt_is_named(
    bank: Bank, tmp_path: Path
) -> None:
    rows = [{"task": "upper", "prompt": "x" * 225, "answer": "y"}]
    options = EvalOptions(max_tokens=200)
    file = written(tmp_path / "a.jsonl", rows)
    assert evaluate(bank, file, options, placement=PLACEMENT).tasks[0].failed == 0
    file = written(tmp_path / "b.jsonl", [*rows, {**rows[0], "prompt": "x" * 999}])
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: the prompt is .* tokens, the limit"):
        evaluate(bank, file, options, placement=PLACEMENT)


def test_what_was_built_from_nothing_known_has_no_experts(bank: Bank, data: Path) -> None:
    for options in (EvalOptions(experts=True), EvalOptions(compare=("ties",))):
        with pytest.raises(BankError, match="leave out --experts and --compare"):
            evaluate(bank, data, options, placement=PLACEMENT)


def test_a_damaged_record_of_the_recipe_is_refused(built: Bank, data: Path) -> None:
    damaged = replace(built, recipe={"base": "x", "experts": []})
    with pytest.raises(BankError, match="damaged at 'experts'"):
        evaluate(damaged, data, EvalOptions(experts=True), placement=PLACEMENT)


def test_data_of_other_tasks_alone_is_all_generic_and_says_so(bank: Bank, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [{"task": "zzz", "prompt": "x", "answer": "y"}])
    options = EvalOptions(max_tokens=MAX_TOKENS, oracle=True)
    report = evaluate(bank, file, options, placement=PLACEMENT)
    assert (report.tasks, report.mean) == ((), None)
    assert any("all count as generic" in note for note in report.notes)
    assert any("without prompts in the data: upper, digit" in note for note in report.notes)
    for name in ("a.svg", "b.svg"):
        plot_report(report, tmp_path / name)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert len(list(report.tables())) == 2


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("nonsense", "'nonsense' is unknown"),
        ("ties:density=2", "density"),
        ("ties:rank=2", "rank is no parameter of method ties"),
        ("ties:density", "write METHOD:NAME=VALUE"),
        ("ties:density=[", "is no value"),
        ("fisher", "calibration"),
    ],
)
def test_a_merge_that_cannot_be_built_is_refused_first(
    built: Bank, data: Path, method: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        evaluate(built, data, EvalOptions(compare=(method,)), placement=PLACEMENT)


def run_here(arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the command, run in this process to save its start."""
    monkeypatch.setattr(sys, "argv", ["mergeroute", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_eval_of_the_demo_bank_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", DEMO_BANK, "--data", TEST_SET, "--limit", 3, "--oracle")
    outputs = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "scores.png")
    assert run_here((*arguments, *outputs), monkeypatch) == 0
    printed = capsys.readouterr()
    assert "generic mean" in printed.out
    assert "normalised scores are absent: they need --experts" in printed.out
    assert printed.err == ""  # no bars off a terminal
    document = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert (len(document["tasks"]), len(document["generic"])) == (8, 8)
    assert document["data"]["prompts"] == 48
    mean = document["mean"]
    assert mean["scores"]["oracle"] > mean["scores"][BACKBONE]
    assert mean["scores"]["oracle"] >= 90
    assert mean["routed"] >= 90
    assert mean["module_percent"] == pytest.approx(9.6, abs=0.1)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_fault_of_the_input_is_one_message_and_status_1(
    bank: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = bank.backbone.path.parent
    file = written(tmp_path / "data.jsonl", [{"task": "upper", "prompt": "x"}])
    cases: list[tuple[Sequence[object], int, str]] = [
        ((path, "--data", file), 1, "line 1: answer is missing or blank"),
        ((path, "--data", tmp_path / "none"), 1, "cannot be read"),
        ((tmp_path, "--data", file), 1, "is no bank"),
        ((path, "--data", file, "--plot", tmp_path / "a.jpg"), 1, ".png, .svg, .pdf"),
        ((path, "--data", file, "--plot", tmp_path / "no" / "a.png"), 1, "make the folder"),
        ((path, "--data", file, "--json", tmp_path / "no" / "a.json"), 2, "folder that exists"),
        ((path, "--data", file, "--json", tmp_path), 2, "folder that exists"),
        ((path, "--data", file, "--metric", "bleu"), 2, "bleu"),
        ((path, "--data", file, "--limit", 0), 2, "--limit"),
        ((path,), 2, "--data"),
    ]
    for arguments, status, words in cases:
        assert run_here(("eval", *arguments), monkeypatch) == status, arguments
        printed = capsys.readouterr()
        assert words in printed.err.replace("\n", " "), (arguments, printed.err)
        assert "Traceback" not in printed.err
        assert printed.out == ""
