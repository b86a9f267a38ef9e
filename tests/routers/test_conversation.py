"""Conversations: when the blend stays, when it moves, and that every turn is decided alike."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Card, Decision, Query, Scores, Signal, Turn
from mergeroute.routers.conversation import MOST_TURNS, Stickiness, route_conversation
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter, TokenRouter, token_decision
from mergeroute.routers.token_routing import TokenRouting

MODULES = ("code", "math", "poem")
TURNS = ["code 0.9", "code 0.6", "math 0.9", "math 0.6", "poem 0.7", "far", "?", "! math"]


@dataclass(frozen=True)
class Told:
    """A scorer that is told its opinion: `code 0.9` is a share, the other modules get the rest;
    `far` is unlike any module's prompts, `?` no opinion, `! code` certain."""

    modules: tuple[str, ...] = MODULES
    name: str = "told"
    signals: tuple[Signal, ...] = ()

    def score(self, query: Query) -> Scores | None:
        first, _, second = query.text.partition(" ")
        if first == "?":
            return None
        if first == "!":
            return Scores({second: 1.0}, is_certain=True)
        share = float(second or 0.4)
        rest = (1 - share) / (len(self.modules) - 1)
        shares = {name: share if name == first else rest for name in self.modules}
        logits = {name: math.log(value) for name, value in shares.items()}
        return Scores(logits, distance=9.0 if first == "far" else 0.0, calibration=(1.0,))

    def with_module(self, card: Card) -> Told:
        return replace(self, modules=(*self.modules, card.name))

    def without_module(self, name: str) -> Told:
        return replace(self, modules=tuple(m for m in self.modules if m != name))


@dataclass(frozen=True)
class Knowing(Told):
    """One that knows prompts of no module: `code 0.3 0.6` is a share of these, too, and a prompt
    is far where it is the largest."""

    def score(self, query: Query) -> Scores | None:
        first, own, none = query.text.split(" ")
        rest = (1 - float(own) - float(none)) / (len(self.modules) - 1)
        shares = {name: float(own) if name == first else rest for name in self.modules}
        return Scores(
            {name: math.log(share) for name, share in shares.items()},
            distance=float(none) - max(shares.values()),
            calibration=(0.0,),
            none=math.log(float(none)),
        )


POLICY = Policy.parse("softmax | top_k(1) | abstain(0.01) | quantise")
ROUTER = RequestRouter(Told(), POLICY)
KNOWING = RequestRouter(Knowing(), POLICY)


def said(*texts: str) -> Query:
    return Query(tuple(Turn(text=text) for text in texts))


def decide(
    *texts: str, margin: float = 0.5, mode: str = "sticky", before: Decision | None = None
) -> Decision:
    return route_conversation(ROUTER, said(*texts), Stickiness(mode, margin), before=before)


def test_a_single_turn_is_what_the_router_says() -> None:
    assert timeless(decide("code 0.9")) == timeless(ROUTER.route(said("code 0.9")))


@pytest.mark.parametrize(
    ("texts", "best"),
    [
        (("code 0.9", "code 0.6"), "code"),
        (("code 0.9", "math 0.6"), "code"),  # leads by 0.4
        (("code 0.9", "math 0.9"), "math"),  # leads by 0.85
        (("code 0.9", "math 0.9", "code 0.6"), "math"),
        (("code 0.9", "math 0.6", "math 0.6"), "code"),
        (("code 0.9", "far"), "code"),
        (("code 0.9", "?"), "code"),
        (("far", "?"), None),
        (("far", "math 0.45"), None),
        (("far", "math 0.6"), "math"),
        (("? ", "math 0.6", "far"), "math"),
        (("code 0.9", "! math"), "math"),
        (("! math", "code 0.6"), "math"),
        (("! math", "code 0.9"), "code"),
    ],
)
def test_the_blend_stays_until_another_module_is_clearly_better(
    texts: tuple[str, ...], best: str | None
) -> None:
    assert decide(*texts).best == best


def test_the_margin_must_be_exceeded() -> None:
    assert decide("code 0.9", "math 0.6", margin=0.39).best == "math"
    assert decide("code 0.9", "math 0.6", margin=0.41).best == "code"
    assert decide("code 0.9", "math 0.999999", margin=1).best == "code"
    assert decide("code 0.9", "math 0.34", margin=0).best == "math"


def test_what_stays_is_the_blend_and_the_rest_is_of_the_new_turn() -> None:
    kept, alone = decide("code 0.9", "math 0.6"), ROUTER.route(said("math 0.6"))
    assert kept.blend == Blend({"code": 1.0})
    assert kept.confidence == pytest.approx(0.2)
    of_the_turn = replace(kept, blend=alone.blend, reason=alone.reason, confidence=alone.confidence)
    assert timeless(of_the_turn) == timeless(alone)


def test_the_confidence_is_that_of_the_blend_that_is_kept() -> None:
    assert decide("code 0.9", "code 0.6").confidence == pytest.approx(0.6)
    assert decide("code 0.9", "far").confidence == pytest.approx(1 / 3)
    assert decide("code 0.9", "?").confidence == 0.0
    assert decide("far", "math 0.45").confidence == 0.0
    assert decide("code 0.9", "math 0.9").confidence == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("texts", "best", "confidence", "words"),
    [
        (("code 0.9 0.02", "code 0.1 0.8"), None, 0.1, "leaves code=1: the backbone leads by 0.7"),
        (("code 0.9 0.02", "code 0.3 0.6"), "code", 0.3, "the backbone leads by 0.300 only"),
        (("code 0.9 0.02", "math 0.3 0.6"), None, 0.3, "the backbone leads by 0.550"),
        (("code 0.1 0.8", "math 0.5 0.4"), None, 0.4, "the backbone: math leads by 0.100 only"),
        (("code 0.1 0.8", "math 0.9 0.02"), "math", 0.9, "leaves the backbone: math leads by 0.88"),
    ],
)
def test_the_backbone_competes_with_what_the_modules_leave(
    texts: tuple[str, ...], best: str | None, confidence: float, words: str
) -> None:
    decision = route_conversation(KNOWING, said(*texts), Stickiness(patience=1))
    assert decision.best == best
    assert decision.confidence == pytest.approx(confidence)
    assert words in decision.reason


def test_a_conversation_comes_back_from_the_backbone() -> None:
    turns = ["code 0.9 0.02", "code 0.1 0.8", "code 0.9 0.02"]
    stickiness = Stickiness(patience=1)
    best = [route_conversation(KNOWING, said(*turns[:k]), stickiness).best for k in range(1, 4)]
    assert best == ["code", None, "code"]


def test_the_backbone_takes_over_after_turns_in_a_row_that_are_no_module_s() -> None:
    own, stray = "code 0.9 0.02", "code 0.1 0.8"
    turns = [own, stray, own, stray, stray, stray, own]
    before, best = None, []
    for k, text in enumerate(turns, 1):
        whole = route_conversation(KNOWING, said(*turns[:k]), Stickiness())
        before = route_conversation(KNOWING, said(text), Stickiness(), before=before)
        assert timeless(whole) == timeless(before)
        best.append(whole.best)
    assert best == ["code", "code", "code", "code", None, None, "code"]


def test_a_turn_that_strays_says_how_many_the_backbone_needs() -> None:
    decision = route_conversation(KNOWING, said("code 0.9 0.02", "code 0.1 0.8"), Stickiness())
    assert "the backbone on 2 turns in a row" in decision.reason


def test_a_patience_of_no_turns_is_refused() -> None:
    with pytest.raises(RouterError, match="patience 0 is too small: 1 turn or more"):
        Stickiness(patience=0)


def test_at_the_largest_margin_no_backbone_moves_it() -> None:
    turns = said("code 0.9 0.02", "code 0.001 0.99")
    assert route_conversation(KNOWING, turns, Stickiness(margin=1)).best == "code"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("code 0.9", "math 0.6"), ["keeps code=1", "math leads by 0.400 only", "more than 0.5"]),
        (("code 0.9", "far"), ["keeps code=1", "names no module", "distance 9 is above 1"]),
        (("code 0.9", "?"), ["keeps code=1", "names no module", "no rule matches"]),
        (("far", "math 0.4"), ["keeps the backbone", "math leads by 0.400 only"]),
        (("code 0.9", "math 0.9"), ["math scores best", "leaves code=1", "leads by 0.850"]),
        (("far", "math 0.9"), ["math scores best", "leaves the backbone"]),
    ],
)
def test_the_reason_says_what_stays_and_why(texts: tuple[str, ...], words: list[str]) -> None:
    reason = decide(*texts).reason
    assert all(word in reason for word in words), reason


def test_a_blend_of_several_stays_as_it_was() -> None:
    router = replace(ROUTER, policy=Policy.parse("softmax | top_p(0.9) | quantise"))
    first = router.route(said("code 0.8"))
    kept = route_conversation(router, said("code 0.8", "code 0.6"), Stickiness())
    assert len(first.blend) == 2
    assert kept.blend == first.blend != router.route(said("code 0.6")).blend
    assert "code is still best" in kept.reason


def test_each_turn_routes_the_last_one_alone() -> None:
    decision = decide("code 0.9", "math 0.6", mode="each-turn", before=decide("code 0.9"))
    assert timeless(decision) == timeless(ROUTER.route(said("math 0.6")))


def test_the_decision_before_stands_for_the_turns_that_are_not_sent() -> None:
    turns = ["code 0.9", "math 0.6", "math 0.9", "code 0.6"]
    before = None
    for k, text in enumerate(turns, 1):
        before = decide(text, before=before)
        assert timeless(before) == timeless(decide(*turns[:k]))
    assert decide("math 0.9", "code 0.6", before=decide("poem 0.7")).best == "poem"


def test_a_module_that_is_gone_is_not_kept() -> None:
    smaller = ROUTER.without_module("code")
    before = decide("code 0.9")
    decision = route_conversation(smaller, said("math 0.6"), Stickiness(), before=before)
    assert decision.best == "math"


def test_routing_by_token_is_neither_kept_nor_held_up() -> None:
    by_token = token_decision(TokenRouting("arrow"))
    assert decide("math 0.4", before=by_token).best == "math"
    assert decide("far", before=by_token).token_routing is None
    router = TokenRouter(TokenRouting("arrow"))
    decision = route_conversation(router, said("?"), Stickiness(), before=decide("code 0.9"))
    assert timeless(decision) == by_token


@given(st.lists(st.sampled_from(TURNS), min_size=1, max_size=MOST_TURNS), st.data())
def test_a_turn_is_decided_as_when_it_was_the_last(turns: list[str], data: st.DataObject) -> None:
    """Going on from the decision of any earlier turn is the same as beginning at the first."""
    margin = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    k = data.draw(st.integers(1, len(turns)))
    decision = decide(*turns[:k], margin=margin)
    for text in turns[k:]:
        decision = decide(text, margin=margin, before=decision)
    assert timeless(decision) == timeless(decide(*turns, margin=margin))


def test_a_long_conversation_begins_at_the_same_turn_for_half_of_the_bound() -> None:
    vague = ["math 0.6", "poem 0.6"] * MOST_TURNS
    best = [decide(*vague[:k]).best for k in range(MOST_TURNS + 1, len(vague))]
    changes = sum(a != b for a, b in itertools.pairwise(best))
    assert changes <= len(best) // (MOST_TURNS // 2)


def test_a_long_conversation_is_looked_at_in_part() -> None:
    routed: list[int] = []

    @dataclass(frozen=True)
    class Counted(RequestRouter):
        def route(self, query: Query) -> Decision:
            routed.append(len(query.turns))
            return super().route(query)

    router = Counted(Told(), ROUTER.policy)
    for count in (1, MOST_TURNS, MOST_TURNS + 1, 5 * MOST_TURNS + 7):
        routed.clear()
        route_conversation(router, said(*["code 0.9"] * count), Stickiness())
        assert routed == list(range(routed[0], count + 1))
        assert min(count, MOST_TURNS // 2) < len(routed) + 1 <= MOST_TURNS + 1


@pytest.mark.parametrize(
    ("mode", "margin", "message"),
    [
        ("glued", 0.5, "'glued' is unknown: sticky, each-turn"),
        ("sticky", -0.1, "-0.1 is out of range"),
        ("sticky", 1.1, "1.1 is out of range"),
        ("sticky", math.nan, "nan is out of range"),
    ],
)
def test_bad_stickiness_is_refused(mode: str, margin: float, message: str) -> None:
    with pytest.raises(RouterError, match=message):
        Stickiness(mode, margin)


def timeless(decision: Decision) -> Decision:
    return replace(decision, milliseconds=0.0)
