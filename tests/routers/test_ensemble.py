"""The ensemble: the first opinion decides, and what comes and goes does so everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Card, Query, Signal
from mergeroute.routers.chance import Chance
from mergeroute.routers.ensemble import Ensemble
from mergeroute.routers.fixed import Fixed
from mergeroute.routers.ngrams import Ngrams
from mergeroute.routers.retriever import Retriever
from mergeroute.routers.rules import Rule, Rules

SIGNAL = Ngrams(64)


def retriever(signal: Signal = SIGNAL) -> Retriever:
    texts = ["write it as json", "to json", "in german", "say it in german"]
    features = signal.read([Query.of(text=text) for text in texts])
    labels = ["json", "json", "german", "german"]
    return Retriever.fit(signal, features, labels, modules=("json", "german"))


RULES = Rules((Rule("json", keyword="json"), Rule(None, keyword="backbone")))


def test_rules_decide_first_and_what_was_learned_decides_the_rest() -> None:
    ensemble = Ensemble((RULES, retriever()))
    certain = ensemble.score(Query.of(text="german json"))
    assert certain is not None
    assert certain.is_certain
    assert certain.logits == {"json": 1.0}
    assert certain.reason.startswith("rule 1 ")
    learned, query = ensemble.score(Query.of(text="german please")), Query.of(text="german please")
    assert learned is not None
    assert learned.logits == retriever().score(query).logits
    assert learned.reason == "retriever decides"


def test_a_rule_for_the_backbone_is_an_opinion() -> None:
    scores = Ensemble((RULES, retriever())).score(Query.of(text="the backbone, in german"))
    assert scores is not None
    assert scores.logits == {}
    assert scores.is_certain


def test_without_any_opinion_there_is_none() -> None:
    empty = retriever().without_module("json").without_module("german")
    assert Ensemble((RULES,)).score(Query.of(text="hello")) is None
    assert Ensemble((RULES, empty)).score(Query.of(text="hello")) is None
    assert Ensemble((empty, Fixed(Blend({"a": 1.0})))).score(Query.of()) is not None


def test_modules_are_all_members_and_signals_stand_once() -> None:
    ensemble = Ensemble((RULES, retriever(), Chance(("x", "json"))))
    assert ensemble.modules == ("json", "german", "x")
    assert ensemble.signals == (SIGNAL,)
    assert Ensemble((retriever(), retriever())).signals == (SIGNAL,)


def test_modules_come_and_go_for_every_member() -> None:
    ensemble = Ensemble((RULES, retriever())).without_module("json")
    assert ensemble.modules == ("german",)
    scores = ensemble.score(Query.of(text="to json"))
    assert scores is not None
    assert set(scores.logits) == {"german"}
    back = ensemble.with_module(Card("json", samples=(Query.of(text="to json"),)))
    assert back.modules == ("json", "german")
    by_name_alone = ensemble.with_module(Card("json"))
    assert by_name_alone.modules == ("json", "german")  # by its rule
    assert by_name_alone.score(Query.of(text="hello")) is not None


@dataclass(frozen=True)
class Counting:
    """A signal that cannot be hashed: ensembles must not need it."""

    parts: list[int]

    def read(self, queries: object) -> torch.Tensor:
        raise NotImplementedError

    __hash__ = None  # type: ignore[assignment]


def test_signals_need_not_be_hashable() -> None:
    signal = Counting([])
    member = Retriever(signal, {})
    assert Ensemble((member, member)).signals == (signal,)


def test_an_ensemble_needs_members() -> None:
    with pytest.raises(RouterError, match="no members"):
        Ensemble(())
