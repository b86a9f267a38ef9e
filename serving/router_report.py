"""A router's figures and decisions for people: tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from ..routers.base import Decision, Query
from ..routers.policy_steps import ranked
from ..routers.report import NONE, RouterReport
from ..routers.router import RequestRouter, Router
from .fitting import FittedRouter
from .router_evaluation import RouterEvaluation, TaskScores

_SHOWN_SCORES = 5
_SHOWN_MISTAKES = 5
_SMALL = 5e-5


def fit_lines(router: FittedRouter) -> Iterator[str]:
    """What was fitted, and what a fifth of the prompts told, in short."""
    settings = router.settings
    equal = f"; {router.equal:,} given again count once" if router.equal else ""
    yield (
        f"{settings.scorer} router fitted on {router.own:,} prompts of modules and "
        f"{router.none:,} of none{equal}; policy {settings.policy}"
    )
    if not router.none:
        yield (
            "without prompts that no module serves it knows the modules' prompts by their wording, "
            "and may reject others: give some (docs/routers.md)"
        )
    if router.trial is None:
        yield "prompts were too few to measure it: give at least 10 of each module"
        return
    found = router.trial.report
    yield (
        f"measured on a fifth, by a router fitted on the rest: accuracy {percent(found.accuracy)}, "
        f"rejected {percent(found.rejected)}, none kept on the backbone {percent(found.kept)}"
    )


def fit_tables(router: FittedRouter) -> Iterator[Table | str]:
    """The same with every figure."""
    yield from fit_lines(router)
    if router.trial:
        yield from report_tables(router.trial.report)


def evaluation_tables(evaluation: RouterEvaluation) -> Iterator[Table | str]:
    """Figures, and scores of answers where there are some."""
    yield from report_tables(evaluation.report)
    if evaluation.means:
        yield _answers(evaluation)
    for note in evaluation.notes:
        yield f"note: {note}"


def report_tables(report: RouterReport) -> Iterator[Table | str]:
    """All figures, a row per module, and what was mistaken for what."""
    table = Table(title=f"router: {report.own:,} prompts of modules, {report.none:,} of none")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, text in _figures(report):
        table.add_row(name, text)
    yield table
    yield _modules(report)
    if mistakes := _mistakes(report):
        yield f"most often mistaken: {mistakes}"


def explanation(decision: Decision, rate: float | None) -> list[str]:
    """A decision in lines: what, why, and what would change it. rate: see `abstaining_rate`."""
    blend = decision.blend.weights_text if decision.blend else "none (the backbone)"
    lines = [
        f"blend       {blend}",
        f"decided by  {decision.router}, in {decision.milliseconds:.1f} ms",
        f"reason      {decision.reason}",
        f"confidence  {decision.confidence:.4f}, abstained {decision.abstained:g}",
    ]
    lines += _scores(decision)
    if decision.distance is not None:
        lines.append(f"distance    {_distance(decision)}")
    if decision.typicality is not None:
        lines.append(
            f"typicality  {decision.typicality:.4f}: the share of held-out prompts of the modules "
            "that count as at least as unlike"
        )
    lines += [f"basis       {name}: {basis}" for name, basis in decision.basis.items()]
    changes = [*_changes(decision, rate)]
    return [*lines, "what would change it", *(f"  {change}" for change in changes)]


def abstaining_rate(router: Router, query: Query) -> float | None:
    """The smallest rate of `abstain` that leaves a query to the backbone: 0 where every rate does,
    1 where none does, None where the router measures no distance.
    """
    scores = router.scorer.score(query) if isinstance(router, RequestRouter) else None
    if scores is None or scores.distance is None or not scores.calibration:
        return None
    distances, distance = scores.calibration, scores.distance
    farther = sum(other >= distance for other in distances)
    return (farther + 1) / (len(distances) + 1) if farther else 0.0


def _figures(report: RouterReport) -> Iterator[tuple[str, str]]:
    yield "accuracy (an abstention is wrong)", percent(report.accuracy)
    yield "accuracy before abstention", percent(report.before)
    yield "macro-F1", percent(report.macro_f1)
    yield "expected calibration error", number(report.calibration_error)
    yield "AUROC of abstention", number(report.auroc)
    yield "modules' prompts rejected", percent(report.rejected)
    yield "none prompts kept on the backbone", percent(report.kept)


def _modules(report: RouterReport) -> Table:
    table = Table(title="modules")
    columns = ("module", "prompts", "accuracy", "before", "rejected", "precision", "F1")
    for column in columns:
        table.add_column(column, justify="left" if column == "module" else "right")
    for row in report.modules:
        shares = (row.accuracy, row.before, row.rejected, row.precision, row.f1)
        table.add_row(escape(row.module), f"{row.prompts:,}", *map(percent, shares))
    return table


def _mistakes(report: RouterReport) -> str:
    """The most frequent ones."""
    counts = [
        (count, right, chosen)
        for right, row in zip(report.labels, report.confusion, strict=True)
        for chosen, count in zip(report.labels, row, strict=True)
        if count and chosen != right
    ]
    most = sorted(counts, key=lambda entry: -entry[0])[:_SHOWN_MISTAKES]
    return ", ".join(f"{right} for {chosen} ({count})" for count, right, chosen in most)


def _answers(evaluation: RouterEvaluation) -> Table:
    systems = list(evaluation.means[0].scores)
    table = Table(title=f"score in percent ({evaluation.about['metric']}), regret in points")
    table.add_column("task")
    for column in ("prompts", *systems, "regret"):
        table.add_column(column, justify="right")
    groups: Sequence[Sequence[TaskScores]] = (evaluation.own, evaluation.none, evaluation.means)
    for group in groups:
        for row in group:
            cells = [f"{row.scores[system]:.1f}" for system in systems]
            table.add_row(escape(row.task), f"{row.prompts:,}", *cells, f"{row.regret:.1f}")
        table.add_section()
    return table


def _scores(decision: Decision) -> Iterator[str]:
    pairs = ranked(decision.scores)
    if not pairs:
        return
    shown = ", ".join(f"{name} {share:.4f}" for name, share in pairs[:_SHOWN_SCORES])
    more = f" and {len(pairs) - _SHOWN_SCORES} more" if len(pairs) > _SHOWN_SCORES else ""
    left = 1 - sum(decision.scores.values())
    none = f"; no module {left:.4f}" if left > _SMALL and not decision.is_certain else ""
    yield f"scores      {shown}{more}{none}"
    if len(pairs) > 1:
        gap = pairs[0][1] - pairs[1][1]
        yield f"runner-up   {pairs[1][0]}, {gap:.4f} behind"


def _distance(decision: Decision) -> str:
    assert decision.distance is not None
    if decision.threshold is None:
        return f"{decision.distance:.4g}; the policy has no abstain"
    gap = decision.threshold - decision.distance
    side = f"{gap:.4g} below" if gap >= 0 else f"{-gap:.4g} above"
    return f"{decision.distance:.4g}, {side} the threshold {decision.threshold:.4g}"


def _changes(decision: Decision, rate: float | None) -> Iterator[str]:
    """What would have to be otherwise."""
    if decision.token_routing:
        yield "nothing in the prompt as a whole: layers choose for every token"
    elif decision.is_certain:
        yield "another prompt, or router.json: a rule or a fixed blend decided, nothing was weighed"
    elif rate is None:
        yield "other scores: the router measures no distance, so it abstains from nothing"
    elif decision.threshold is None:
        yield "a policy with abstain, which this one lacks, could leave it to the backbone"
    elif rate in (0, 1):
        verb = "keeps it" if rate else "leaves it to the backbone"
        yield f"not the rate of abstain: every one {verb}"
    elif (decision.distance or 0) > decision.threshold:
        yield f"abstain(r) with r below {rate:.4g} would give it to {_best(decision)}"
    else:
        yield f"abstain(r) with r of {rate:.4g} or more would leave it to the backbone"
    pairs = ranked(decision.scores)
    total = sum(decision.scores.values())
    if len(pairs) > 1 and decision.blend and not decision.is_certain and pairs[1][1] > _SMALL:
        share = pairs[0][1] / total
        yield f"top_p(p) with p above {share:.4g} would let {pairs[1][0]} join"


def _best(decision: Decision) -> str:
    return ranked(decision.scores)[0][0] if decision.scores else NONE


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """A figure between 0 and 1."""
    return "-" if value is None else f"{value:.4f}"
