"""The fixed scorer: its blend, whatever is asked."""

from __future__ import annotations

from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Card, Query
from mergeroute.routers.fixed import Fixed


def test_every_query_gets_the_blend_for_certain() -> None:
    scorer = Fixed(Blend({"a": 0.75, "b": -0.25}))
    for text in ("", "hello", "a"):
        scores = scorer.score(Query.of(text=text))
        assert scores.logits == {"a": 0.75, "b": -0.25}
        assert scores.is_certain
    assert scorer.modules == ("a", "b")
    assert scorer.signals == ()


def test_a_module_that_goes_leaves_the_others_their_weights() -> None:
    scorer = Fixed(Blend({"a": 0.75, "b": 0.25})).without_module("a")
    assert scorer.score(Query.of()).logits == {"b": 0.25}
    assert scorer.without_module("b").score(Query.of()).logits == {}
    assert scorer.with_module(Card("a")).score(Query.of()).logits == {"a": 0.75, "b": 0.25}


def test_a_module_that_comes_gets_no_weight() -> None:
    scorer = Fixed(Blend({"a": 1.0}))
    assert scorer.with_module(Card("b", description=Query.of(text="new"))) == scorer
