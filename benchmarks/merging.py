"""Merges, modules and compressors on the zoo: `python -m benchmarks.merging --zoo build/zoo`.

Every row is a bank built by `mergeroute build`'s own code, or the experts compressed one by one.
Its score is the exact match of greedy answers on held-out inputs in known wordings, with oracle
routing, relative to the experts it is made of. Scales are chosen on training inputs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.zoo.evaluate import accuracy
from examples.zoo.model import load_lora, load_model, load_tokenizer
from examples.zoo.tasks import (
    Example,
    Task,
    evaluation_examples,
    load_tasks,
    router_examples,
    target_tasks,
)
from examples.zoo.workers import quieten, run, worker_pool
from mergeroute.adapters import compressors
from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.experts import Base, open_expert
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.recipe import Recipe
from mergeroute.runtime.merging import merge_into
from mergeroute.serving.building import build_bank

from .machine import describe_machine
from .merging_plot import plot
from .merging_rows import Row, rows

SCALE_PROMPTS = 20
COLUMNS = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())


@dataclass(frozen=True)
class Result:
    """What was measured. accuracies: by task, in 0 to 1. module_bytes: one module's files."""

    row: Row
    accuracies: dict[str, float]
    module_bytes: int = 0
    scales: tuple[float, ...] = ()


def measure(row: Row, zoo: Path, prompts: int) -> Result:
    """Measure one row. zoo: the folder that `python -m examples.zoo` wrote. prompts: per task."""
    if row.label == "experts":
        return _measure_experts(row, zoo, prompts)
    if row.compressor is not None:
        return _measure_compressor(row, zoo, prompts)
    with tempfile.TemporaryDirectory() as folder:
        row, scales = best_scales(row, zoo, Path(folder))
        bank = build(row, zoo, Path(folder) / "bank")
        accuracies = {t.name: _task_accuracy(bank, t, zoo, _tests(t, prompts)) for t in tasks()}
        sizes = [module.provenance["bytes"] for module in bank.modules]
        return Result(row, accuracies, max(sizes, default=0), scales)


def build(row: Row, zoo: Path, out: Path) -> Bank:
    """Build a row's bank."""
    document = {
        "name": "row",
        "base": str(zoo / "base"),
        "experts": [{"name": t.name, "path": str(zoo / row.experts / t.name)} for t in tasks()],
        "backbone": row.backbone,
        "modules": row.modules,
        "calibration": str(zoo / "calibration.jsonl") if row.looks_at_data else None,
    }
    recipe = Recipe.model_validate(document)
    return build_bank(recipe, out, device="cpu", console=Console(quiet=True))


def best_scales(row: Row, zoo: Path, folder: Path) -> tuple[Row, tuple[float, ...]]:
    """The row with the scales that answer training inputs of all tasks best, and the scales."""
    found: dict[tuple[float, ...], tuple[float, Row]] = {}
    for k, (candidate, scales) in enumerate(_candidates(row)):
        bank = build(candidate, zoo, folder / f"candidate-{k}")
        scores = [_task_accuracy(bank, t, zoo, router_examples(t, SCALE_PROMPTS)) for t in tasks()]
        found[scales] = (sum(scores), candidate)
    if not found:
        return row, ()
    best = max(found, key=lambda scales: found[scales][0])
    return found[best][1], best


def _candidates(row: Row) -> Iterator[tuple[Row, tuple[float, ...]]]:
    for scale in row.scales:
        merged = replace(row, backbone={**row.backbone, "scale": scale})
        if not row.module_scales:
            yield merged, (scale,)
        for module_scale in row.module_scales:
            modules = {**row.modules, "scale": module_scale}
            yield replace(merged, modules=modules), (scale, module_scale)


def tasks() -> list[Task]:
    """The tasks that have experts."""
    return target_tasks(load_tasks())


def _task_accuracy(bank: Bank, task: Task, zoo: Path, examples: list[Example]) -> float:
    """The backbone with the task's own module, if there is one, on the task."""
    model = load_model(bank.backbone.path)
    entry = next((m for m in bank.modules if m.name == task.name), None)
    if entry is not None:
        merge_into(model, {task.name: bank.load(entry)}, Blend({task.name: 1.0}))
    return accuracy(model, load_tokenizer(zoo / "base"), examples)


def _tests(task: Task, prompts: int) -> list[Example]:
    return evaluation_examples(task, prompts, wording="known")


def _measure_experts(row: Row, zoo: Path, prompts: int) -> Result:
    tokenizer, accuracies = load_tokenizer(zoo / "base"), {}
    for task in tasks():
        folder = zoo / row.experts / task.name
        model = load_lora(zoo / "base", folder) if row.experts == "lora" else load_model(folder)
        accuracies[task.name] = accuracy(model, tokenizer, _tests(task, prompts))
    file = "adapter_model.safetensors" if row.experts == "lora" else "model.safetensors"
    return Result(row, accuracies, (folder / file).stat().st_size)


def _measure_compressor(row: Row, zoo: Path, prompts: int) -> Result:
    """The experts' changes of the linear layers, compressed and applied densely to the base."""
    base = Base.open(zoo / "base")
    experts = [open_expert(t.name, zoo / "full" / t.name, base) for t in tasks()]
    tokenizer, accuracies, size = load_tokenizer(zoo / "base"), {}, 0
    for k, task in enumerate(tasks()):
        model, size = load_model(zoo / "base"), 0
        weights = dict(model.named_parameters())
        for name, parameter in base.parameters.items():
            if parameter.kind is Kind.LINEAR:
                before = base.checkpoint.read(name).float()
                deltas = [e.delta_rows(name, 0, len(before), before) for e in experts]
                found = compressed(row, before, deltas, k)
                size += found.nbytes
                with torch.no_grad():
                    weights[name].copy_(found.dense)
        accuracies[task.name] = accuracy(model, tokenizer, _tests(task, prompts))
    return Result(row, accuracies, size)


def compressed(
    row: Row, base: torch.Tensor, deltas: Sequence[torch.Tensor], k: int
) -> compressors.Compressed:
    """The k-th expert's weight after compression, and the bytes it takes."""
    assert row.compressor is not None
    name, parameters = row.compressor
    if name == "quantised":
        return compressors.quantised(base + deltas[k], **parameters)
    if name in compressors.OWN_DELTA:
        found = compressors.OWN_DELTA[name](deltas[k], **parameters)
    else:
        whole = torch.stack(list(deltas))
        sign = whole.sum(0).sign()
        merged = (
            (whole * ((whole * sign) > 0)).abs().amax(0) * sign if name == "emr" else whole.sum(0)
        )
        found = compressors.MASKS[name](deltas[k], merged)
    return compressors.Compressed(base + found.dense, found.nbytes)


def summarise(results: Sequence[Result], zoo: Path) -> list[dict[str, Any]]:
    """The table's rows with normalised scores and sizes."""
    experts = {r.row.experts: r.accuracies for r in results if r.row.label == "experts"}
    model_bytes = (zoo / "base" / "model.safetensors").stat().st_size

    def normalised(result: Result) -> float:
        own = experts[result.row.experts]
        return sum(100 * a / own[t] for t, a in result.accuracies.items()) / len(own)

    return [
        {
            "label": r.row.label,
            "group": r.row.group,
            "experts": r.row.experts,
            "normalised": round(normalised(r), 2),
            "module_bytes": r.module_bytes,
            "module_percent": round(100 * r.module_bytes / model_bytes, 2),
            "scales": r.scales,
            "accuracies": r.accuracies,
            "backbone": dict(r.row.backbone),
            "modules": dict(r.row.modules),
        }
        for r in results
    ]


def show(entries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title="Held-out inputs, known wordings, oracle routing (experts = 100)")
    for heading in ("what", "experts", "normalised", "bytes a module, % of model", "scale"):
        table.add_column(heading, justify="left" if heading in ("what", "experts") else "right")
    for entry in entries:
        scale = " x ".join(f"{s:g}" for s in entry["scales"])
        size = f"{entry['module_percent']:.1f}" if entry["module_bytes"] else ""
        score = f"{entry['normalised']:.1f}"
        table.add_row(entry["label"], entry["experts"], score, size, scale)
    console.print(table)


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table as docs/merging.md shows it."""
    lines = [
        "| what | experts | normalised | bytes a module, % | scales |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        size = f"{entry['module_percent']:.1f}" if entry["module_bytes"] else ""
        scales = " · ".join(f"{s:g}" for s in entry["scales"])
        score = f"{entry['normalised']:.1f}"
        lines.append(f"| {entry['label']} | {entry['experts']} | {score} | {size} | {scales} |")
    return "\n".join(lines) + "\n"


def write_calibration(zoo: Path, per_task: int = 50) -> None:
    """Training prompts with answers, for the methods that look at data."""
    lines = [
        json.dumps({"task": task.name, "prompt": e.prompt, "answer": e.answer})
        for task in tasks()
        for e in router_examples(task, per_task)
    ]
    (zoo / "calibration.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Measure all rows, print and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path("build/zoo"), help="a trained zoo")
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--only", help="rows whose label or group contains this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--plot", type=Path, help="also draw score against bytes there, PNG")
    arguments = parser.parse_args()
    arguments.zoo = arguments.zoo.resolve()
    quieten()
    write_calibration(arguments.zoo)
    chosen = [r for r in rows() if _is_chosen(r, arguments.only)]
    jobs: list[Callable[[], Result]] = [
        partial(measure, row, arguments.zoo, arguments.prompts) for row in chosen
    ]
    console = Console(stderr=True)
    bars = Progress(*COLUMNS, TimeElapsedColumn(), console=console)
    with bars as progress, worker_pool(arguments.workers) as pool:
        results = run(pool, "rows", jobs, progress)
    entries = summarise(results, arguments.zoo)
    show(entries, Console())
    if arguments.json:
        document = {"machine": describe_machine(), "prompts": arguments.prompts, "rows": entries}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(entries), "utf-8")
    if arguments.plot:
        plot(entries, arguments.plot)


def _is_chosen(row: Row, only: str | None) -> bool:
    return only is None or row.label == "experts" or only in row.label or only == row.group


if __name__ == "__main__":
    main()
