"""Policies: each step against its definition, and the text form."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Scores
from mergeroute.routers.policies import STEPS, Policy
from mergeroute.routers.policy_steps import (
    Abstain,
    Quantise,
    Sharpen,
    Softmax,
    Step,
    Threshold,
    TopK,
    TopP,
    Weighing,
)

LOGITS = {"a": 1.0, "b": 3.0, "c": 2.0}
SHARES = {"a": 0.1, "b": 0.6, "c": 0.3}

logits = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-20, 20), min_size=1)
cuts = st.one_of(
    st.builds(Sharpen, st.floats(0.1, 8)),
    st.builds(TopK, st.integers(1, 9)),
    st.builds(TopP, st.floats(0.01, 1), renormalise=st.booleans()),
    st.builds(TopP, st.floats(0.01, 1), st.integers(1, 3), st.integers(3, 6)),
    st.builds(Threshold, st.floats(0.01, 1), renormalise=st.booleans()),
    st.builds(Abstain, st.floats(0.001, 0.999)),
)


def weigh(weights: Mapping[str, float] = LOGITS, *, distance: float | None = None) -> Weighing:
    calibration = tuple(float(k) for k in range(1, 201))
    return Weighing(
        weights=weights, scores=Scores(weights, distance=distance, calibration=calibration)
    )


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_softmax_is_the_formula(temperature: float) -> None:
    done = Softmax(temperature).apply(weigh())
    total = sum(math.exp(v / temperature) for v in LOGITS.values())
    for name, value in LOGITS.items():
        assert done.weights[name] == pytest.approx(math.exp(value / temperature) / total)
    assert done.confidences == done.weights
    assert done.reason.startswith("b scores best")


def test_softmax_survives_huge_scores() -> None:
    done = Softmax(0.5).apply(weigh({"a": -1e9, "b": -1.1e9}))
    assert done.weights == {"a": 1.0, "b": 0.0}


def test_top_k_keeps_the_best_and_hands_them_the_rest() -> None:
    done = TopK(2).apply(weigh(SHARES))
    assert done.weights == pytest.approx({"b": 0.6 / 0.9, "c": 0.3 / 0.9})
    assert TopK(9).apply(weigh()).weights == LOGITS


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (TopP(0.5), "b"),
        (TopP(0.6), "b"),
        (TopP(0.61), "bc"),
        (TopP(0.95), "abc"),
        (TopP(1), "abc"),
        (TopP(0.01, 2), "bc"),
        (TopP(1, k_max=2), "bc"),
        (TopP(0.01, 9), "abc"),
    ],
)
def test_top_p_keeps_up_to_the_module_that_crosses(step: TopP, kept: str) -> None:
    done = step.apply(weigh(SHARES))
    assert set(done.weights) == set(kept)
    assert sum(done.weights.values()) == pytest.approx(1)


def test_what_top_p_and_threshold_cut_is_left_to_the_backbone_on_demand() -> None:
    expected = {"b": 0.6, "c": 0.3}
    assert TopP(0.8, renormalise=False).apply(weigh(SHARES)).weights == expected
    assert Threshold(0.3, renormalise=False).apply(weigh(SHARES)).weights == expected


def test_top_p_is_a_share_of_what_is_there() -> None:
    half = {name: share / 2 for name, share in SHARES.items()}
    assert set(TopP(0.8).apply(weigh(half)).weights) == {"b", "c"}


def test_threshold_drops_what_is_below_and_says_when_nothing_is_left() -> None:
    some, none = (Threshold(w).apply(weigh(SHARES)) for w in (0.3, 0.7))
    assert some.weights == pytest.approx({"b": 0.6 / 0.9, "c": 0.3 / 0.9})
    assert none.weights == {}
    assert none.reason == "abstained: no module reaches 0.7, b comes nearest (0.600)"


def test_sharpen_is_the_formula() -> None:
    squares = {"a": 0.01, "b": 0.36, "c": 0.09}
    expected = {name: square / 0.46 for name, square in squares.items()}
    assert Sharpen(2).apply(weigh(SHARES)).weights == pytest.approx(expected)


@pytest.mark.parametrize("weights", [{}, {"a": 0.0, "b": 0.0}])
@pytest.mark.parametrize("step", [Sharpen(2), TopK(1), TopP(0.5), Quantise()])
def test_nothing_stays_nothing(step: Step, weights: dict[str, float]) -> None:
    assert not any(step.apply(weigh(weights)).weights.values())


@pytest.mark.parametrize(
    ("rate", "threshold"),
    [(0.005, 200.0), (0.01, 199.0), (0.5, 101.0), (0.001, 200.0), (0.9999, 1.0)],
)
def test_abstain_gives_up_at_most_the_rate_of_its_own_prompts(
    rate: float, threshold: float
) -> None:
    near = Abstain(rate).apply(weigh(distance=threshold))
    far = Abstain(rate).apply(weigh(distance=threshold + 0.01))
    assert near.weights == LOGITS
    assert far.weights == {}
    assert near.threshold == far.threshold == threshold
    assert "abstained: distance" in far.reason
    calibration = near.scores.calibration
    assert sum(d > threshold for d in calibration) / len(calibration) <= rate


@pytest.mark.parametrize(("count", "rate", "kept"), [(9, 0.1, 9), (9, 0.7, 3), (19, 0.1, 18)])
def test_the_threshold_is_the_conformal_quantile(count: int, rate: float, kept: int) -> None:
    distances = [float(k) for k in range(1, count + 1)]
    scores = Scores(LOGITS, distance=0.0, calibration=distances)
    assert Abstain(rate).apply(Weighing(LOGITS, scores)).threshold == kept


@given(st.lists(st.integers(0, 20), min_size=2, max_size=25), st.floats(0.01, 0.99))
def test_of_exchangeable_prompts_at_most_the_rate_is_given_up(
    distances: list[int], rate: float
) -> None:
    given_up = 0
    for place, distance in enumerate(distances):  # each in turn is the one asked after the rest
        rest = sorted([*distances[:place], *distances[place + 1 :]])
        scores = Scores(LOGITS, distance=distance, calibration=rest)
        given_up += not Abstain(rate).apply(Weighing(LOGITS, scores)).weights
    assert given_up <= max(1, rate * len(distances) + 1e-9)  # 1: the threshold is never infinite


@given(st.floats(1e-9, 0.9999), st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_abstain_has_a_finite_threshold_however_few_the_prompts(
    rate: float, distances: list[float]
) -> None:
    scores = Scores(LOGITS, distance=max(distances), calibration=sorted(distances))
    done = Abstain(rate).apply(Weighing(LOGITS, scores))
    assert done.threshold in distances
    if len(distances) * rate < 1:
        assert done.threshold == max(distances)


def test_abstain_needs_a_calibrated_scorer() -> None:
    with pytest.raises(RouterError, match="was calibrated"):
        Abstain().apply(weigh(distance=None))


def test_quantise_snaps_to_sixty_fourths_and_drops_what_is_small() -> None:
    done = Quantise().apply(weigh({"a": 0.503, "b": 0.007, "c": -0.25}))
    assert done.weights == {"a": 0.5, "c": -0.25}


def test_quantise_says_when_all_vanish() -> None:
    done = Quantise().apply(weigh({"a": 0.007, "b": -0.007}))
    assert done.weights == {}
    assert "below 1/128" in done.reason


def test_policies_compose_and_parse() -> None:
    parsed = Policy.parse("softmax(0.5) | top_k(1) | abstain(0.005) | quantise")
    assert parsed.steps == (Softmax(0.5), TopK(1), Abstain(0.005), Quantise())
    assert parsed.apply(weigh(distance=5.0)).weights == {"b": 1.0}
    assert parsed.apply(weigh(distance=500.0)).weights == {}


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("top_p(0.9)", TopP(0.9)),
        ("top_p( 0.9 , k_max = 3 )", TopP(0.9, k_max=3)),
        ("top_p(0.9, 2, 3)", TopP(0.9, 2, 3)),
        ("top_p(p=.9, renormalise=false)", TopP(0.9, renormalise=False)),
        ("top_k(k=2)", TopK(2)),
        ("top_k(2.0)", TopK(2)),
        ("top_k()", TopK(1)),
        ("threshold(1e-1)", Threshold(0.1)),
        ("sharpen(2)", Sharpen(2)),
    ],
)
def test_arguments_go_by_position_or_by_name(text: str, step: Step) -> None:
    assert Policy.parse(f"softmax | {text}").steps[1] == step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "step '' is unknown"),
        ("softmax(0)", r"softmax\(0\) is out of range: a finite temperature above 0"),
        ("softmax(1e999)", r"softmax\(inf\)"),
        ("softmax(x)", "'x' is no number; softmax takes temperature"),
        ("softmax(nan)", "'nan' is no number"),
        ("softmax(true)", "'true' is no number"),
        ("softmax(1", "is unknown"),
        ("softmax(1, 2)", "'2' is one too many"),
        ("softmax | top_k(0)", r"top_k\(0\) is out of range: a whole number >= 1"),
        ("softmax | top_k(1.5)", r"top_k\(1.5\) is out of range"),
        ("softmax | top_k(inf)", "'inf' is no number"),
        ("softmax | top_k(1e999)", r"top_k\(inf\)"),
        ("softmax | top_p", "p is missing; top_p takes p, k_min, k_max, renormalise"),
        ("softmax | top_p(0)", r"top_p\(0\) is out of range: a share above 0"),
        ("softmax | top_p(1.1)", r"top_p\(1.1\)"),
        ("softmax | top_p(0.5, k_min=0)", "k_min=0"),
        ("softmax | top_p(0.5, k_min=1.5)", "k_min=1.5"),
        ("softmax | top_p(0.5, 3, 2)", r"k_max=2.* >= k_min \(3\)"),
        ("softmax | top_p(0.5, p=0.5)", "'p=0.5' is one too many"),
        ("softmax | top_p(0.5, k=3)", "'k=3' is one too many"),
        ("softmax | top_p(0.5,)", "'' is no number"),
        ("softmax | top_p(0.5, renormalise=1)", "'1' is neither true nor false"),
        ("softmax | threshold(0)", r"threshold\(0\)"),
        ("softmax | sharpen(-1)", r"sharpen\(-1\)"),
        ("abstain | softmax", "one softmax, and as its first step"),
        ("top_k(1) | quantise", "one softmax"),
        ("threshold(0.1)", "one softmax"),
        ("sharpen(2)", "one softmax"),
        ("quantise | softmax", "one softmax"),
        ("softmax | softmax", "one softmax"),
        ("softmax | abstain(0)", r"abstain\(0\) is out of range: a rate between 0 and 1"),
        ("softmax | abstain(1)", r"abstain\(1\)"),
        ("quantise(3)", "quantise takes no arguments"),
        ("maximum", "'maximum' is unknown: softmax, sharpen, top_k"),
        ("softmax | | quantise", "'' is unknown"),
    ],
)
def test_a_bad_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(RouterError, match=f"policy .*{message}"):
        Policy.parse(text)


@given(st.floats(0.01, 100), st.lists(cuts, max_size=4))
def test_what_is_written_is_read_back(temperature: float, steps: list[Step]) -> None:
    policy = Policy((Softmax(temperature), *steps, Quantise()))
    assert Policy.parse(str(policy)) == policy


def test_policies_are_written_as_people_write_them() -> None:
    text = "softmax(0.5) | top_p(0.9, k_max=3, renormalise=false) | abstain(0.005) | quantise"
    assert str(Policy.parse(text)) == text
    assert str(Policy.parse("softmax(1.0) | top_p(p=1, k_min=1)")) == "softmax(1) | top_p(1)"
    assert set(STEPS) == {
        *("softmax", "sharpen", "top_k", "top_p", "threshold", "abstain", "quantise")
    }


@given(logits)
def test_softmax_top_1_quantise_always_makes_one_full_weight(logits: dict[str, float]) -> None:
    done = Policy.parse("softmax | top_k(1) | quantise").apply(weigh(logits))
    assert list(done.weights.values()) == [1.0]
    (winner,) = done.weights
    assert logits[winner] == pytest.approx(max(logits.values()), abs=1e-9)


@given(logits, st.lists(cuts, max_size=4), st.floats(0, 250))
def test_weights_stay_shares(logits: dict[str, float], steps: list[Step], distance: float) -> None:
    done = Policy((Softmax(), *steps)).apply(weigh(logits, distance=distance))
    assert all(weight >= 0 for weight in done.weights.values())
    assert sum(done.weights.values()) <= 1 + 1e-9
    assert done.weights.keys() <= logits.keys()
    assert done.weights or done.reason.startswith("abstained")


@given(logits, st.lists(cuts, max_size=4), st.randoms())
def test_the_order_of_the_modules_does_not_matter(
    logits: dict[str, float], steps: list[Step], chance: random.Random
) -> None:
    names = list(logits)
    chance.shuffle(names)
    policy = Policy((Softmax(), *steps, Quantise()))
    done, shuffled = (
        policy.apply(weigh(order, distance=5.0))
        for order in (logits, {name: logits[name] for name in names})
    )
    assert done.weights == shuffled.weights
    assert done.reason == shuffled.reason


def test_of_equal_modules_the_first_by_name_is_kept() -> None:
    done = Policy((Softmax(), TopK(1))).apply(weigh({"c": 1.0, "a": 1.0, "b": 1.0}))
    assert done.weights == pytest.approx({"a": 1.0})
    assert done.reason.startswith("a scores best")


@given(logits)
def test_some_steps_change_nothing(logits: dict[str, float]) -> None:
    shares = Softmax().apply(weigh(logits))
    assert TopK(len(logits)).apply(shares).weights == shares.weights
    assert TopP(1).apply(shares).weights == shares.weights
    assert Sharpen(1).apply(shares).weights == pytest.approx(shares.weights)
    once = Quantise().apply(shares)
    assert Quantise().apply(once) == once


@given(logits, st.floats(0.2, 4), st.floats(0.2, 4))
def test_sharpening_is_a_lower_temperature(
    logits: dict[str, float], temperature: float, power: float
) -> None:
    sharpened = Policy((Softmax(temperature), Sharpen(power))).apply(weigh(logits))
    cold = Softmax(temperature / power).apply(weigh(logits))
    assert sharpened.weights == pytest.approx(cold.weights, abs=1e-9)
    assert sharpened.confidences == Softmax(temperature).apply(weigh(logits)).weights


@given(logits, st.floats(0.01, 1), st.integers(1, 4), st.integers(0, 4))
def test_top_p_is_its_definition(logits: dict[str, float], p: float, k_min: int, more: int) -> None:
    shares = Softmax().apply(weigh(logits)).weights
    kept = TopP(p, k_min, k_min + more, renormalise=False).apply(weigh(shares)).weights
    assert min(k_min, len(shares)) <= len(kept) <= k_min + more
    dropped = [shares[name] for name in shares.keys() - kept.keys()]
    assert max(dropped, default=0) <= min(kept.values())
    if len(kept) < min(len(shares), k_min + more):
        assert sum(kept.values()) >= p - 1e-9
    if len(kept) > k_min:
        assert sum(kept.values()) - min(kept.values()) < p
