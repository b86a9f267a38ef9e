"""Figures of decisions against counts by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Decision
from mergeroute.routers.report import Case, RouterReport, report
from mergeroute.routers.token_routing import TokenRouting

MODULES = ("a", "b", "c")


def decided(
    chosen: str | None,
    *,
    best: str | None = None,
    confidence: float = 0.9,
    distance: float | None = None,
) -> Decision:
    """A decision for one module; None: it abstained, though `best` scored best."""
    favourite = best or chosen or "a"
    rest = (1 - confidence) / 2
    return Decision(
        blend=Blend({chosen: 1.0}) if chosen else Blend(),
        scores={name: confidence if name == favourite else rest for name in MODULES},
        confidence=confidence,
        distance=distance,
    )


CASES = [
    Case("a", decided("a", confidence=0.95, distance=1.0)),
    Case("a", decided("b", confidence=0.6, distance=2.0)),
    Case("b", decided(None, best="b", confidence=0.8, distance=9.0)),
    Case("b", decided("b", confidence=0.95, distance=0.5)),
    Case(None, decided(None, best="c", confidence=0.5, distance=8.0)),
    Case(None, decided("c", confidence=0.7, distance=3.0)),
]


def test_figures_are_the_counts() -> None:
    found = report(CASES, modules=MODULES)
    assert (found.own, found.none) == (4, 2)
    assert (found.accuracy, found.before) == (0.5, 0.75)
    assert (found.rejected, found.kept) == (0.25, 0.5)
    # of 8 pairs of an own and a none prompt the distances rank 6 right
    assert found.auroc == 6 / 8
    assert found.labels == ("a", "b", "c", "none")
    assert found.confusion == ((1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0), (0, 0, 1, 1))
    a, b, c = found.modules
    assert (a.prompts, a.accuracy, a.before, a.precision) == (2, 0.5, 0.5, 1.0)
    assert (b.accuracy, b.before, b.rejected, b.precision, b.f1) == (0.5, 1.0, 0.5, 0.5, 0.5)
    assert (c.prompts, c.accuracy, c.rejected, c.precision, c.f1) == (0, None, None, 0.0, None)
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    gaps = abs(0.6 - 0) + abs(0.8 - 1) + abs(2 * 0.95 - 2)
    assert found.calibration_error == pytest.approx(gaps / 4)
    assert sum(each.count for each in found.bins) == 4


def test_where_confidences_leave_a_share_to_no_module_all_prompts_count() -> None:
    unsure = Decision(blend=Blend(), scores={"a": 0.02, "b": 0.01}, confidence=0.02)
    found = report([Case("a", decided("a")), Case(None, unsure)], modules=MODULES)
    assert sum(each.count for each in found.bins) == 2
    assert found.calibration_error == pytest.approx((0.1 + 0.02) / 2)


def test_what_there_is_nothing_to_count_of_is_none() -> None:
    empty = report([], modules=MODULES)
    figures = ("accuracy", "before", "macro_f1", "calibration_error", "auroc", "rejected", "kept")
    assert all(getattr(empty, name) is None for name in figures)
    assert empty.confusion == ((0, 0, 0, 0),) * 4
    own = report([Case("a", decided("a", distance=1.0))], modules=MODULES)
    assert (own.accuracy, own.auroc, own.kept) == (1.0, None, None)
    none = report([Case(None, decided(None, distance=1.0))], modules=MODULES)
    assert (none.accuracy, none.kept, none.auroc, none.macro_f1) == (None, 1.0, None, 1.0)


def test_prompts_whose_layers_choose_are_not_judged() -> None:
    token = Decision(blend=Blend(), token_routing=TokenRouting("arrow"))
    found = report([Case("a", token), Case(None, token)], modules=MODULES)
    assert (found.own, found.none, found.accuracy, found.kept) == (0, 0, None, None)


def test_a_blend_counts_by_its_largest_weight_and_unlisted_modules_get_a_row() -> None:
    mixed = Decision(blend=Blend({"x": 0.75, "a": 0.25}), scores={"x": 0.7, "a": 0.3})
    found = report([Case("x", mixed), Case("a", mixed)], modules=MODULES)
    assert found.labels == ("a", "b", "c", "x", "none")
    assert found.accuracy == 0.5


choices = st.one_of(st.none(), st.sampled_from(MODULES))
cases = st.lists(
    st.builds(
        lambda module, chosen, best, sure, distance: Case(
            module, decided(chosen, best=chosen or best, confidence=sure, distance=distance)
        ),
        choices,
        choices,
        st.sampled_from(MODULES),
        st.floats(0.4, 1),
        st.one_of(st.none(), st.floats(-1e6, 1e6)),
    ),
    max_size=40,
)


@given(found=cases)
def test_every_figure_is_a_share_or_none_and_the_document_is_json(found: list[Case]) -> None:
    figures = report(found, modules=MODULES)
    document = json.loads(json.dumps(figures.document(), allow_nan=False))
    for value in _numbers(document, skip=("own", "none", "prompts", "count", "confusion")):
        assert 0 <= value <= 1
    assert sum(map(sum, figures.confusion)) == len(found)
    _agree_with_plain_counts(figures, found)


def _agree_with_plain_counts(figures: RouterReport, found: list[Case]) -> None:
    own = [case for case in found if case.module]
    if own:
        right = sum(case.chosen == case.module for case in own)
        assert figures.accuracy == pytest.approx(right / len(own))
        assert right / len(own) <= (figures.before or 0) + 1e-12
        rejected = sum(case.chosen is None for case in own)
        assert figures.rejected == pytest.approx(rejected / len(own))


def _numbers(value: Any, *, skip: tuple[str, ...]) -> list[float]:
    if isinstance(value, dict):
        return [n for key, v in value.items() if key not in skip for n in _numbers(v, skip=skip)]
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v, skip=skip)]
    is_number = isinstance(value, int | float) and not math.isnan(value)
    return [float(value)] if is_number else []
