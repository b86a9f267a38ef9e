"""Who wins, and why not."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings

from mergeroute.serving.experiments.statistics.srm import SampleRatio, sample_ratio
from mergeroute.serving.experiments.statistics.units import Sums
from mergeroute.serving.experiments.statistics.verdict import Metric, Verdict, judge

from .samples import any_sums, sums

SCORE = Metric("score", "continuous", "up")
ERROR = Metric("error", "binary", "down", max_increase=0.01)
LENGTH = Metric("length", "count", "down")
SOUND = SampleRatio(0.5, 0.4, is_mismatch=False)


def judged(
    means: dict[str, float], *others: Metric, ratio: SampleRatio = SOUND, **more: dict[str, Sums]
) -> Verdict:
    """Of an experiment whose control is called control."""
    scores = {name: sums(800, seed=i, mean=mean) for i, (name, mean) in enumerate(means.items())}
    table = {"score": scores, **more}
    return judge([SCORE, *others], table, control="control", sample_ratio=ratio)


def test_a_clear_gain_wins_and_says_by_how_much() -> None:
    found = judged({"control": 1.0, "routed": 1.5, "flat": 1.0})
    assert found.winner == "routed"
    assert found.reason.startswith("routed beats control on score by +0.4512 (")
    assert "(95 % always-valid interval +0." in found.reason
    assert " to +0." in found.reason
    arm = found.arms["score"]["routed"]
    assert arm.effect is not None
    assert arm.adjusted_p_value is not None
    assert arm.effect.always_valid is not None
    assert arm.adjusted_p_value == pytest.approx(2 * arm.effect.always_valid.p_value)
    assert found.arms["score"]["control"].effect is None
    assert sum(a.probability_best or 0 for a in found.arms["score"].values()) == pytest.approx(1)


def test_the_larger_of_two_gains_wins() -> None:
    assert judged({"control": 1.0, "good": 1.4, "better": 1.8}).winner == "better"


def test_a_mismatch_blocks_the_verdict_and_shows_the_rest() -> None:
    ratio = sample_ratio({"control": 900, "routed": 1100}, {"control": 0.5, "routed": 0.5})
    found = judged({"control": 1.0, "routed": 2.0}, ratio=ratio)
    assert found.winner is None
    assert found.reason == "no verdict: sample ratio mismatch (p = 7.7e-06)"
    assert found.arms["score"]["routed"].effect is not None


def test_no_difference_no_winner() -> None:
    found = judged({"control": 1.0, "routed": 1.0})
    assert found.winner is None
    assert found.reason == "no winner yet: no difference on score is certain"


def test_the_control_wins_where_all_others_lose() -> None:
    found = judged({"control": 1.5, "routed": 1.0})
    assert found.winner == "control"
    assert found.reason == "control wins: every other variant is worse on score"
    assert judged({"control": 1.5, "routed": 1.0, "flat": 1.5}).winner is None


def test_a_gain_that_costs_elsewhere_does_not_win() -> None:
    fine, bad = (sums(2_000, seed=7 + i, mean=m, binary=True) for i, m in enumerate((0.02, 0.2)))
    found = judged({"control": 1.0, "routed": 1.5}, ERROR, error={"control": fine, "routed": bad})
    assert found.winner is None
    assert found.reason == "no winner: routed is better on score but worse on error"
    assert found.arms["error"]["routed"].guardrail is not None
    assert found.arms["error"]["routed"].guardrail.breached
    longer = {"control": sums(800, seed=1, mean=5), "routed": sums(800, seed=2, mean=6)}
    assert judged({"control": 1.0, "routed": 1.5}, LENGTH, length=longer).winner is None
    shorter = {"control": longer["routed"], "routed": longer["control"]}
    assert judged({"control": 1.0, "routed": 1.5}, LENGTH, length=shorter).winner == "routed"


def test_worse_within_its_guardrail_is_allowed() -> None:
    few, more = (sums(20_000, seed=7 + i, mean=m, binary=True) for i, m in enumerate((0.02, 0.04)))
    allowed = Metric("error", "binary", "down", max_increase=0.05)
    table = {"control": few, "routed": more}
    found = judged({"control": 1.0, "routed": 1.5}, allowed, error=table)
    assert (found.arms["error"]["routed"].adjusted_p_value or 1) < 0.001
    assert found.winner == "routed"
    unguarded = Metric("error", "binary", "down")
    assert judged({"control": 1.0, "routed": 1.5}, unguarded, error=table).winner is None


def test_too_early_to_tell() -> None:
    found = judge([SCORE], {}, control="control", sample_ratio=SOUND)
    assert found.reason.startswith("no verdict yet: score needs 100 effective units")
    early = {"score": {"control": sums(50), "routed": sums(50, seed=1, mean=9)}}
    found = judge([SCORE, ERROR], early, control="control", sample_ratio=SOUND)
    assert found.winner is None
    assert found.arms["error"]["routed"].units == 0
    with pytest.raises(ValueError, match="no metric to decide by"):
        judge([], {}, control="control", sample_ratio=SOUND)


@settings(max_examples=30, deadline=None)
@given(any_sums(), any_sums())
def test_it_is_json_whatever_was_recorded(control: Sums, variant: Sums) -> None:
    both = {"control": control, "routed": variant}
    found = judge(
        [SCORE, ERROR], {"score": both, "error": both}, control="control", sample_ratio=SOUND
    )
    json.dumps(asdict(found), allow_nan=False)
