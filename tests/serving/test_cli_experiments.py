"""The commands for experiments against a real server, run in this process to save their start."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing
from mergeroute.serving.cli import main
from mergeroute.serving.experiments.definition import Experiment

from .access.conftest import make_key
from .experiments.lab import Lab, experiment, lab

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "experiment.yaml"
GUIDE = ROOT / "docs" / "experiments.md"
VARIANTS = [
    {"name": "old", "target": "zoo", "weight": 0.5, "control": True},
    {"name": "new", "target": "upper", "weight": 0.5},
]


@dataclass(frozen=True)
class Said:
    """What a command did."""

    status: int
    out: str
    error: str

    @property
    def document(self) -> Any:
        """Of --json."""
        assert self.status == 0, self.error
        return json.loads(self.out)


Ask = Callable[..., Said]


@pytest.fixture(scope="module")
def served(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank], tmp_path_factory.mktemp("commands") / "state") as found:
        yield found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run `mergeroute experiment`."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["mergeroute", "experiment", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return Said(int(caught.value.code or 0), printed.out, printed.err)

    monkeypatch.delenv("MERGEROUTE_API_KEY", raising=False)
    return run


@pytest.fixture
def ask(served: Lab, command: Ask) -> Iterator[Ask]:
    """Of the server, which is left without experiments."""
    yield lambda *arguments: command(*arguments, "--url", served.url)
    served.clear()


def written(file: Path, **values: object) -> Path:
    file.write_text(yaml.safe_dump(experiment(variants=VARIANTS, **values)), encoding="utf-8")
    return file


def test_from_draft_to_rollback(ask: Ask, served: Lab, tmp_path: Path) -> None:
    file = written(tmp_path / "trial.yaml", attach_to="auto")
    created = ask("create", file)
    assert (created.status, created.error) == (0, "")
    assert "trial: draft, version 1" in created.out
    assert ask("start", "trial", "--json").document["state"] == "running"
    ramped = ask("ramp", "trial", "old=0.9", "new=0.1", "--reason", "careful", "--json").document
    assert [variant["weight"] for variant in ramped["variants"]] == [0.9, 0.1]
    assert ramped["reason"] == "ramped: careful"
    assert ask("ramp", "trial", "--traffic", "0.5", "--json").document["traffic"] == 0.5
    assert "trial: paused" in ask("pause", "trial").out
    assert "trial: running" in ask("start", "trial").out
    listed = ask("list")
    assert "old 0.9, new 0.1" in listed.out
    assert [one["name"] for one in ask("list", "--json").document["data"]] == ["trial"]
    promoted = ask("promote", "trial", "new", "--reason", "won")
    assert "trial: concluded" in promoted.out
    assert "promoted: new" in promoted.out
    assert served.chat("auto").headers["x-mergeroute-blend"] == "upper=1"
    assert ask("rollback", "trial", "--json").document["promoted"] is None
    assert "rolled back by anybody" in ask("show", "trial").out


def test_conclude_ends_it(ask: Ask, tmp_path: Path) -> None:
    ask("create", written(tmp_path / "trial.yaml"))
    ask("start", "trial")
    assert ask("conclude", "trial", "--json").document["state"] == "concluded"
    again = ask("start", "trial")
    assert (again.status, again.out) == (1, "")
    assert "error: the experiment 'trial' is concluded" in again.error


def test_only_what_is_over_or_never_began_is_deleted(ask: Ask, tmp_path: Path) -> None:
    ask("create", written(tmp_path / "trial.yaml"))
    ask("start", "trial")
    refused = ask("delete", "trial")
    assert refused.status == 1
    assert "to delete it, it must be draft or concluded" in refused.error
    ask("conclude", "trial")
    assert ask("delete", "trial").status == 0
    gone = ask("show", "trial")
    assert gone.status == 1
    assert "there is no experiment 'trial'; there are: none" in gone.error


def test_a_report_without_data_says_so(ask: Ask, tmp_path: Path) -> None:
    ask("create", written(tmp_path / "trial.yaml"))
    ask("start", "trial")
    told = ask("report", "trial")
    assert told.status == 0
    assert "winner: none yet" in told.out
    assert "too few to tell" in told.out
    ramped = ["ramp", "trial", "old=0.5", "new=0.5"]
    assert ask(*ramped).status == 0
    since = [
        ask("report", "trial", *more, "--json").document["version_from"]
        for more in ([], ["--version-from", "1"])
    ]
    assert since[0] > since[1] == 1
    page = tmp_path / "page.html"
    document = ask("report", "trial", "--html", page, "--json").document
    assert document["object"] == "experiment.results"
    assert "<svg" not in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nothing"), "nothing"),
        (("report", "../models"), "models"),
        (("create", "no-such-file.yaml"), "cannot be read"),
        (("report", "trial", "--html", "no/such/folder/page.html"), "make the folder"),
    ],
)
def test_what_the_input_is_at_fault_for_is_one_line_and_status_1(
    ask: Ask, arguments: tuple[str, ...], words: str
) -> None:
    said = ask(*arguments)
    assert (said.status, said.out) == (1, "")
    assert said.error.startswith("error: ")
    assert words in said.error
    assert said.error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- name: trial", "holds no experiment"),
        ("name: trial\nname: other", "twice"),
        ("name: [", "cannot be read"),
        ("name: trial\ntraffic: .nan", "cannot be sent as JSON"),
        ("name: 2026-11-21", "cannot be sent as JSON"),
        ("name: trial\nvariants: []", "variants"),
        ("a: 1\n" * 300_000, "no experiment"),
    ],
)
def test_a_file_that_holds_no_experiment(ask: Ask, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    said = ask("create", file)
    assert said.status == 1
    assert words in said.error


def test_bad_weights_are_refused_by_name(ask: Ask, tmp_path: Path) -> None:
    ask("create", written(tmp_path / "trial.yaml"))
    assert "sum" in ask("ramp", "trial", "old=0.5", "new=0.4").error
    assert ask("ramp", "trial", "old=0.5", "new=nan").status == 1
    assert "nothing is to change" in ask("ramp", "trial").error
    for wrong in ("old", "old=", "=0.5", "old=half"):
        said = ask("ramp", "trial", wrong)
        assert said.status == 2
        assert "VARIANT=WEIGHT" in said.error
    assert "given twice" in ask("ramp", "trial", "old=0.5", "old=0.5").error


def test_a_server_that_is_not_there(command: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:2")
    said = command("list", "--url", "http://127.0.0.1:1")
    assert said.status == 1
    assert "http://127.0.0.1:1 does not answer" in said.error
    for url in ("127.0.0.1:8000", "ftp://host", "http://[", ""):
        assert command("list", "--url", url).status == 2


def test_a_server_of_another_kind(command: Ask, served: Lab) -> None:
    said = command("list", "--url", f"{served.url}/metrics")
    assert said.status == 1
    assert "/metrics/v1/experiments" in said.error


def test_the_url_may_end_like_a_client_s(command: Ask, served: Lab) -> None:
    assert command("list", "--url", f"{served.url}/v1/", "--json").document["data"] == []


def test_keys_come_from_a_file_or_the_environment(
    command: Ask, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, key_file = tmp_path / "keys.yaml", tmp_path / "key"
    key_file.write_text(make_key(keys, "ops", scopes=["admin"]) + "\n")
    with lab([bank], tmp_path / "state", policy=Policy(KeyRing(keys), is_exposed=True)) as served:
        at = ("list", "--url", served.url)
        refused = command(*at)
        assert refused.status == 1
        assert "MERGEROUTE_API_KEY" in refused.error
        assert command(*at, "--key-file", key_file, "--json").document["data"] == []
        monkeypatch.setenv("MERGEROUTE_API_KEY", "wrong")
        assert command(*at).status == 1
        monkeypatch.setenv("MERGEROUTE_API_KEY", key_file.read_text())
        assert command(*at, "--json").document["data"] == []
    for text in ("", "two\nkeys", "k\u00e9y", "x" * 10_000):
        key_file.write_text(text, encoding="utf-8")
        said = command(*at, "--key-file", key_file)
        assert said.status == 1
        assert "holds no API key" in said.error
        assert text not in said.error or not text


def test_the_example_is_an_experiment_and_the_guide_s_is_a_part_of_it() -> None:
    document = Experiment.model_validate(yaml.safe_load(EXAMPLE.read_text("utf-8")))
    assert document.control.name == "static"
    (block,) = re.findall(
        r"^```yaml\n(.*?)^```", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    told = Experiment.model_validate(yaml.safe_load(block))
    assert told.variants == document.variants
    assert told.guardrails == document.guardrails
