"""Metrics against hand-worked cases, and ROUGE-L against a table of common subsequences."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.routers.data import Example
from mergeroute.serving.scoring import Answer, MetricError, MetricName, chosen_option, metric

TEXTS = st.text(alphabet="ab ÜßÉ.1\n", max_size=20)


def example(answer: str, options: Sequence[str] = ()) -> Example:
    fields = {"prompt": "?", "answer": answer, "options": list(options) or None}
    return Example.model_validate(fields)


def score(name: MetricName, said: str, right: str, *, is_ended: bool = True) -> float:
    return metric(name)(Answer(said, is_ended), example(right))


@pytest.mark.parametrize(
    ("said", "right", "is_ended", "expected"),
    [
        ("MCM", "MCM", True, 1),
        (" MCM\n", "MCM", True, 1),
        ("MCM", "\tMCM ", True, 1),
        ("mcm", "MCM", True, 0),
        ("M CM", "MCM", True, 0),
        ("MCM.", "MCM", True, 0),
        ("", "MCM", True, 0),
        ("MCM", "MCM", False, 0),
    ],
)
def test_exact(said: str, right: str, is_ended: bool, expected: float) -> None:
    assert score(MetricName.EXACT, said, right, is_ended=is_ended) == expected


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("Positive.", "positive", 1),
        ("  POSITIVE !?", "positive", 1),
        ("STRASSE", "Straße", 1),
        ("positive", "positive.", 1),
        ("positively", "positive", 0),
        ("positive or negative", "positive", 0),
        ("", "positive", 0),
        ("?", "!", 0),
        ("!", "!", 1),
    ],
)
def test_accuracy_of_a_label(said: str, right: str, expected: float) -> None:
    assert score(MetricName.ACCURACY, said, right) == expected
    assert score(MetricName.ACCURACY, said, right, is_ended=False) == expected


@pytest.mark.parametrize(
    ("said", "options", "chosen"),
    [
        ("B) because", ("A", "B"), "B"),
        ("yes, sir", ("yes", "no"), "yes"),
        ("Yesterday", ("yes", "no"), None),
        ("very good", ("very", "very good"), "very good"),
        ("very goodness", ("very", "very good"), "very"),
        (" \nNO.", ("yes", "no"), "no"),
        ("10", ("1", "10"), "10"),
        ("+1", ("+", "-"), "+"),
        ("perhaps", ("yes", "no"), None),
        ("", ("yes", "no"), None),
    ],
)
def test_accuracy_by_options(said: str, options: Sequence[str], chosen: str | None) -> None:
    assert chosen_option(said, options) == chosen
    for option in options:
        right = metric(MetricName.ACCURACY)(Answer(said), example(option, options))
        assert right == (option == chosen)


def slow_rouge_l(said: str, right: str) -> float:
    """F1 of the longest common subsequence, from the definition."""
    got, wanted = (re.findall(r"[^\W_]+", text.lower()) for text in (said, right))
    longest = [[0] * (len(wanted) + 1) for _ in range(len(got) + 1)]
    for i, x in enumerate(got):
        for j, y in enumerate(wanted):
            best = max(longest[i][j + 1], longest[i + 1][j])
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else best
    common = longest[-1][-1]
    return 2 * common / (len(got) + len(wanted)) if common else 0.0


@given(TEXTS, TEXTS)
@settings(max_examples=50, deadline=None)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(said: str, right: str) -> None:
    assert score(MetricName.ROUGE_L, said, right) == pytest.approx(slow_rouge_l(said, right))


def test_rouge_l_is_the_librarys_on_ascii_and_knows_other_scripts() -> None:
    rouge_scorer = import_module("rouge_score.rouge_scorer")
    said, right = "The cat sat on a mat.", "A cat lay on the mat, it sat"
    library = rouge_scorer.RougeScorer(["rougeL"]).score(right, said)["rougeL"].fmeasure
    assert score(MetricName.ROUGE_L, said, right) == library
    assert 0 < library < 1
    assert score(MetricName.ROUGE_L, "über den Äther", "Über den Äther!") == 1


def test_rouge_l_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MetricError, match=r"pip install 'mergeroute\[eval\]'"):
        metric(MetricName.ROUGE_L)


@given(TEXTS.filter(str.strip), st.sampled_from([MetricName.EXACT, MetricName.ACCURACY]))
@settings(max_examples=25, deadline=None)
def test_the_right_answer_scores_one(right: str, name: MetricName) -> None:
    assert score(name, right, right) == 1
