"""Two servers on one database."""

from __future__ import annotations

from pathlib import Path

from mergeroute.adapters.bank import Bank

from .lab import Lab, eventually, lab

PATIENCE_S = 30
"""Replicas agree within seconds where the machine has nothing else to do."""


def test_replicas_agree_and_take_each_others_feedback(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    with (
        lab([bank, farm], tmp_path / "one", database=url) as one,
        lab([bank, farm], tmp_path / "two", database=url) as two,
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


def drained(served: Lab) -> bool:
    """Whether the others can know what this one recorded."""
    status = served.live.status()
    return (status["database"], status["backlog"]) == ("up", 0)
