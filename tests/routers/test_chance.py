"""The control: even, repeatable, and others' prompts stay where they are."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mergeroute.routers.base import Card, Query, Turn
from mergeroute.routers.chance import Chance

MODULES = ("a", "b", "c", "d")


def drawn(scorer: Chance, query: Query) -> str:
    scores = scorer.score(query)
    assert scores.is_certain
    [(name, weight)] = scores.logits.items()
    assert weight == 1.0
    return name


@pytest.mark.parametrize("seed", [0, 1])
def test_modules_are_drawn_evenly(seed: int) -> None:
    scorer = Chance(MODULES, seed)
    counts = Counter(drawn(scorer, Query.of((k,), f"prompt {k}")) for k in range(4000))
    assert chisquare([counts[name] for name in MODULES]).pvalue > 0.001


@given(text=st.text(st.characters()), seed=st.integers(0, 9))
def test_one_prompt_gets_one_module_and_its_history_does_not_count(text: str, seed: int) -> None:
    query = Query.of((1, 2), text)
    longer = Query((Turn((3,), "before"), *query.turns), {"header:x": "y"})
    assert drawn(Chance(MODULES, seed), query) == drawn(Chance(MODULES, seed), longer)


def test_seeds_draw_anew() -> None:
    queries = [Query.of(text=str(k)) for k in range(400)]
    same = [drawn(Chance(MODULES, 0), q) == drawn(Chance(MODULES, 1), q) for q in queries]
    assert 0.15 < sum(same) / len(same) < 0.35


@given(text=st.text(), module=st.sampled_from(MODULES))
def test_only_prompts_of_a_module_that_goes_or_comes_change_hands(text: str, module: str) -> None:
    query, scorer = Query.of(text=text), Chance(MODULES)
    before, after = drawn(scorer, query), drawn(scorer.without_module(module), query)
    assert after != module
    assert after == before or before == module
    assert drawn(scorer.without_module(module).with_module(Card(module)), query) == before


def test_without_modules_nothing_is_drawn() -> None:
    scores = Chance(()).score(Query.of(text="hello"))
    assert scores.logits == {}
    assert scores.is_certain
    assert Chance(("a",)).with_module(Card("a")).modules == ("a",)
