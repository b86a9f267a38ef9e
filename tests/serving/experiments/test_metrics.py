"""Metrics and what is guarded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mergeroute.serving.experiments.metrics import BUILT_IN, Guardrail, MetricSettings


def test_what_is_always_recorded_is_guarded_against_more() -> None:
    assert {"latency_ms", "error", "truncated", "abstained"} <= BUILT_IN.keys()
    assert {metric.direction for metric in BUILT_IN.values()} == {"down"}
    assert all(name == metric.name for name, metric in BUILT_IN.items())


@pytest.mark.parametrize("stated", [{}, {"max_increase": 0.1, "max_decrease": 0.1}])
def test_a_guardrail_looks_one_way(stated: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="max_increase or max_decrease, one of them"):
        Guardrail(metric="error", **stated)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_guardrail_is_a_distance(value: float) -> None:
    with pytest.raises(ValidationError, match="max_increase"):
        Guardrail(metric="error", max_increase=value)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\n", "a" * 65, "über"])
def test_names_of_metrics(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        MetricSettings(name=name, kind="binary", direction="up")
