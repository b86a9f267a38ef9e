"""What `mergeroute router eval` measures: a bank's router, by the server's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.bank import Bank
from ..adapters.blend import UNITS
from ..adapters.build import Progress
from ..adapters.digest import file_digest
from ..adapters.errors import BankError, DataError
from ..routers.data import Example, read_examples
from ..routers.report import NONE, Case, RouterReport, report
from .asking import Asker, Outcome
from .figures import AUTO, BACKBONE, ORACLE, shortfalls
from .fitting import homes_of, read_none
from .hosting import Placement, host_banks
from .scoring import MetricName, metric
from .service import Service

UNIFORM = "uniform"


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are asked for and scored. max_tokens: most tokens of one."""

    metric: MetricName = MetricName.EXACT
    max_tokens: int = 256


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's answers in percent, by system: the router's blend (auto), the task's own
    module or the backbone where it has none (oracle), the backbone, all modules alike (uniform).
    """

    task: str
    prompts: int
    scores: Mapping[str, float]

    @property
    def regret(self) -> float:
        """What the router loses against knowing the task, in percentage points."""
        return self.scores[ORACLE] - self.scores[AUTO]

    def document(self) -> dict[str, Any]:
        """A JSON value."""
        return {**asdict(self), "regret": self.regret}


@dataclass(frozen=True)
class RouterEvaluation:
    """Figures of a router on data. about: bank and data.

    own, none: scores of the tasks of modules, and of prompts that no module serves, where answers
    were asked for. notes: sentences a reader should know.
    """

    about: Mapping[str, Any]
    cases: tuple[Case, ...]
    report: RouterReport
    own: tuple[TaskScores, ...] = ()
    none: tuple[TaskScores, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def means(self) -> tuple[TaskScores, ...]:
        """Over the tasks of modules, and over the others; each task counts alike."""
        groups = (("mean", self.own), ("mean of none", self.none))
        return tuple(_mean(name, tasks) for name, tasks in groups if tasks)

    def document(self) -> dict[str, Any]:
        """One JSON document with every figure."""
        answers = {
            "own": [task.document() for task in self.own],
            "none": [task.document() for task in self.none],
            "means": [task.document() for task in self.means],
        }
        return {
            "object": "router-evaluation",
            **self.about,
            **self.report.document(),
            "answers": answers if self.means else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Run:
    """Examples with the module that serves each, and who is asked."""

    bank: Bank
    examples: Sequence[tuple[Example, str | None]]
    asker: Asker
    progress: Progress

    @cached_property
    def homes(self) -> dict[int, str | None]:
        """The module that serves each example, by its identity."""
        return {id(example): module for example, module in self.examples}

    def cases(self) -> list[Case]:
        """What the router decides for each."""
        examples = [example for example, _ in self.examples]
        step = self.progress("routing", len(examples))
        decisions = self.asker.decide(examples, lambda _: AUTO, step=step)
        return [
            Case(module, decision)
            for (_, module), decision in zip(self.examples, decisions, strict=True)
        ]

    def answers(self) -> dict[str, list[Outcome]]:
        """What every system answers to the examples whose answer is known."""
        examples = [example for example, _ in self.examples if example.answer is not None]
        return {
            system: self.asker.ask(examples, target, step=self.progress(system, len(examples)))
            for system, target in self._systems().items()
        }

    def _systems(self) -> dict[str, Callable[[Example], str]]:
        backbone = self.bank.backbone.name
        systems: dict[str, Callable[[Example], str]] = {
            AUTO: lambda _: AUTO,
            ORACLE: lambda example: self.homes[id(example)] or backbone,
            BACKBONE: lambda _: backbone,
        }
        names = [module.name for module in self.bank.modules]
        if 1 < len(names) <= UNITS:  # weights are multiples of 1/64
            share = ",".join(f"{name}={1 / len(names)}" for name in names)
            systems[UNIFORM] = lambda _: f"blend:{share}"
        return systems


def evaluate_router(
    bank: Bank,
    data: Path,
    *,
    none: Path | None = None,
    answers: AnswerOptions | None = None,
    placement: Placement,
    progress: Progress = lambda stage, total: lambda: None,
) -> RouterEvaluation:
    """Ask a bank's router for a decision on every prompt, as a server would decide it.

    data: prompts with their task; those whose task is no module count as prompts of none. none:
    more of these. answers: also answer those prompts whose answer is known.

    Raises:
        DataError: a file, or a line of it, cannot be used, or no answer is known.
        BankError: the bank has no router.
        MergerouteError: the bank cannot be served.
    """
    if bank.router_path is None:
        raise BankError(f"bank {bank.name!r} has no router: fit one (mergeroute router fit)")
    home = homes_of(bank)
    examples = [(e, home(str(e.task))) for e in read_examples(data, needs=("task",))]
    examples += [(example, None) for example in (read_none(none, home) if none else ())]
    if answers and all(example.answer is None for example, _ in examples):
        raise DataError(f"{data} holds no answers: leave out --answers, or add them")
    said = answers or AnswerOptions()
    loaded = progress("loading the bank", 1)
    service = Service(host_banks([bank], placement))
    loaded()
    try:
        asker = Asker(service, metric(said.metric), max_tokens=said.max_tokens)
        run = _Run(bank, examples, asker, progress)
        cases = run.cases()
        outcomes = run.answers() if answers else {}
    finally:
        service.stop()
    own, others = _scores(run, outcomes)
    found = report(cases, modules=[module.name for module in bank.modules])
    return RouterEvaluation(
        about=_about(bank, data, none, answers),
        cases=tuple(cases),
        report=found,
        own=own,
        none=others,
        notes=tuple(_notes(run, found, own)),
    )


def _scores(
    run: _Run, outcomes: Mapping[str, Sequence[Outcome]]
) -> tuple[tuple[TaskScores, ...], tuple[TaskScores, ...]]:
    """Of the tasks of modules, and of the others."""
    groups: dict[tuple[bool, str], dict[str, list[float]]] = {}
    for system, answered in outcomes.items():
        for outcome in answered:
            is_own = run.homes[id(outcome.example)] is not None
            key = (is_own, outcome.example.task or NONE)
            groups.setdefault(key, {}).setdefault(system, []).append(outcome.score)
    own, others = (
        tuple(
            TaskScores(task, len(scores[AUTO]), {s: 100 * _average(v) for s, v in scores.items()})
            for (is_own, task), scores in groups.items()
            if is_own is wanted
        )
        for wanted in (True, False)
    )
    return own, others


def _mean(name: str, tasks: Sequence[TaskScores]) -> TaskScores:
    scores = {s: _average([task.scores[s] for task in tasks]) for s in tasks[0].scores}
    return TaskScores(name, sum(task.prompts for task in tasks), scores)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _about(
    bank: Bank, data: Path, none: Path | None, answers: AnswerOptions | None
) -> dict[str, Any]:
    files = {"data": data, "none_data": none}
    return {
        "bank": {"name": bank.name, "digest": bank.digest},
        **{
            key: file and {"file": file.name, "digest": file_digest(file)}
            for key, file in files.items()
        },
        "metric": answers and str(answers.metric),
    }


def _notes(run: _Run, found: RouterReport, own: Sequence[TaskScores]) -> Iterator[str]:
    """What the figures alone do not say."""
    strange = dict.fromkeys(e.task for e, module in run.examples if module is None and e.task)
    if strange:
        yield f"tasks of no module, counted as none: {', '.join(map(str, strange))}"
    asked = {module for _, module in run.examples}
    if unasked := [module.name for module in run.bank.modules if module.name not in asked]:
        yield f"modules without prompts in the data: {', '.join(unasked)}"
    if None not in asked:
        yield "no prompts of none: nothing is known of what the router leaves alone"
    if not (found.own or found.none):
        yield "layers choose modules for every token: there is no decision to judge"
    if own:
        yield from shortfalls(_mean("mean", own).scores)
