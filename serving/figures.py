"""Figures of an evaluation: per task, their means, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from .asking import Outcome

AUTO, ORACLE, BACKBONE, EXPERTS = "auto", "oracle", "backbone", "experts"
Results = Mapping[str, Sequence[Outcome]]
"""Outcomes by system: auto, oracle, backbone, experts, or a merge method."""


@dataclass(frozen=True)
class Figures:
    """Of one task, or the mean over tasks. All but counts and bytes are percentages.

    scores: by system. normalised: 100 * score / the expert's score, by system; None without experts
    or where the expert scores 0.
    routed: prompts that went to their module with the largest weight. abstained: the share of a
    blend that stays on the backbone, mean over prompts. Both are None without a router.
    failed: answers the engine gave up on, over all systems.
    module_bytes: of the module's weights on disk; module_percent: of the backbone's.
    expert_bytes: of the expert's weights on disk, when experts were asked.
    """

    task: str
    prompts: int
    scores: Mapping[str, float]
    normalised: Mapping[str, float] | None = None
    routed: float | None = None
    abstained: float | None = None
    failed: int = 0
    module_bytes: int | None = None
    module_percent: float | None = None
    expert_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """An evaluation. about: bank, data, settings and versions, for the JSON document.

    systems: what was asked, in order, and what each is. left_out: tasks that have no normalised
    score because the expert scores 0. notes: sentences a reader should know.
    """

    about: Mapping[str, Any]
    systems: Mapping[str, str]
    tasks: tuple[Figures, ...]
    generic: tuple[Figures, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> Figures | None:
        """Over the tasks of modules and experts, each counting alike."""
        return mean_of(self.tasks, "mean")

    @property
    def generic_mean(self) -> Figures | None:
        """Over the tasks that no module serves."""
        return mean_of(self.generic, "generic mean")

    def document(self) -> dict[str, Any]:
        """One JSON document with every figure."""
        means = (self.mean, self.generic_mean)
        mean, generic_mean = (asdict(figures) if figures else None for figures in means)
        return {
            "object": "evaluation",
            **self.about,
            "systems": dict(self.systems),
            "tasks": [asdict(figures) for figures in self.tasks],
            "mean": mean,
            "generic": [asdict(figures) for figures in self.generic],
            "generic_mean": generic_mean,
            "normalised_left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    def tables(self) -> Iterator[Table]:
        """Scores, normalised scores when there are some, routing and bytes."""
        title = f"score in percent ({self.about['metric']})"
        yield self._table(title, lambda f: [_percent(f.scores.get(s)) for s in self.systems])
        if EXPERTS in self.systems:
            yield replace(self, generic=())._table(
                "normalised score, experts = 100",
                lambda f: [_percent((f.normalised or {}).get(s)) for s in self.systems],
            )
        columns = ("routed %", "abstained %", "failed", "module kB", "% of backbone", "expert kB")
        yield self._table("routing and bytes", _routing_and_bytes, columns=columns)

    def _table(
        self, title: str, cells: Callable[[Figures], list[str]], *, columns: Iterable[str] = ()
    ) -> Table:
        table = Table(title=title)
        table.add_column("task")
        for column in ("prompts", *(columns or self.systems)):
            table.add_column(escape(column), justify="right")
        for figures, mean in ((self.tasks, self.mean), (self.generic, self.generic_mean)):
            for row in (*figures, *filter(None, (mean,))):
                table.add_row(escape(row.task), f"{row.prompts:,}", *cells(row))
            table.add_section()
        return table


@dataclass(frozen=True)
class Bytes:
    """Bytes of weights on disk: of the backbone, of modules by name, of experts by task."""

    backbone: int
    modules: Mapping[str, int]
    experts: Mapping[str, int]


def figures_of(
    task: str, results: Results, sizes: Bytes, *, home: str | None, is_routed: bool
) -> Figures:
    """Figures of one task.

    results: of its examples, without the systems that were not asked. home: the module that serves
    the task. is_routed: whether the bank has a router.
    """
    size = None if home is None else sizes.modules.get(home)
    scores = {name: 100 * _mean([o.score for o in group]) for name, group in results.items()}
    routed = 100 * _mean([_went_to(home, outcome) for outcome in results[AUTO]])
    abstained = 100 * _mean([outcome.decision.abstained for outcome in results[AUTO]])
    return Figures(
        task=task,
        prompts=len(results[AUTO]),
        scores=scores,
        normalised=_normalised(scores),
        routed=routed if is_routed and size is not None else None,
        abstained=abstained if is_routed else None,
        failed=sum(outcome.is_failed for group in results.values() for outcome in group),
        module_bytes=size,
        module_percent=None if size is None else 100 * size / sizes.backbone,
        expert_bytes=sizes.experts.get(task),
    )


def mean_of(tasks: Sequence[Figures], name: str) -> Figures | None:
    """Means over tasks, each task counting alike; what a task lacks is left out of that mean."""
    if not tasks:
        return None
    module_bytes = _mean_known(figures.module_bytes for figures in tasks)
    expert_bytes = _mean_known(figures.expert_bytes for figures in tasks)
    return Figures(
        task=name,
        prompts=sum(figures.prompts for figures in tasks),
        scores=_means_by_name([figures.scores for figures in tasks]),
        normalised=_means_by_name([f.normalised for f in tasks if f.normalised]) or None,
        routed=_mean_known(figures.routed for figures in tasks),
        abstained=_mean_known(figures.abstained for figures in tasks),
        failed=sum(figures.failed for figures in tasks),
        module_bytes=None if module_bytes is None else round(module_bytes),
        module_percent=_mean_known(figures.module_percent for figures in tasks),
        expert_bytes=None if expert_bytes is None else round(expert_bytes),
    )


def shortfalls(scores: Mapping[str, float]) -> Iterator[str]:
    """Sentences on systems that choose nothing for a prompt and are no worse than the router.

    scores: in percent, by system.
    """
    for system, score in scores.items():
        if system not in (AUTO, ORACLE, EXPERTS) and scores[AUTO] <= score:
            name = "the backbone" if system == BACKBONE else f"{system}, the same for every prompt,"
            yield (
                f"routing does not beat {name} on this data: {AUTO} scores "
                f"{scores[AUTO]:.1f} %, {system} {score:.1f} %"
            )


def _normalised(scores: Mapping[str, float]) -> dict[str, float] | None:
    expert = scores.get(EXPERTS)
    return {name: 100 * score / expert for name, score in scores.items()} if expert else None


def _went_to(home: str | None, outcome: Outcome) -> bool:
    """Whether a module has the largest weight of the blend."""
    return home is not None and outcome.decision.best == home


def _means_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _routing_and_bytes(figures: Figures) -> list[str]:
    return [
        _percent(figures.routed),
        _percent(figures.abstained),
        str(figures.failed),
        _kilobytes(figures.module_bytes),
        _percent(figures.module_percent),
        _kilobytes(figures.expert_bytes),
    ]


def _kilobytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1000:,.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
