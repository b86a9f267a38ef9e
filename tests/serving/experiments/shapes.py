"""Experiments and requests that tests are made of, and hypothesis strategies for weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from mergeroute.serving.access.callers import ANYBODY, Caller
from mergeroute.serving.experiments.allocation import allocate
from mergeroute.serving.experiments.definition import Experiment
from mergeroute.serving.experiments.enrolment import Running
from mergeroute.serving.experiments.hashing import BUCKETS
from mergeroute.serving.experiments.units import Facts

HALVES = (
    {"name": "control", "target": "zoo-ties", "weight": 0.5, "control": True},
    {"name": "routed", "target": "zoo", "weight": 0.5},
)
SECRET = "of the database"
property_of = settings(deadline=None, max_examples=50)
"""Examples are of 10,000 buckets each, on machines that may be busy."""
KEYED = Caller("app", frozenset(("inference",)))


def experiment(**given: Any) -> Experiment:
    """Two halves, unless stated."""
    return Experiment.model_validate({"name": "ties", "salt": "s", "variants": HALVES, **given})


def running(document: Experiment, **given: Any) -> Running:
    """As it was created, on its share of an empty layer."""
    whole = ((0, round(document.traffic * BUCKETS)),)
    stated = {"version": 3, "allocation": allocate(document.weights), "ranges": whole, **given}
    return Running(document, **stated)


def facts(
    *, headers: Mapping[str, str] | None = None, caller: Caller = ANYBODY, **given: Any
) -> Facts:
    """A request."""
    return Facts(headers or {}, caller, **{"request_id": "r-1", **given})


@st.composite
def weights(draw: st.DrawFn, names: tuple[str, ...] = ("a", "b", "c", "d")) -> dict[str, float]:
    """Shares in whole buckets; some may be 0."""
    size = len(names) - 1
    cuts = draw(st.lists(st.integers(0, BUCKETS), min_size=size, max_size=size))
    edges = [0, *sorted(cuts), BUCKETS]
    sizes = [high - low for low, high in pairwise(edges)]
    return {name: size / BUCKETS for name, size in zip(names, sizes, strict=True)}
