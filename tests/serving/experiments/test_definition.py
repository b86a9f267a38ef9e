"""Experiments as people write them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from pydantic import BaseModel, ValidationError

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.definition import (
    Bandit,
    Experiment,
    Guardrail,
    MetricSettings,
    ShadowSettings,
    Variant,
)
from mergeroute.serving.experiments.metrics import BUILT_IN

from .shapes import HALVES, experiment, property_of, weights

SCORE = {"name": "score", "kind": "binary", "direction": "up"}


def halves(**of_second: Any) -> list[dict[str, Any]]:
    """Two variants, the second changed."""
    return [HALVES[0], {**HALVES[1], **of_second}]


def shared_out(*weights: float) -> list[dict[str, Any]]:
    """Variants v0, v1 and so on; the first is the control."""
    return [
        {"name": f"v{n}", "target": "zoo", "weight": weight, "control": n == 0}
        for n, weight in enumerate(weights)
    ]


def test_what_the_interface_shows_is_taken() -> None:
    found = experiment(
        salt=None,
        attach_to="auto",
        unit=["header:X-Mergeroute-Assignment-Key", "user", "session", "api_key", "request"],
        metrics=[SCORE],
        guardrails=[{"metric": "error", "max_increase": 0.01}],
        shadow={"variant": "routed", "share": 0.1},
        bandit={"metric": "score"},
    )
    assert found.weights == {"control": 0.5, "routed": 0.5}
    assert found.control.target == "zoo-ties"
    assert list(found.measured) == [*BUILT_IN, "score"]
    assert found.unit == Experiment(name="x", variants=found.variants).unit


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "auto"}, "name 'auto' is reserved"),
        ({"name": "a/b"}, "name 'a/b' is not allowed"),
        ({"salt": "layer:default"}, "salt"),
        ({"salt": "a\0b"}, "salt"),
        ({"salt": ""}, "salt"),
        ({"traffic": 0}, "greater than 0"),
        ({"traffic": 1.5}, "traffic is 1.5, it must be from 0 to 1"),
        ({"traffic": 0.00005}, "traffic is 5e-05, it must be a multiple"),
        ({"traffic": float("nan")}, "traffic"),
        ({"attach_to": "zoo"}, "attach_to"),
        ({"unit": []}, "unit"),
        ({"unit": ["device"]}, "'device' is no unit"),
        ({"unit": ["user", "user"]}, "the unit 'user' is there twice"),
        ({"unit": ["header:X-A", "header:x-a"]}, "the unit 'header:x-a' is there twice"),
        ({"unit": ["request", "user"]}, "put it last"),
        ({"unit": ["header:"]}, "is no name of a header"),
        ({"unit": ["header:Cookie"]}, "'cookie' holds a secret"),
        ({"variants": [HALVES[0]]}, "at least 2 items"),
        ({"variants": [{**HALVES[0], "weight": 1}] * 21}, "at most 20 items"),
        ({"variants": halves(name="control")}, "the variant 'control' is there twice"),
        ({"variants": halves(weight=0.4)}, "sum to 0.9, they must sum to 1"),
        ({"variants": halves(weight=0.50001)}, "must be a multiple of 1/10000: write 0.5"),
        ({"variants": halves(weight=float("nan"))}, "finite number"),
        ({"variants": halves(control=True)}, "2 variants are the control"),
        ({"variants": [{**HALVES[0], "control": False}, HALVES[1]]}, "0 variants are the control"),
        ({"variants": halves(name="a=b")}, "pattern"),
        ({"variants": halves(target="")}, "at least 1 character"),
        ({"metrics": [{**SCORE, "name": "error"}]}, "the metric 'error' is there twice"),
        ({"metrics": [SCORE, SCORE]}, "the metric 'score' is there twice"),
        ({"guardrails": [{"metric": "score", "max_increase": 1}]}, "no metric 'score': declare it"),
        ({"guardrails": [{"metric": "error", "max_increase": 1}] * 2}, "guardrail on 'error' is"),
        ({"bandit": {"metric": "score"}}, "no metric 'score'"),
        ({"bandit": {"metric": "error", "floor": 0.6}}, "bandit.floor 0.6 of 2 variants is more"),
        ({"bandit": {"metric": "error", "floor": 0.50001}}, "more than there is: at most 0.5"),
        (
            {
                "bandit": {"metric": "error", "floor": 0.33333},
                "variants": shared_out(0.3333, 0.3333, 0.3334),
            },
            "bandit.floor 0.33333 of 3 variants is more than there is: at most 0.3333",
        ),
        (
            {"bandit": {"metric": "error"}, "variants": shared_out(0.9601, 0.0399)},
            "the weight of 'v1' is 0.0399, below bandit.floor 0.05: raise it, or lower the floor",
        ),
        ({"shadow": {"variant": "other", "share": 0.1}}, "shadow.variant 'other' is no variant"),
        ({"shadow": {"variant": "routed", "share": 0}}, "greater than 0"),
        ({"audience": {"header": {}}}, "Extra inputs"),
        ({"feedback_days": 0}, "feedback_days"),
        ({"alpha": 0.5}, "alpha"),
        ({"weights": {}}, "Extra inputs"),
    ],
)
def test_what_cannot_be_run_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        experiment(**changed)


def test_twenty_variants_and_thirds() -> None:
    bandit = {"metric": "error", "floor": 0.05}
    assert len(experiment(variants=shared_out(*[0.05] * 20), bandit=bandit).variants) == 20
    bandit = {"metric": "error", "floor": 0.3333}
    thirds = experiment(variants=shared_out(0.3333, 0.3333, 0.3334), bandit=bandit)
    assert thirds.weights["v2"] == 0.3334


def test_what_requests_read_is_made_once() -> None:
    asked, other = experiment(), experiment()
    for name in ("weights", "by_name", "control", "measured"):
        assert getattr(asked, name) is getattr(asked, name)
    assert asked == other
    assert asked.model_dump() == other.model_dump()
    changed = asked.with_weights({"control": 0.25, "routed": 0.75})
    assert (changed.weights["routed"], changed.control.weight) == (0.75, 0.25)


def test_a_bandit_keeps_its_floor_when_weights_change() -> None:
    before = experiment(bandit={"metric": "error", "floor": 0.1})
    with pytest.raises(ApiError, match=r"of 'routed' is 0\.0999, below bandit\.floor 0\.1: raise"):
        before.with_weights({"control": 0.9001, "routed": 0.0999})
    assert before.with_weights({"control": 0.9, "routed": 0.1}).weights["routed"] == 0.1


def test_a_salt_is_made_once_and_stored() -> None:
    written = experiment(salt=None)
    first = written.salted()
    assert first.salt is not None
    assert len(first.salt) == 16
    assert written.salted().salt != first.salt
    stored = Experiment.model_validate_json(first.model_dump_json())
    assert stored.salted() == first
    assert written.salted(stored.salt) == first
    assert experiment(salt="mine").salted("other").salt == "mine"


@property_of
@given(wanted=weights(("routed", "control")))
def test_other_weights(wanted: dict[str, float]) -> None:
    before = experiment()
    assert before.weights == {"control": 0.5, "routed": 0.5}
    after = before.with_weights(wanted)
    assert after.weights == wanted
    assert list(after.weights) == ["control", "routed"]
    assert after.control.weight == wanted["control"]
    assert after.with_weights(before.weights) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"control": 1}, "state those of all variants: control, routed"),
        ({}, "the weights are of nothing"),
        ({"control": 0.5, "routed": 0.25, "new": 0.25}, "state those of all variants"),
        ({"control": 0.5, "routed": 0.6}, "sum to 1.1"),
        ({"control": 0.5, "routed": float("nan")}, "must be from 0 to 1"),
    ],
)
def test_weights_that_cannot_be(wanted: dict[str, float], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        experiment().with_weights(wanted)
    assert (caught.value.status, caught.value.param) == (400, "weights")


@pytest.mark.parametrize(
    "part", [Experiment, Variant, MetricSettings, Guardrail, Bandit, ShadowSettings]
)
def test_everything_is_described(part: type[BaseModel]) -> None:
    assert all(field.description for field in part.model_fields.values())
