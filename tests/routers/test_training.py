"""Fitting on labelled prompts, what is refused, the split, and accuracy by samples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query, Scorer, Turn
from mergeroute.routers.curve import DRAWS, draws, learning_curve
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.training import (
    SCORERS,
    Labelled,
    fit,
    fit_readings,
    read,
    split,
    without_duplicates,
)

MODULES = ("low", "high")


class Places:
    """A signal for tests: where a number lies, beside a jitter."""

    def read(self, queries: Sequence[Query]) -> Tensor:
        numbers = [int(query.text.split()[-1]) for query in queries]
        return torch.tensor([[n / 1000, (n * 7919 % 13) / 13, (n * 31 % 7) / 7] for n in numbers])


def example(number: int, module: str | None) -> Labelled:
    return Labelled(Query.of(text=f"number {number}"), module)


EXAMPLES = [
    *(example(k, "low") for k in range(40)),
    *(example(5000 + k, "high") for k in range(40)),
    *(example(2000 + k, None) for k in range(30)),
]


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_tells_modules_apart(scorer: str) -> None:
    steps: list[None] = []
    fitted = fit(scorer, Places(), EXAMPLES, modules=MODULES, step=lambda: steps.append(None))
    assert len(steps) == len(EXAMPLES)
    assert fitted.name == scorer
    assert fitted.modules == MODULES
    assert fitted.state()
    for number, name in ((45, "low"), (5045, "high")):
        assert best(fitted, number) == name


def best(scorer: Scorer, number: int) -> str:
    scores = scorer.score(example(number, None).query)
    assert scores is not None
    return max(scores.logits, key=lambda name: scores.logits[name])


def test_prompts_of_no_module_are_farther_than_the_modules_own() -> None:
    fitted = fit("prototype", Places(), EXAMPLES, modules=MODULES)
    far, near = fitted.score(example(2050, None).query), fitted.score(example(45, None).query)
    assert far is not None
    assert near is not None
    assert (far.distance or 0) > max(far.calibration)
    assert (near.distance or 0) <= max(near.calibration)


def test_equal_prompts_count_once() -> None:
    once = fit("prototype", Places(), EXAMPLES, modules=MODULES)
    thrice = fit("prototype", Places(), EXAMPLES * 3, modules=MODULES)
    assert once.score(EXAMPLES[0].query) == thrice.score(EXAMPLES[0].query)


@pytest.mark.parametrize(
    ("examples", "modules", "message"),
    [
        ([*EXAMPLES, example(3, "high")], MODULES, "'number 3' is given for 'low' and for 'high'"),
        ([*EXAMPLES, example(3, None)], MODULES, "'number 3' is given for 'low' and for no module"),
        ([e for e in EXAMPLES if e.module == "low"], ("low",), "all prompts are of 'low'"),
        (EXAMPLES, ("low",), "'high', no module"),
        (EXAMPLES, (*MODULES, "other"), "'other' has 0 prompts"),
        ([*EXAMPLES[:4], *EXAMPLES[40:]], MODULES, "'low' has 4 prompts, at least 5"),
        (EXAMPLES[:83], MODULES, "3 prompts that no module serves were given, at least 10"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(
    examples: list[Labelled], modules: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RouterError, match=message):
        fit("prototype", Places(), examples, modules=modules)


@pytest.mark.parametrize("examples", [[], EXAMPLES])
def test_without_prompts_or_modules_nothing_is_fitted(examples: list[Labelled]) -> None:
    modules = () if examples else MODULES
    message = "no modules to choose from" if examples else "no prompts to fit a router on"
    for scorer in SCORERS:
        with pytest.raises(RouterError, match=message):
            fit(scorer, Places(), examples, modules=modules)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_the_first_prompt_with_broken_features_is_named(scorer: str, poison: float) -> None:
    class Broken(Places):
        def read(self, queries: Sequence[Query]) -> Tensor:
            features = super().read(queries)
            features[features[:, 0] > 5.01, 1] = poison
            return features

    with pytest.raises(RouterError, match="'number 5011' has features that are NaN or inf"):
        fit(scorer, Broken(), EXAMPLES, modules=MODULES)


def test_one_module_is_told_from_prompts_of_none() -> None:
    only = [e for e in EXAMPLES if e.module in ("low", None)]
    fitted = fit("prototype", Places(), only, modules=("low",))
    scores = fitted.score(example(2005, None).query)
    assert scores is not None
    assert (scores.distance or 0) > max(scores.calibration)


def test_a_scorer_that_is_not_fitted_is_named() -> None:
    readings = read(Places(), EXAMPLES)
    with pytest.raises(RouterError, match="'oracle' is not fitted on prompts: prototype, mlp"):
        fit_readings("oracle", Places(), readings, modules=MODULES)


numbers = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40)


@given(found=numbers)
def test_a_prompt_stands_once_or_contradicts_itself(found: list[tuple[int, bool]]) -> None:
    examples = [example(n, "low" if is_low else None) for n, is_low in found]
    labels: dict[int, set[bool]] = {}
    for number, is_low in found:
        labels.setdefault(number, set()).add(is_low)
    if any(len(said) > 1 for said in labels.values()):
        with pytest.raises(RouterError, match="decide for one"):
            without_duplicates(examples)
    else:
        assert len(without_duplicates(examples)) == len(labels)


@given(texts=st.lists(st.text(max_size=8), max_size=60, unique=True))
def test_a_prompt_is_always_on_the_same_side(texts: list[str]) -> None:
    examples = [Labelled(Query.of(text=text), None) for text in texts]
    kept, left = split(examples)
    assert sorted(kept + left) == list(range(len(texts)))
    for place in left:
        assert split([examples[place]]) == ([], [0])


def test_a_fifth_is_held_out() -> None:
    examples = [example(k, None) for k in range(5000)]
    assert len(split(examples)[1]) / 5000 == pytest.approx(0.2, abs=0.02)
    turns = Query((Turn((1,), "a"), Turn((2,), "b")))
    assert split([Labelled(turns, None)]) in (([0], []), ([], [0]))


def test_draws_take_so_many_of_each_module_and_all_of_none() -> None:
    labels = [e.module for e in EXAMPLES]
    plan = draws(labels)
    assert [samples for samples, _ in plan] == [5, 10, 25, 40]
    for samples, sets in plan[:-1]:
        assert len(sets) == DRAWS
        assert len({tuple(places) for places in sets}) == DRAWS
        for places in sets:
            assert len(set(places)) == len(places)
            for name in MODULES:
                assert sum(labels[place] == name for place in places) == samples
            assert sum(labels[place] is None for place in places) == 30
    assert plan[-1][1] == [list(range(len(labels)))]
    assert draws(labels) == plan


def test_the_curve_measures_every_draw_on_the_same_prompts() -> None:
    signal = Places()
    readings = read(signal, EXAMPLES)
    steps: list[None] = []

    def fitted(places: Sequence[int]) -> RequestRouter:
        scorer = fit_readings("prototype", signal, readings.rows(places), modules=MODULES)
        return RequestRouter(scorer, Policy.parse("softmax | top_k(1) | quantise"))

    held_out = [example(50 + k, "low") for k in range(10)] + [example(2100, None)]
    curve = learning_curve(fitted, readings.labels, held_out, step=lambda: steps.append(None))
    assert [(point.samples, point.is_all) for point in curve] == [
        (5, False),
        (10, False),
        (25, False),
        (40, True),
    ]
    assert len(steps) == 3 * DRAWS + 1
    assert curve[-1].accuracy == curve[-1].before == (1.0,)
