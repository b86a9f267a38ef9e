"""Metrics: what an answer is worth, in [0, 1]."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..adapters.errors import MergerouteError
from ..routers.data import Example


class MetricError(MergerouteError):
    """A metric that cannot be computed here."""


class MetricName(StrEnum):
    """How answers are scored."""

    EXACT = "exact"
    ROUGE_L = "rouge-l"
    ACCURACY = "accuracy"


@dataclass(frozen=True)
class Answer:
    """What a model said. is_ended: it ended by itself, it did not run into the limit."""

    text: str
    is_ended: bool = True


Metric = Callable[[Answer, Example], float]
"""An answer and the line it answers, which states what is right, to a score in [0, 1]."""


def metric(name: MetricName) -> Metric:
    """The metric of a name.

    Raises:
        MetricError: it needs a package that is not installed.
    """
    return (
        _rouge_l() if name is MetricName.ROUGE_L else {"exact": exact, "accuracy": accuracy}[name]
    )


def exact(answer: Answer, example: Example) -> float:
    """1 when the text is the right one, surrounding white space aside, and the model ended there.

    A text that runs into the limit may only look right: the next token would have spoiled it.
    """
    return float(answer.is_ended and answer.text.strip() == _right(example).strip())


def accuracy(answer: Answer, example: Example) -> float:
    """1 when the label is the right one.

    With options, the option that the text begins with is the label: as a whole word, the longest
    one if several fit. Without, all of the text is. Case, surrounding white space and punctuation
    at the end do not count, nor does whether the model ended.
    """
    if example.options:
        return float(chosen_option(answer.text, example.options) == _right(example))
    return float(_label(answer.text) == _label(_right(example)))


def chosen_option(text: str, options: Sequence[str]) -> str | None:
    """The longest option that the text begins with, as a whole word; None when there is none."""
    said = text.casefold().strip()
    fitting = [option for option in options if _begins_with(said, option.casefold().strip())]
    return max(fitting, key=len, default=None)


def _begins_with(text: str, start: str) -> bool:
    """`yes` begins `yes, sir` but not `yesterday`."""
    following = text[len(start) : len(start) + 1]
    is_cut = start[-1:].isalnum() and following.isalnum()
    return text.startswith(start) and not is_cut


def _label(text: str) -> str:
    """Without case and what surrounds it; punctuation alone stays."""
    bare = text.casefold().strip()
    return bare.rstrip(string.punctuation + string.whitespace) or bare


class _Words:
    """Words are runs of letters and digits of any script; the library's own are ASCII."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case."""
        return re.findall(r"[^\W_]+", text.lower())


def _rouge_l() -> Metric:
    """ROUGE-L: F1 of the longest common subsequence of words, by Google's rouge-score.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MetricError(
            "metric 'rouge-l' needs the package rouge-score: pip install 'mergeroute[eval]'"
        ) from error
    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())

    def rouge_l(answer: Answer, example: Example) -> float:
        return float(scorer.score(_right(example), answer.text)["rougeL"].fmeasure)

    return rouge_l


def _right(example: Example) -> str:
    assert example.answer is not None
    return example.answer
