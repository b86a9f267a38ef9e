"""Two servers on one database."""

from __future__ import annotations

import time
from pathlib import Path

from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.monitor import Monitor

from .lab import Lab, eventually, lab

PATIENCE_S = 30
"""Replicas agree within seconds where the machine has nothing else to do."""


def test_replicas_agree_and_take_each_others_feedback(
    bank: Bank, farm: Bank, database_url: str, tmp_path: Path
) -> None:
    with (
        lab([bank, farm], tmp_path / "one", database=database_url) as one,
        lab([bank, farm], tmp_path / "two", database=database_url) as two,
    ):
        one.begin()
        assert eventually(lambda: two.chat("trial").status_code == 200, PATIENCE_S)
        for user in map(str, range(12)):
            here, there = one.chat("trial", user), two.chat("trial", user)
            variants = [each.headers["x-mergeroute-variant"] for each in (here, there)]
            assert variants[0] == variants[1]
        assert eventually(lambda: drained(one), PATIENCE_S)
        assert two.feedback(here, 1).status_code == 200
        assert two.feedback(here, 1).status_code == 200
        assert eventually(lambda: drained(two), PATIENCE_S)
        assert one.feedback(here, 0).status_code == 409
        counts = one.live.store.unit_counts("trial")
        assert (sum(counts.by_variant.values()) >= 12, counts.crossed) == (True, 0)
        two.change("trial", "promote", variant="new")
        digest = one.service.targets.banks["farm"].bank.digest
        answered = eventually(
            lambda: one.chat("auto").headers["x-mergeroute-bank"] == digest, PATIENCE_S
        )
        assert answered


def test_a_server_without_a_target_ends_no_experiment_of_others(
    bank: Bank, farm: Bank, database_url: str, tmp_path: Path
) -> None:
    with (
        lab([bank, farm], tmp_path / "one", database=database_url) as one,
        lab([bank], tmp_path / "two", database=database_url) as two,
    ):
        one.begin(variants=_ALL_NEW)
        assert eventually(lambda: two.chat("trial", "u").status_code == 503, PATIENCE_S)
        [warning] = two.call("GET", "/health").json()["warnings"]
        assert "'farm', which new answers from, is not on this server" in warning
        time.sleep(2.5)  # it has looked twice
        assert one.call("GET", "/v1/experiments/trial").json()["state"] == "running"
        assert one.chat("trial", "u").headers["x-mergeroute-variant"] == "new"
        assert one.call("GET", "/health").json() == {"status": "ok"}
        Monitor(two.live, lambda: two.service.targets, patience_s=0).look()
        assert one.call("GET", "/v1/experiments/trial").json()["state"] == "paused"


_ALL_NEW = [
    {"name": "old", "target": "zoo", "weight": 0.0, "control": True},
    {"name": "new", "target": "farm", "weight": 1.0},
]


def drained(served: Lab) -> bool:
    """Whether the others can know what this one recorded."""
    status = served.live.status()
    return (status["database"], status["backlog"]) == ("up", 0)
