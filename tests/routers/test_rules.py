"""Rules: every condition, the order, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Card, Query, Turn
from mergeroute.routers.rules import Rule, Rules


def sent_to(rules: Rules, text: str = "", labels: Mapping[str, str] | None = None) -> object:
    """Where a prompt goes: a module, None for the backbone, or `no opinion`."""
    scores = rules.score(Query((Turn((), text),), labels or {}))
    if scores is None:
        return "no opinion"
    assert scores.is_certain
    return next(iter(scores.logits.items()), (None, 1.0))[0]


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("as JSON please", True),
        ("json", True),
        ("(json)", True),
        ("to json.", True),
        ("jsonify", False),
        ("my_json", False),
        ("", False),
        ("comma  separated\nvalues", True),
        ("comma separated values2", False),
        ("C++ code", True),
        ("c+ code", False),
        ("un CAFÉ", True),
        ("cafés", False),
    ],
)
def test_keywords_are_whole_words_in_any_letter_case(text: str, matches: bool) -> None:
    rule = Rule("m", keyword=("json", "Comma separated values", "c++", "café"))
    assert sent_to(Rules((rule,)), text) == ("m" if matches else "no opinion")


@given(word=st.text().filter(lambda text: bool(text.split())))
def test_any_text_can_be_a_keyword_and_finds_itself(word: str) -> None:
    assert sent_to(Rules((Rule("m", keyword=word),)), f"say {word} now") == "m"


def test_a_regex_is_searched_in_the_last_turn() -> None:
    rules = Rules((Rule("date", regex=r"\d{4}-\d\d-\d\d"),))
    assert sent_to(rules, "When is 2024-02-29?") == "date"
    assert sent_to(rules, "When is 29 February?") == "no opinion"
    query = Query((Turn((), "2024-02-29"), Turn((), "thanks")))
    assert rules.score(query) is None


def test_no_regex_takes_long() -> None:
    rules = Rules((Rule("m", regex=r"(a+)+$"), Rule("n", regex=r"(.*)*x")))
    started = time.perf_counter()
    assert sent_to(rules, "a" * 100_000 + "b") == "no opinion"
    assert time.perf_counter() - started < 5  # a backtracking engine would not end at all


@given(text=st.text(st.characters()))
def test_any_text_can_be_asked(text: str) -> None:
    rules = Rules((Rule("m", regex=r"\pL"), Rule("n", keyword="json")))
    assert sent_to(rules, text) in ("m", "n", "no opinion")
    assert sent_to(rules, text + "\ud800 é") == "m"


def test_metadata_and_headers_are_compared_exactly() -> None:
    rules = Rules(
        (
            Rule("gold", metadata={"tier": "gold"}),
            Rule("team", header={"X-Team": ("search", "ads")}),
        )
    )
    assert sent_to(rules, labels={"tier": "gold"}) == "gold"
    assert sent_to(rules, labels={"header:x-team": "ads"}) == "team"
    assert sent_to(rules, labels={"header:tier": "gold", "x-team": "ads"}) == "no opinion"
    assert sent_to(rules, labels={"tier": "gol", "header:x-team": "Ads"}) == "no opinion"


def test_all_conditions_of_a_rule_must_hold() -> None:
    rules = Rules((Rule("m", keyword="json", regex="^to", metadata={"tier": "gold"}),))
    assert sent_to(rules, "to json", {"tier": "gold"}) == "m"
    assert sent_to(rules, "as json", {"tier": "gold"}) == "no opinion"
    assert sent_to(rules, "to json") == "no opinion"
    assert sent_to(rules, "to yaml", {"tier": "gold"}) == "no opinion"


def test_the_first_match_wins_and_says_why() -> None:
    rules = Rules((Rule("a", keyword="x"), Rule(None, keyword=["y", "z"]), Rule("c", regex="")))
    assert sent_to(rules, "x y") == "a"
    assert sent_to(rules, "y") is None
    assert sent_to(rules, "") == "c"
    scores = rules.score(Query.of(text="Z!"))
    assert scores is not None
    assert scores.reason == "rule 2 (keyword 'Z') matches"
    assert rules.modules == ("a", "c")


def test_rules_of_a_module_that_is_not_served_do_not_count() -> None:
    rules = Rules((Rule("a", keyword="x"), Rule("b", regex="x")))
    gone = rules.without_module("a")
    assert sent_to(gone, "x") == "b"
    assert gone.modules == ("b",)
    scores = gone.score(Query.of(text="x"))
    assert scores is not None
    assert scores.reason.startswith("rule 2 ")
    assert sent_to(gone.with_module(Card("a")), "x") == "a"
    assert gone.with_module(Card("other")) == gone


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (Rule("m"), "no condition"),
        (Rule("m", keyword=()), "keyword has no value"),
        (Rule("m", keyword=["json", " "]), "keyword is empty"),
        (Rule("m", regex="("), "missing \\)"),
        (Rule("m", regex="(?=json)"), "look-around"),
        (Rule("m", regex=r"(a)\1"), "back-references"),
        (Rule("m", regex="\ud800"), "regex"),
        (Rule("m", metadata={"tier": ()}), "metadata tier has no value"),
        (Rule("m", header={"X-Team": []}), "header x-team has no value"),
        (Rule("m", header={"Authorization": "Bearer x"}), "header authorization holds a secret"),
        (Rule("m", keyword="json", header={"cookie": "x"}), "header cookie holds a secret"),
        (Rule("", keyword="json"), "no module name"),
    ],
)
def test_what_cannot_be_used_is_refused_by_number(rule: Rule, problem: str) -> None:
    with pytest.raises(RouterError, match=f"rule 2 cannot be used: .*{problem}"):
        Rules((Rule("m", keyword="json"), rule))
