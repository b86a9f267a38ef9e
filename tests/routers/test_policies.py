"""Policies: each step against its definition, and the text form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Scores
from mergeroute.routers.policies import Abstain, Policy, Quantise, Softmax, TopK, Weighing

LOGITS = {"a": 1.0, "b": 3.0, "c": 2.0}


def weigh(logits: dict[str, float] = LOGITS, *, distance: float | None = None) -> Weighing:
    calibration = tuple(float(k) for k in range(1, 201))
    return Weighing(weights=logits, scores=Scores(logits, distance, calibration))


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
    done = TopK(2).apply(weigh({"a": 0.1, "b": 0.6, "c": 0.3}))
    assert done.weights == pytest.approx({"b": 0.6 / 0.9, "c": 0.3 / 0.9})
    assert TopK(9).apply(weigh()).weights == LOGITS


@pytest.mark.parametrize(
    ("rate", "threshold"), [(0.005, 199.0), (0.01, 198.0), (0.5, 100.0), (0.001, 200.0)]
)
def test_abstain_gives_up_at_most_the_rate_of_its_own_prompts(
    rate: float, threshold: float
) -> None:
    near = Abstain(rate).apply(weigh(distance=threshold))
    far = Abstain(rate).apply(weigh(distance=threshold + 0.01))
    assert near.weights == LOGITS
    assert far.weights == {}
    assert near.threshold == far.threshold == threshold
    assert "abstained" in far.reason
    calibration = near.scores.calibration
    assert sum(d > threshold for d in calibration) / len(calibration) <= rate


def test_abstain_needs_a_calibrated_scorer() -> None:
    with pytest.raises(RouterError, match="was calibrated"):
        Abstain().apply(weigh(distance=None))


def test_quantise_snaps_to_sixty_fourths_and_drops_what_is_small() -> None:
    done = Quantise().apply(weigh({"a": 0.503, "b": 0.007, "c": -0.25}))
    assert done.weights == {"a": 0.5, "c": -0.25}


def test_policies_compose_and_parse() -> None:
    parsed = Policy.parse("softmax(0.5) | top_k(1) | abstain(0.005) | quantise")
    assert parsed.steps == (Softmax(0.5), TopK(1), Abstain(0.005), Quantise())
    assert (Policy((Softmax(0.5), TopK(1))) | Policy((Abstain(0.005), Quantise()))) == parsed
    assert parsed.apply(weigh(distance=5.0)).weights == {"b": 1.0}
    assert parsed.apply(weigh(distance=500.0)).weights == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "softmax(0)",
        "softmax(x)",
        "softmax(1",
        "top_k(0)",
        "top_k(1.5)",
        "softmax | top_k(inf)",
        "abstain | softmax",
        "top_k(1) | quantise",
        "softmax | softmax",
        "abstain(0)",
        "abstain(1)",
        "abstain(nan)",
        "quantise(3)",
        "maximum",
        "softmax | | quantise",
    ],
)
def test_a_bad_policy_is_refused(text: str) -> None:
    with pytest.raises(RouterError, match="policy"):
        Policy.parse(text)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-50, 50), min_size=1))
def test_softmax_top_1_quantise_always_makes_one_full_weight(logits: dict[str, float]) -> None:
    done = Policy.parse("softmax | top_k(1) | quantise").apply(weigh(logits))
    assert list(done.weights.values()) == [1.0]
    (winner,) = done.weights
    assert logits[winner] == pytest.approx(max(logits.values()), abs=1e-9)
