"""The soak of benchmarks/soak in its short form, and whether it would see what it looks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.soak.hot import HotName
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.references import HOT, References, contents_of, hot_mixes, mixes_of
from benchmarks.soak.report import figures
from benchmarks.soak.soaking import Plan, soak
from mergeroute.adapters.bank import Bank
from mergeroute.serving.cli import DEMO_BANK

MINUTE = Plan(60, clients=8, prompts=4, count=16, rss_share=0.1)
"""The allocator is still filling up: memory is looked at closely by the long form."""


def test_nothing_goes_wrong_in_a_soak_of_a_minute(tmp_path: Path) -> None:
    _soak(MINUTE, tmp_path)


def _soak(plan: Plan, folder: Path) -> None:
    result = soak(plan, folder)
    found = figures(result)
    assert result.ledger.violations == []
    assert found["wrong"] == 0
    assert found["exit_status"] == 0
    assert found["checked"]["whole"] > 20
    assert found["changes"]["replace"] > 0
    assert result.modules == 8 + len(HOT)


def test_a_hot_name_means_what_was_live_in_the_span(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((1.0, 2.0, 5.0, 6.0, 8.0))
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr("benchmarks.soak.hot.time", clock)  # other threads go on by the real one
    hot = HotName("hot0")
    hot.begins("a")  # 1
    hot.done()  # 2
    hot.begins("b")  # 5
    hot.done()  # 6
    hot.begins(None)  # 8
    hot.failed()
    assert hot.content == "b"
    assert hot.meant(0.0, 0.5) == [None]
    assert hot.meant(1.5, 1.6) == [None, "a"]
    assert hot.meant(3.0, 4.0) == ["a"]
    assert hot.meant(3.0, 5.5) == ["a", "b"]
    assert hot.meant(7.0, 9.0) == ["b"]


def test_the_table_tells_contents_apart() -> None:
    """A wrong module would be seen: for most prompts, answers differ from blend to blend."""
    references = References(Bank.open(DEMO_BANK), prompts=2, count=12)
    hot = [mix for c in contents_of("hot0") for _, mix in hot_mixes("hot0", c)[:1]]
    mixes = [*mixes_of(references.bank)[:4], *hot]
    references.prepare(mixes)
    for number in range(2):
        answers = [references.find(number, mix) for mix in mixes]
        assert answers[-1] != answers[-2]
        assert len({answer and answer.text for answer in answers}) >= 3


def test_an_answer_that_is_not_allowed_is_a_violation() -> None:
    ledger = Ledger()
    ledger.check_answer("whole", "XIV", ["XIV"], "14")
    ledger.check_answer("whole", "XV", ["XIV", None], "14")
    ledger.check(True, "not told")
    assert (ledger.wrong, len(ledger.violations), ledger.answers["whole"]) == (1, 1, 2)
    assert "wrong answer to 14: 'XV'" in ledger.violations[0]
