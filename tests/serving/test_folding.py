"""Folded banks through the real server, and `mergeroute fold` on the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.cli import main
from mergeroute.serving.evaluation import EvalOptions, evaluate
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.inspection import inspect_path
from mergeroute.serving.service import Service

from ..tiny import make_model, make_tokenizer, reference_tokens
from .conftest import WORDS, Served, chat_ids, running, write_routed_bank

NAME = "digit.upper"


def run_fold(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `mergeroute fold`, run in this process to save its start."""
    monkeypatch.setattr(sys, "argv", ["mergeroute", "fold", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(scope="module")
def path(bank: Bank) -> Path:
    return bank.backbone.path.parent


@pytest.fixture(scope="module")
def folded(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    out = tmp_path_factory.mktemp("folded") / "small"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = (path, "--out", out, "--to", 1, "--name", "small")
        assert run_fold(*arguments, monkeypatch=monkeypatch) == 0
    return Bank.open(out)


@pytest.fixture(scope="module")
def both(bank: Bank, folded: Bank) -> Iterator[Served]:
    """The folded bank, which `auto` names, and the one it was made of, on one server."""
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=4))
    service = Service(host_banks([folded, bank], placement))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(url, service, folded, client)


def body(prompt: str, model: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize(("old", "prompt"), [(n, f"{words} 9") for n, words in WORDS.items()])
def test_the_router_sends_prompts_to_the_module_theirs_went_into(
    both: Served, old: str, prompt: str
) -> None:
    raw = both.client().chat.completions.with_raw_response.create(**body(prompt, "auto"))  # type: ignore[call-overload]
    assert raw.headers["x-mergeroute-blend"] == f"{NAME}=1"
    assert raw.headers["x-mergeroute-bank"] == both.bank.digest
    modules = {m.name: both.bank.load(m) for m in both.bank.modules}
    ids = chat_ids(both.bank.backbone, prompt)
    tokens = reference_tokens(make_model(), modules, Blend({NAME: 1}), ids, 8)
    wanted = make_tokenizer().decode(tokens, skip_special_tokens=True)
    assert raw.parse().choices[0].message.content == wanted
    shown = httpx.post(f"{both.url}/v1/route", json=body(prompt, "auto")).json()
    assert shown["blend"] == {NAME: 1.0}
    assert shown["scores"] == {NAME: pytest.approx(1.0)}
    assert shown["confidence"] == pytest.approx(1.0)
    assert shown["runner_up"] is None
    assert shown["reason"].endswith(f"; {old} is folded into {NAME}")
    before = httpx.post(f"{both.url}/v1/route", json=body(prompt, "zoo")).json()
    assert before["blend"] == {old: 1.0}
    assert before["distance"] == shown["distance"]


def test_old_names_are_unknown_and_new_ones_can_be_pinned(both: Served) -> None:
    answer = httpx.post(f"{both.url}/v1/chat/completions", json=body("x", f"small:{NAME}"))
    assert answer.headers["x-mergeroute-blend"] == f"{NAME}=1"
    answer = httpx.post(f"{both.url}/v1/chat/completions", json=body("x", "small:upper"))
    assert answer.status_code == 404


def test_what_a_server_counted_decides_what_is_kept_best(
    both: Served, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("digit", "digit", "digit", "upper"):
        httpx.post(f"{both.url}/v1/chat/completions", json=body("x", f"zoo:{module}"))
    usage = tmp_path / "metrics.txt"
    usage.write_text(httpx.get(f"{both.url}/metrics").text)
    arguments = (path, "--out", tmp_path / "out", "--to", 1, "--usage", usage, "--bytes", "50kB")
    assert run_fold(*arguments, monkeypatch=monkeypatch) == 0
    (module_entry,) = Bank.open(tmp_path / "out").modules
    members = {member["name"]: member for member in module_entry.provenance["members"]}
    assert members["digit"]["share"] > members["upper"]["share"]
    assert members["digit"]["share"] + members["upper"]["share"] == pytest.approx(1)
    assert members["digit"]["error"] < members["upper"]["error"]


def test_a_folded_bank_folds_again_and_its_router_still_fits(
    checkpoint: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_routed_bank(tmp_path / "first", name="zoo", backbone=checkpoint, seed=5)
    arguments = (
        tmp_path / "first",
        "--out",
        tmp_path / "second",
        "--bytes",
        "20kB",
        "--method",
        "lego",
    )
    assert run_fold(*arguments, monkeypatch=monkeypatch) == 0
    again = (tmp_path / "second", "--out", tmp_path / "third", "--to", 1)
    assert run_fold(*again, monkeypatch=monkeypatch) == 0
    router = tmp_path / "third" / "router" / "router.json"
    assert json.loads(router.read_text())["renamed"] == {"upper": NAME, "digit": NAME}
    (module,) = Bank.open(tmp_path / "third").modules
    members = module.provenance["members"]
    assert [m["provenance"]["folded_by"] for m in members] == ["lego", "lego"]
    (shown,) = inspect_path(tmp_path / "third").document["modules"]
    digest = Bank.open(tmp_path / "second").digest
    assert shown["provenance"]["fold"] == {"to": 1, "method": "svd", "bank": digest}
    digest = Bank.open(tmp_path / "first").digest
    before = {"bytes": 20_000, "method": "lego", "bank": digest}
    assert [m["provenance"]["fold"] for m in members] == [before, before]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--to", "2"], 1, "2 is out of range: bank 'zoo' has 2 modules"),
        (["--to", "0"], 1, "0 is out of range"),
        (["--bytes", "100"], 1, "100 bytes are too little for 2 modules"),
        (["--bytes", "1GB"], 1, "fit 1,000,000,000 as they are"),
        (["--bytes", "many"], 2, "'many' is no size"),
        (["--to", "1", "--bytes", "100"], 1, "100 bytes are too little for 1 modules"),
        (["--to", "1", "--usage", "gone.json"], 1, "gone.json cannot be read"),
        ([], 2, "give --to"),
        (["--to", "1", "--method", "ties"], 2, "'ties' is not one of"),
    ],
)
def test_a_wrong_use_says_why(
    arguments: Sequence[str],
    status: int,
    words: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run_fold(path, "--out", out, *arguments, monkeypatch=monkeypatch) == status
    assert words in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not out.exists()


def test_places_and_banks_that_will_not_do(
    checkpoint: Backbone,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_bank(tmp_path / "bare", name="bare", backbone=checkpoint, modules=[])
    for source, out, words in (
        (path, path, "is the bank that is folded"),
        (path, tmp_path / "bare", "exists: choose another folder"),
        (tmp_path / "bare", tmp_path / "out", "has no modules"),
        (tmp_path / "gone", tmp_path / "out", "is no bank"),
    ):
        assert run_fold(source, "--out", out, "--to", 1, monkeypatch=monkeypatch) == 1
        assert words in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    arguments = (path, "--out", tmp_path / "bare", "--to", 1, "--force")
    assert run_fold(*arguments, monkeypatch=monkeypatch) == 0
    assert [module.name for module in Bank.open(tmp_path / "bare").modules] == [NAME]
    assert NAME in capsys.readouterr().out


def test_tasks_of_folded_modules_are_measured_on_what_they_became(
    folded: Bank, tmp_path: Path
) -> None:
    """Not as prompts that no module serves: `digit` has no module of its own any more."""
    lines = [{"task": t, "prompt": "a", "answer": "b"} for t in ("digit", "upper", "nobody")]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=4))
    options = EvalOptions(oracle=True, max_tokens=2)
    report = evaluate(folded, data, options=options, placement=placement)
    assert [figures.task for figures in report.tasks] == ["digit", "upper"]
    assert all("oracle" in figures.scores for figures in report.tasks)
    assert all(figures.routed is not None for figures in report.tasks)
    assert [figures.task for figures in report.generic] == ["nobody"]
