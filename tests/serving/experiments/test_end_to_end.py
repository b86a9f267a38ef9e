"""From an experiment's file to promotion and rollback, on a server that is killed meanwhile."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiment_trial import DATA, run_trial
from benchmarks.experiment_users import Crowd, Lost
from mergeroute.routers.data import read_examples

TASKS = ("roman", "date", "reverse")
"""Whose answers are short."""


def test_the_better_bank_wins_and_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    examples = [example for example in read_examples(DATA) if example.task in TASKS]
    page = tmp_path / "report.html"
    crowd = Crowd(users=250, requests=2, silent=0.05)
    trial = run_trial(tmp_path, crowd, examples, kill_at=[120], page=page)
    assert trial.kills == 1
    assert trial.interrupted > 0
    assert trial.lost == Lost([], [])
    assert trial.answers >= crowd.users
    assert trial.scores > 0.8 * crowd.users
    assert trial.restless == 0
    assert trial.right["routed"] > trial.right["static"]
    assert trial.winner == "routed"
    assert trial.sample_ratio["units_in_several_variants"] == 0
    before, promoted = trial.answering["before"], trial.answering["promoted"]
    assert promoted != before
    assert trial.answering["rolled back"] == before
    assert "<svg" in page.read_text("utf-8")
