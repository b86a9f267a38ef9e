"""What a router knows of modules that are replaced or come, and says of them."""

from __future__ import annotations

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Card, Query, Scorer
from mergeroute.routers.chance import Chance
from mergeroute.routers.fixed import Fixed
from mergeroute.routers.ngrams import Ngrams
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.rules import Rule, Rules
from mergeroute.routers.training import Labelled, fit

WORDS = {"low": "make {} small", "high": "shout {} loudly", "sing": "a song about {} please"}
SONGS = tuple(Query.of(text=f"hum {k} hum hum to me") for k in range(10))


def fitted(scorer: str = "prototype", **renamed: str) -> RequestRouter:
    examples = [
        Labelled(Query.of(text=words.format(input_)), name)
        for name, words in WORDS.items()
        for input_ in ("cat", "dog", "bird", "cow", "horse", "fish", "worm", "hen")
    ]
    found = fit(scorer, Ngrams(64), examples, modules=tuple(WORDS))
    return RequestRouter(found, Policy.parse("softmax | top_k(1) | quantise"), renamed=renamed)


def asked(name: str) -> Query:
    return Query.of(text=WORDS[name].format("goose"))


@pytest.mark.parametrize("scorer", ["prototype", "retriever", "mlp"])
def test_what_was_learned_of_a_module_goes_with_it(scorer: str) -> None:
    router = fitted(scorer)
    assert router.route(asked("sing")).best == "sing"
    replaced = router.with_module(Card("sing"))
    assert replaced.modules == ("low", "high")
    assert replaced.route(asked("sing")).best != "sing"
    assert replaced.route(asked("low")).best == "low"


def test_the_same_module_again_stays_known_and_samples_replace_a_fit() -> None:
    router = fitted()
    assert router.with_module(Card("sing"), is_same=True).route(asked("sing")).best == "sing"
    for is_same in (False, True):
        decision = router.with_module(Card("sing", SONGS), is_same=is_same).route(SONGS[3])
        assert decision.best == "sing"
        assert decision.basis == {"sing": "10 samples"}
        assert decision.reason.endswith("sing is known by 10 samples")


def test_of_a_folded_module_that_is_replaced_nothing_old_is_left() -> None:
    router = fitted(low="both", high="both")
    assert router.route(asked("low")).reason.endswith("low is folded into both")
    replaced = router.with_module(Card("both", SONGS))
    assert replaced.modules == ("sing", "both")
    assert replaced.scorer.modules == ("sing", "both")
    decision = replaced.route(SONGS[3])
    assert decision.best == "both"
    assert decision.basis == {"both": "10 samples"}
    assert "folded" not in decision.reason
    assert router.with_module(Card("both")).modules == ("sing",)


@pytest.mark.parametrize(
    "scorer",
    [
        Fixed(Blend({"low": 0.5, "high": 0.5})),
        Chance(("low", "high")),
        Rules((Rule("low", keyword=("small",)), Rule("high", keyword=("loudly",)))),
    ],
)
def test_what_was_not_learned_from_a_module_stays_when_it_is_replaced(scorer: Scorer) -> None:
    policy = Policy.parse("softmax | top_k(1) | quantise")
    for renamed in ({}, {"low": "both", "high": "both"}):
        router = RequestRouter(scorer, policy, renamed=renamed)
        replaced = router.with_module(Card(renamed.get("low", "low")))
        assert set(replaced.modules) == set(router.modules)
        for name in ("low", "high"):
            assert replaced.route(asked(name)).blend == router.route(asked(name)).blend
