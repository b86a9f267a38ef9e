"""Merging the experts of the zoo's mixture: `python -m benchmarks.smoe --zoo build/zoo`.

Every row is a bank that `mergeroute build`'s own code wrote, or all experts rounded. Its score is
the exact match of greedy answers on held-out inputs in known wordings over that of the mixture as
it is. Bytes are those of the experts alone, operations those of a token in the sparse layers. What
looks at data sees training inputs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.zoo.evaluate import forced_accuracy
from examples.zoo.model import load_model as load_dense
from examples.zoo.model import load_tokenizer
from examples.zoo.moe import rendered
from examples.zoo.tasks import evaluation_examples, load_tasks, router_examples, target_tasks
from examples.zoo.workers import quieten, run, worker_pool
from mergeroute.adapters.compressors import quantised
from mergeroute.adapters.smoe.accounting import cost_of
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.adapters.smoe.stored import Cost
from mergeroute.adapters.smoe.usage import Usage
from mergeroute.runtime.distillation import DistillationSettings, distil
from mergeroute.runtime.expert_usage import UsageOptions, expert_usage
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.rendering import Rendered
from mergeroute.runtime.saving import save_trained
from mergeroute.runtime.sparse_blocks import sparse_blocks

from .machine import describe_machine
from .smoe_plot import plot
from .smoe_rows import Row, rows

CALIBRATION_PROMPTS = 50
RECOVERY_PROMPTS = 200
CPU = torch.device("cpu")
COLUMNS = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())


@dataclass(frozen=True)
class Result:
    """accuracies: by task, in 0 to 1. cost: of the experts."""

    row: Row
    accuracies: Mapping[str, float]
    cost: Cost


def measure(row: Row, zoo: Path, usage: Usage, prompts: int) -> Result:
    """Build a row's model and ask it as it is stored. prompts: per task."""
    moe = zoo / "moe"
    with tempfile.TemporaryDirectory() as folder:
        path = moe if row.experts is None else _built(row, moe, usage, Path(folder) / "bank")
        if row.recovery:
            path = _recovered(path, zoo, row.recovery, Path(folder) / "recovered")
        model, cost = load_model(path, device=CPU, dtype=torch.float32), cost_of(path)
        if row.bits is not None:
            cost = cost.model_copy(update={"bytes": _round_experts(model, row.bits)})
        if row.centre_bits is not None:
            before = sum(weight.numel() for weight in _centres(model)) * 2
            after = _round_experts(model, row.centre_bits)
            cost = cost.model_copy(update={"bytes": cost.bytes - before + after})
        return Result(row, accuracies(model, moe, prompts), cost)


def _built(row: Row, moe: Path, usage: Usage, out: Path) -> Path:
    """The backbone of a row's bank."""
    recipe = MoeRecipe.model_validate(
        {"base": str(moe), "experts": dict(row.experts or {}), "calibration": "measured"}
    )
    bank = build_moe(recipe, out, tools=MoeTools(collect=lambda _: usage))
    return bank.backbone.path


def _centres(model: Any) -> Iterator[Tensor]:
    """The stacked matrices of all experts of a model, or of their centres, [E, o, i] each."""
    for block in sparse_blocks(model).values():
        experts: Any = block.experts
        own = dict(experts.named_parameters(recurse=False))
        yield from own.values()


def _round_experts(model: Any, bits: int) -> int:
    """Round every matrix of the experts to the nearest, a scale a row; the bytes they take."""
    nbytes = 0
    with torch.no_grad():
        for stack in _centres(model):
            for matrix in stack:
                found = quantised(matrix, bits=bits)
                matrix.copy_(found.dense)
                nbytes += found.nbytes
    return nbytes


def _recovered(path: Path, zoo: Path, steps: int, out: Path) -> Path:
    """The same with experts and routers trained against the mixture as it is, on training inputs;
    where it is written.
    """
    student = load_model(path, device=CPU, dtype=torch.float32).requires_grad_(False)
    for block in sparse_blocks(student).values():
        block.requires_grad_(True)
    train, held_out = training_prompts(zoo, RECOVERY_PROMPTS), training_prompts(zoo, 220)
    unseen = [prompt for prompt in held_out if prompt not in set(train)]
    teacher = load_model(zoo / "moe", device=CPU, dtype=torch.float32)
    distil(student, teacher, train, held_out=unseen, settings=DistillationSettings(steps=steps))
    save_trained(student, path, out)
    return out


def training_prompts(zoo: Path, per_task: int) -> list[Rendered]:
    """Training inputs of all tasks with their answers."""
    tokenizer = load_tokenizer(zoo / "moe")
    tasks = target_tasks(load_tasks())
    return [rendered(tokenizer, e) for task in tasks for e in router_examples(task, per_task)]


def accuracies(model: Any, folder: Path, prompts: int) -> dict[str, float]:
    """Exact match on every task, in 0 to 1."""
    tokenizer = load_tokenizer(folder)
    return {
        task.name: forced_accuracy(model, tokenizer, evaluation_examples(task, prompts))
        for task in target_tasks(load_tasks())
    }


def dense_accuracies(zoo: Path, prompts: int) -> dict[str, float]:
    """Exact match of each fine-tune on its own task."""
    found = {}
    for task in target_tasks(load_tasks()):
        folder = zoo / "full" / task.name
        examples = evaluation_examples(task, prompts)
        found[task.name] = forced_accuracy(load_dense(folder), load_tokenizer(folder), examples)
    return found


def measured_usage(zoo: Path) -> Usage:
    """How the mixture routes training inputs."""
    model = load_model(zoo / "moe", device=CPU, dtype=torch.float32)
    options = UsageOptions(outputs=True, moments=True)
    return expert_usage(model, training_prompts(zoo, CALIBRATION_PROMPTS), options)


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The table's rows, in percent of the mixture as it is."""
    whole = results[0]
    full = _mean(whole.accuracies)
    return [
        {
            "label": result.row.label,
            "group": result.row.group,
            "keep": result.row.keep,
            "recovery_steps": result.row.recovery,
            "exact_match": round(100 * _mean(result.accuracies), 2),
            "kept": round(100 * _mean(result.accuracies) / full, 2),
            "bytes": result.cost.bytes,
            "bytes_percent": round(100 * result.cost.bytes / whole.cost.bytes, 2),
            "flops": result.cost.flops,
            "flops_percent": round(100 * result.cost.flops / whole.cost.flops, 2),
            "accuracies": result.accuracies,
            "experts": result.row.experts,
        }
        for result in results
    ]


def known_results(file: Path) -> list[Result]:
    """What a file of an earlier run says of the rows that are still built the same way."""
    entries = json.loads(file.read_text("utf-8"))["rows"]
    known = {(e["group"], e["label"]): e for e in entries}
    found = ((row, known.get((row.group, row.label))) for row in rows())
    return [
        Result(row, entry["accuracies"], Cost(bytes=entry["bytes"], flops=entry["flops"]))
        for row, entry in found
        if entry and (entry["experts"], entry["recovery_steps"]) == (row.experts, row.recovery)
    ]


def together(measured: Sequence[Result], known: Sequence[Result]) -> list[Result]:
    """Both in the order of the rows; what was measured now counts."""
    found = {result.row.name: result for result in (*known, *measured)}
    return [found[row.name] for row in rows() if row.name in found]


def _mean(accuracies: Mapping[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table as docs/smoe.md shows it."""
    lines = [
        "| experts | expert bytes, % | operations a token, % | exact match | kept |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        steps = entry["recovery_steps"]
        trained = f", {steps} steps of recovery" if steps else ""
        lines.append(
            f"| {entry['label']}{trained} | {entry['bytes_percent']:.1f} | "
            f"{entry['flops_percent']:.1f} | {entry['exact_match']:.1f} | {entry['kept']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Held-out inputs, known wordings (the mixture as it is = 100)")
    for heading in ("experts", "bytes, %", "operations, %", "exact match", "kept"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for line in markdown(entries).splitlines()[2:]:
        table.add_row(*(cell.strip() for cell in line.strip("|").split("|")))
    Console().print(table)


def main() -> None:
    """Measure all rows, print and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoe", description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path("build/zoo"), help="a trained zoo")
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="rows whose 'group: label' contains one of these, and the first; the others stay as "
        "the file of --json has them",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--plot", type=Path, help="also draw score against bytes there, PNG")
    arguments = parser.parse_args()
    zoo, prompts = arguments.zoo.resolve(), arguments.prompts
    quieten()
    first, *rest = rows()
    chosen = [first, *(r for r in rest if any(text in r.name for text in arguments.only))]
    usage = measured_usage(zoo)
    jobs: list[Callable[[], Result]] = [
        partial(measure, row, zoo, usage, prompts) for row in chosen
    ]
    bars = Progress(*COLUMNS, TimeElapsedColumn(), console=Console(stderr=True))
    with bars as progress, worker_pool(arguments.workers) as pool:
        results = run(pool, "rows", jobs, progress)
    show(summarise(results))
    is_known = arguments.json is not None and arguments.json.exists()
    entries = summarise(together(results, known_results(arguments.json) if is_known else []))
    dense = dense_accuracies(zoo, prompts)
    if arguments.json:
        document = {
            "machine": describe_machine(),
            "prompts": prompts,
            "fine_tunes": dense,
            "rows": entries,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(entries), "utf-8")
    if arguments.plot:
        plot(entries, arguments.plot)


if __name__ == "__main__":
    main()
