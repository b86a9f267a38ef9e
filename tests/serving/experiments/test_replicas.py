"""Two servers on one database."""

from __future__ import annotations

from pathlib import Path

from mergeroute.adapters.bank import Bank

from .lab import eventually, lab


def test_replicas_agree_and_take_each_others_feedback(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    with (
        lab([bank, farm], tmp_path / "one", database=url) as one,
        lab([bank, farm], tmp_path / "two", database=url) as two,
    ):
        one.begin()
        assert eventually(lambda: two.chat("trial").status_code == 200, seconds=3)
        for user in map(str, range(12)):
            here, there = one.chat("trial", user), two.chat("trial", user)
            variants = [each.headers["x-mergeroute-variant"] for each in (here, there)]
            assert variants[0] == variants[1]
        assert two.feedback(here, 1).status_code == 200
        assert two.feedback(here, 1).status_code == 200
        assert eventually(lambda: one.live.store.sums("trial", "score"))
        assert one.feedback(here, 0).status_code == 409
        units = eventually(lambda: _units(one.live.store.unit_counts("trial").by_variant, 12))
        assert units
        assert one.live.store.unit_counts("trial").crossed == 0
        two.change("trial", "promote", variant="new")
        digest = one.service.targets.banks["farm"].bank.digest
        answered = eventually(
            lambda: one.chat("auto").headers["x-mergeroute-bank"] == digest, seconds=3
        )
        assert answered


def _units(counts: dict[str, int], least: int) -> bool:
    return sum(counts.values()) >= least
