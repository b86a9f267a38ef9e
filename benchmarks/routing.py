"""How well the demo bank's modules are routed, over HTTP, in known and in held-out wordings.

Routers are fitted by `mergeroute router fit` on 200 and on 10 prompts a task (training inputs,
known wordings, three draws of the ten) and on prompts that no module serves (examples/zoo/none.toml
has none of the zoo's own generic tasks). A server of each is asked /v1/route for prompts of
all sixteen tasks, and one fitted on 200 for answers too. Then every module in turn is left out of
the fit, its prompts are asked, and it is loaded into the running server with ten samples.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import roc_auc_score

from examples.zoo.none import none_prompts
from examples.zoo.tasks import (
    Example,
    evaluation_examples,
    load_tasks,
    router_examples,
    target_tasks,
)
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.routers.calibration import calibration_error, reliability

from .machine import describe_machine
from .zoo import DATA, Prompt, measure, summarise, wait_until_ready

DEMO = Path(__file__).parent.parent / "serving" / "demo_bank"
WORDINGS = ("known", "held-out")
DRAWS = 3
SAMPLES = 10
CLIENTS = 8
NONE = "none"


@dataclass(frozen=True)
class Asked:
    """A prompt and what /v1/route said of it."""

    example: Example
    route: dict[str, Any]

    @property
    def best(self) -> str:
        """The module with the largest weight, or none."""
        blend = self.route["blend"]
        return max(blend, key=lambda name: blend[name]) if blend else NONE

    @property
    def label(self) -> str:
        """What should serve it."""
        return self.example.task if self.example.kind == "expert" else NONE

    @property
    def likeliest(self) -> tuple[str, float]:
        """What the router holds likeliest, none included, and its share."""
        scores = {**self.route["scores"], NONE: 1 - sum(self.route["scores"].values())}
        return max(scores.items(), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Figures:
    """In percent but for auroc and calibration_error. accuracy: expert prompts that went to their
    module, abstention is wrong. rejected: expert prompts, abstained: generic ones, left to the
    backbone. worst_task: the lowest accuracy of a task.
    """

    wording: str
    accuracy: float
    worst_task: float
    rejected: float
    abstained: float
    auroc: float
    calibration_error: float


@dataclass(frozen=True)
class LeftOut:
    """A module left out of the fit, then loaded with ten samples; percent. change: in points."""

    module: str
    wording: str
    abstained: float
    accuracy: float
    change_of_others: float


@dataclass
class Report:
    """Everything measured."""

    routing: dict[str, list[Figures]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def write_lines(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    """A data file."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def training_rows(count: int, *, draw: int, without: str = "") -> list[dict[str, str]]:
    """`count` training prompts of every task but one."""
    rows = []
    for task in target_tasks(load_tasks()):
        found = router_examples(task, 200)
        chosen = random.Random(draw).sample(found, count) if count < 200 else found
        rows += [{"task": e.task, "prompt": e.prompt} for e in chosen if e.task != without]
    return rows


def fit(bank: Path, folder: Path, rows: list[dict[str, str]]) -> Path:
    """The bank with a router fitted by the command line."""
    data = write_lines(folder / "data.jsonl", rows)
    none = write_lines(folder / "none.jsonl", [{"prompt": p} for p in none_prompts()])
    out = folder / "bank"
    command = [mergeroute(), "router", "fit", str(bank), "--data", str(data), "--none", str(none)]
    command += ["--out", str(out), "--signal", "layer=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"router fit failed: {done.stderr}")
    return out


def mergeroute() -> str:
    """The command, beside this Python."""
    return str(Path(sys.executable).parent / "mergeroute")


@contextmanager
def served(bank: Path) -> Iterator[str]:
    """A server of a bank, its URL with /v1; modules may be loaded from the demo bank."""
    command = [mergeroute(), "serve", str(bank), "--port", "0", "--module-root", str(DEMO)]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stderr=log, text=True)
        try:
            yield wait_until_ready(server, log)
        finally:
            server.terminate()
            server.wait()


async def routes(url: str, examples: Sequence[Example], title: str) -> list[Asked]:
    """Ask /v1/route for every example."""
    gate = asyncio.Semaphore(CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(title, total=len(examples))

            async def one(example: Example) -> Asked:
                body = {"messages": [{"role": "user", "content": example.prompt}]}
                async with gate:
                    answer = await client.post("route", json=body)
                progress.advance(bar)
                return Asked(example, answer.raise_for_status().json())

            return await asyncio.gather(*map(one, examples))


def figures(asked: Sequence[Asked], wording: str) -> Figures:
    """Of one kind of wording."""
    chosen = [each for each in asked if each.example.wording == wording]
    own = [each for each in chosen if each.label != NONE]
    generic = [each for each in chosen if each.label == NONE]
    right = {task: [e.best == e.label for e in own if e.label == task] for task in labels(own)}
    likeliest = [each.likeliest for each in chosen]
    bins = reliability(
        [share for _, share in likeliest],
        [name == each.label for each, (name, _) in zip(chosen, likeliest, strict=True)],
    )
    distances = [each.route["distance"] for each in chosen]
    return Figures(
        wording=wording,
        accuracy=100 * mean(flag for flags in right.values() for flag in flags),
        worst_task=100 * min(mean(flags) for flags in right.values()),
        rejected=100 * mean(each.best == NONE for each in own),
        abstained=100 * mean(each.best == NONE for each in generic),
        auroc=float(roc_auc_score([each.label == NONE for each in chosen], distances)),
        calibration_error=calibration_error(bins),
    )


def labels(asked: Sequence[Asked]) -> list[str]:
    """Their tasks."""
    return sorted({each.label for each in asked})


def averaged(rows: Sequence[Figures]) -> Figures:
    """Over draws."""
    values = [asdict(row) for row in rows]
    numbers = {key: mean(v[key] for v in values) for key in values[0] if key != "wording"}
    return Figures(wording=rows[0].wording, **numbers)


def test_prompts(count: int) -> list[Example]:
    """Of all tasks in both wordings, shuffled."""
    tasks = load_tasks().values()
    found = [e for t in tasks for w in WORDINGS for e in evaluation_examples(t, count, wording=w)]
    random.Random(0).shuffle(found)
    return found


def measure_routing(report: Report, count: int) -> None:
    """200 and 10 prompts a task; with 200, answers too."""
    prompts = test_prompts(count)
    for number, draws in ((200, 1), (10, DRAWS)):
        found: list[list[Figures]] = []
        for draw in range(draws):
            with tempfile.TemporaryDirectory() as folder:
                bank = fit(DEMO, Path(folder), training_rows(number, draw=draw))
                with served(bank) as url:
                    asked = asyncio.run(routes(url, prompts, f"{number} prompts, draw {draw}"))
                    if number == 200:
                        report.answers = answers(url)
            found.append([figures(asked, wording) for wording in WORDINGS])
        report.routing[str(number)] = [averaged(rows) for rows in zip(*found, strict=True)]


def answers(url: str) -> list[dict[str, Any]]:
    """What the answers are worth, on the committed test set."""
    prompts = [Prompt(**json.loads(line)) for line in DATA.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(prompts)
    outcomes = asyncio.run(measure(url, prompts, CLIENTS))
    return [asdict(summarise(outcomes, wording)) for wording in WORDINGS]


def measure_left_out(report: Report, count: int) -> None:
    """Every module in turn."""
    demo = Bank.open(DEMO)
    for entry in demo.modules:
        with tempfile.TemporaryDirectory() as folder:
            bank = fit(
                without(demo, entry.name, Path(folder) / "seven"),
                Path(folder),
                training_rows(200, draw=0, without=entry.name),
            )
            with served(bank) as url:
                report.left_out += asyncio.run(left_out(url, entry, count))


def without(demo: Bank, name: str, path: Path) -> Path:
    """The demo bank but for one module, and without a router."""
    modules = [
        BankModule(m.name, m.path, description=m.description, samples=m.samples)
        for m in demo.modules
        if m.name != name
    ]
    write_bank(path, name="zoo", backbone=demo.backbone, modules=modules)
    return path


async def left_out(url: str, module: BankModule, count: int) -> list[LeftOut]:
    """Before and after the module is loaded with ten samples."""
    tasks = {task.name: task for task in target_tasks(load_tasks())}
    prompts = [
        e
        for t in tasks.values()
        for w in WORDINGS
        for e in evaluation_examples(t, count, wording=w)
    ]
    before = await routes(url, prompts, f"without {module.name}")
    samples = [e.prompt for e in router_examples(tasks[module.name], SAMPLES)]
    body = {"lora_name": module.name, "lora_path": str(module.path), "samples": samples}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        (await client.post("load_lora_adapter", json=body)).raise_for_status()
    after = await routes(url, prompts, f"{module.name} loaded")
    return [
        LeftOut(
            module=module.name,
            wording=wording,
            abstained=100 * mean(a.best == NONE for a in of(before, module.name, wording)),
            accuracy=100 * mean(a.best == a.label for a in of(after, module.name, wording)),
            change_of_others=100
            * (
                mean(a.best == a.label for a in others(after, module.name, wording))
                - mean(a.best == a.label for a in others(before, module.name, wording))
            ),
        )
        for wording in WORDINGS
    ]


def of(asked: Sequence[Asked], task: str, wording: str) -> list[Asked]:
    """Prompts of one task."""
    return [a for a in asked if a.label == task and a.example.wording == wording]


def others(asked: Sequence[Asked], task: str, wording: str) -> list[Asked]:
    """Prompts of the other tasks."""
    return [a for a in asked if a.label != task and a.example.wording == wording]


def show(report: Report) -> None:
    """The tables."""
    console = Console()
    table = Table(title="routing, in percent")
    for column in ("prompts a task", *Figures.__dataclass_fields__):
        table.add_column(column.replace("_", " "), justify="right")
    for number, rows in report.routing.items():
        for row in rows:
            table.add_row(number, *map(cell, asdict(row).values()))
    console.print(table)
    for title, listed in (("answers", report.answers), ("left out", report.left_out)):
        values = [each if isinstance(each, dict) else asdict(each) for each in listed]
        if values:
            table = Table(title=title)
            for column in values[0]:
                table.add_column(column.replace("_", " "), justify="right")
            for value in values:
                table.add_row(*map(cell, value.values()))
            console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))


def cell(value: object) -> str:
    """As the tables show it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value <= 1 else f"{value:.2f}"


def main(
    count: Annotated[int, typer.Option(min=1, help="test prompts a task and wording")] = 200,
    left: Annotated[bool, typer.Option("--left-out/--no-left-out")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
) -> None:
    """Measure and print."""
    report = Report()
    measure_routing(report, count)
    if left:
        measure_left_out(report, count)
    show(report)
    document = {"machine": describe_machine(), "test_prompts": count, **asdict(report)}
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
