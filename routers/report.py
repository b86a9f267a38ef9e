"""How right a router is, how sure, and what it leaves alone: figures of its decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from .base import Decision
from .calibration import ReliabilityBin, calibration_error, reliability
from .policy_steps import ranked

NONE = "none"
"""Stands for the backbone in tables; no module may be called so."""


@dataclass(frozen=True)
class Case:
    """A decision beside what is right. module: None where no module serves the prompt."""

    module: str | None
    decision: Decision

    @property
    def chosen(self) -> str | None:
        """The module that got the largest weight; None: the backbone."""
        return self.decision.best

    @property
    def favourite(self) -> str | None:
        """The module that scored best, before the router could abstain."""
        return ranked(self.decision.scores)[0][0] if self.decision.scores else None

    @property
    def is_right(self) -> bool:
        """Whether it went where it belongs."""
        return self.chosen == self.module


@dataclass(frozen=True)
class ModuleFigures:
    """Of one module; shares are in [0, 1].

    accuracy: of its prompts, those that went to it. before: those that it scored best for.
    rejected: those left to the backbone. precision: of what went to it, what belongs there. f1:
    the harmonic mean of accuracy and precision. None: there is nothing to count.
    """

    module: str
    prompts: int
    accuracy: float | None
    before: float | None
    rejected: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class RouterReport:
    """Figures of many decisions; shares are in [0, 1], and None where there is nothing to count.

    own, none: prompts of modules, and prompts that no module serves.
    accuracy: of the modules' prompts, those that went where they belong; one left to the backbone
    is wrong. before: the same before the router could abstain.
    macro_f1: mean over modules, and over none where there are such prompts.
    calibration_error: how far confidences are from `before`, expected: over the modules' prompts,
    and over all where confidences leave a share to no module.
    auroc: how well the distance ranks prompts of none above those of modules: 1 is perfect.
    rejected: of the modules' prompts, those left to the backbone. kept: of the none prompts.
    labels, confusion: [right, chosen] counts, in this order.
    """

    own: int
    none: int
    accuracy: float | None
    before: float | None
    macro_f1: float | None
    calibration_error: float | None
    auroc: float | None
    rejected: float | None
    kept: float | None
    modules: tuple[ModuleFigures, ...]
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    bins: tuple[ReliabilityBin, ...]

    def document(self) -> dict[str, Any]:
        """A JSON value with every figure."""
        return asdict(self)


def report(cases: Sequence[Case], *, modules: Sequence[str]) -> RouterReport:
    """Figures of decisions. Where layers choose for every token nothing is decided, and what was
    decided so does not count.

    modules: that have a row, in order; others that cases name come after them.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2 (expected calibration error).
    """
    cases = [case for case in cases if case.decision.token_routing is None]
    own = [case for case in cases if case.module is not None]
    none = [case for case in cases if case.module is None]
    named = [name for case in cases for name in (case.module, case.chosen) if name]
    labels = (*dict.fromkeys((*modules, *named)), NONE)
    table = _per_label(cases, labels)
    sure = [case for case in (cases if any(map(_leaves_a_share, cases)) else own) if case.favourite]
    bins = reliability(
        [case.decision.confidence for case in sure],
        [case.favourite == case.module for case in sure],
    )
    return RouterReport(
        own=len(own),
        none=len(none),
        accuracy=share([case.is_right for case in own]),
        before=share([case.favourite == case.module for case in own]),
        macro_f1=_macro_f1(table, labels if none else labels[:-1]),
        calibration_error=calibration_error(bins) if bins else None,
        auroc=_auroc(own, none),
        rejected=share([case.chosen is None for case in own]),
        kept=share([case.chosen is None for case in none]),
        modules=tuple(_module_figures(own, name, *table[name]) for name in labels[:-1]),
        labels=labels,
        confusion=_confusion(cases, labels),
        bins=tuple(bins),
    )


def share(found: Sequence[bool]) -> float | None:
    """The share of them that hold; None of none at all."""
    return sum(found) / len(found) if found else None


def _leaves_a_share(case: Case) -> bool:
    """Whether the confidences allow for no module at all."""
    scores = case.decision.scores.values()
    return not case.decision.is_certain and bool(scores) and sum(scores) < 1 - 1e-6


def _per_label(
    cases: Sequence[Case], labels: Sequence[str]
) -> dict[str, tuple[float | None, float | None]]:
    """Precision and F1 of each label; None where nothing went there, or nothing belongs there."""
    if not cases:
        return dict.fromkeys(labels, (None, None))
    precision, _, f1, support = precision_recall_fscore_support(
        [case.module or NONE for case in cases],
        [case.chosen or NONE for case in cases],
        labels=list(labels),
        zero_division=0.0,
    )
    chosen = {case.chosen or NONE for case in cases}
    return {
        name: (
            float(precision[k]) if name in chosen else None,
            float(f1[k]) if support[k] else None,
        )
        for k, name in enumerate(labels)
    }


def _macro_f1(
    table: dict[str, tuple[float | None, float | None]], labels: Sequence[str]
) -> float | None:
    """Mean over the labels that prompts belong to."""
    known = [f1 for name in labels if (f1 := table[name][1]) is not None]
    return sum(known) / len(known) if known else None


def _module_figures(
    own: Sequence[Case], name: str, precision: float | None, f1: float | None
) -> ModuleFigures:
    cases = [case for case in own if case.module == name]
    return ModuleFigures(
        module=name,
        prompts=len(cases),
        accuracy=share([case.is_right for case in cases]),
        before=share([case.favourite == name for case in cases]),
        rejected=share([case.chosen is None for case in cases]),
        precision=precision,
        f1=f1,
    )


def _auroc(own: Sequence[Case], none: Sequence[Case]) -> float | None:
    """Over the cases that have a distance."""
    near, far = (
        [c.decision.distance for c in cases if c.decision.distance is not None]
        for cases in (own, none)
    )
    if not (near and far):
        return None
    return float(roc_auc_score([0] * len(near) + [1] * len(far), near + far))


def _confusion(cases: Sequence[Case], labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    if not cases:
        return tuple((0,) * len(labels) for _ in labels)
    matrix = confusion_matrix(
        [case.module or NONE for case in cases],
        [case.chosen or NONE for case in cases],
        labels=list(labels),
    )
    return tuple(tuple(map(int, row)) for row in matrix)
