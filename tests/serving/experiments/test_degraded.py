"""A database that is slow, locked or gone costs no request and loses no exposure."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.errors import SettingsError
from mergeroute.serving.experiments.live import LiveExperiments

from .lab import Lab, eventually, lab

NOWHERE = "postgresql+psycopg://nobody:secret@127.0.0.1:1/nothing"


def units(served: Lab) -> int:
    return sum(served.live.store.unit_counts("trial").by_variant.values())


def test_a_locked_database_costs_nothing(bank: Bank, farm: Bank, tmp_path: Path) -> None:
    with lab([bank, farm], tmp_path / "state") as served:
        served.begin()
        other = sqlite3.connect(tmp_path / "state" / "experiments.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answers = [served.chat("trial", f"u{number}") for number in range(10)]
        assert time.monotonic() - began < 5
        assert {answer.status_code for answer in answers} == {200}
        assert served.live.status()["backlog"] >= 10
        assert served.feedback(answers[0], 1).status_code == 200
        other.execute("ROLLBACK")
        other.close()
        assert eventually(lambda: units(served) == 10, seconds=20)
        assert eventually(lambda: served.live.store.sums("trial", "score"))
        assert eventually(lambda: served.call("GET", "/health").json() == {"status": "ok"})


def test_changes_that_wait_for_the_database_hold_up_no_request(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    with lab([bank, farm], tmp_path / "state") as served, ThreadPoolExecutor(40) as clients:
        served.begin()
        served.chat("trial", "warm")
        other = sqlite3.connect(tmp_path / "state" / "experiments.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        path = "/v1/experiments/trial/pause"
        waiting = [clients.submit(served.call, "POST", path) for _ in range(40)]
        time.sleep(0.5)  # each takes two seconds; there are at most 32 threads that route requests
        assert served.chat("trial", "u").status_code == 200
        assert sum(each.done() for each in waiting) <= 4
        other.execute("ROLLBACK")
        other.close()
        assert [each.result().status_code for each in waiting].count(200) == 1


def test_without_its_database_a_server_goes_on_as_it_last_knew(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    with lab([bank, farm], folder) as served:
        served.begin()
        before = {u: served.chat("trial", u).headers["x-mergeroute-variant"] for u in "abcdef"}
    with lab([bank, farm], folder, database=NOWHERE) as degraded:
        assert eventually(lambda: "warnings" in degraded.call("GET", "/health").json())
        answers = {u: degraded.chat("trial", u) for u in "abcdef"}
        assert {u: a.headers["x-mergeroute-variant"] for u, a in answers.items()} == before
        assert degraded.feedback(answers["a"], 1).status_code == 200
        unknown = degraded.feedback("elsewhere", 1)
        assert (unknown.status_code, unknown.headers["retry-after"]) == (503, "5")
        refused = degraded.call("POST", "/v1/experiments/trial/pause")
        assert refused.status_code == 503
        assert "secret" not in refused.text
        assert "127.0.0.1" not in degraded.call("GET", "/health").text
        assert "mergeroute_database_up 0.0" in degraded.call("GET", "/metrics").text
    with lab([bank, farm], folder) as again:
        eventually(lambda: again.live.store.sums("trial", "score"))
        sums = again.live.store.sums("trial", "prompt_tokens").values()
        assert sum(each.x for each in sums) == 12
        assert sum(each.n for each in sums) == 6


def test_a_damaged_snapshot_is_made_anew(bank: Bank, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "experiments.json").write_text("{")
    with lab([bank], folder) as served:
        assert served.chat("auto").status_code == 200


def test_what_another_version_of_the_program_wrote_is_told_of(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    with lab([bank, farm], tmp_path / "state") as served:
        served.begin()
        served.change("trial", "pause")
        served.change("trial", "start")
        newer = "UPDATE mergeroute_experiment_versions SET document = '{\"new\": 1}'"
        with sqlite3.connect(tmp_path / "state" / "experiments.sqlite") as other:
            other.execute(f"{newer} WHERE version = 4")
        other.close()
        assert eventually(lambda: "warnings" in served.call("GET", "/health").json(), 30)
        assert "another version" in served.live.status()["last_error"]
        assert served.chat("trial", "a").headers["x-mergeroute-variant"]


@pytest.mark.parametrize("url", ["nonsense", "oracle://somewhere", "sqlite:///no/such/folder/x"])
def test_a_database_that_cannot_be_is_refused_at_the_start(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        LiveExperiments(url, tmp_path)
