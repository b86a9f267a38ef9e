"""The comparison table: static merges, and Twin-Merging and experts by oracle routing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from . import merges
from .evaluate import accuracy
from .model import load_lora, load_model, load_tokenizer
from .tasks import evaluation_examples, load_tasks, router_examples, target_tasks

ExpertKind = Literal["full", "lora"]
TWIN_RANKS = (1, 4, 8, 16, 32)
PROMPTS_PER_TASK = 200
SCALES = (0.1, 0.15, 0.2, 0.3, 0.5)
SCALE_PROMPTS = 20


@dataclass(frozen=True)
class Row:
    """One line of the table: what is measured, and against which experts.

    method: a merge's name, "base", "twin" or "routed".
    rank: of the exclusive parts, for "twin" only.
    """

    label: str
    method: str
    experts: ExpertKind
    rank: int = 0


@dataclass(frozen=True)
class Result:
    """What was measured for one row.

    accuracies: by task, each in 0 to 1.
    scale: on the merged deltas, for a static merge.
    module_bytes: bytes of one task's module; 0 where there is none.
    """

    row: Row
    accuracies: dict[str, float]
    module_bytes: int = 0
    scale: float = 1.0


def rows() -> list[Row]:
    """List the rows of the table in the order in which they are printed."""
    kinds: tuple[ExpertKind, ...] = ("full", "lora")
    return [
        *(Row("base", "base", kind) for kind in kinds),
        *(Row(name, name, kind) for kind in kinds for name in merges.MERGES),
        *(Row(f"Twin, rank {rank}", "twin", "full", rank) for rank in TWIN_RANKS),
        *(Row("experts", "routed", kind) for kind in kinds),
    ]


def measure(row: Row, out: Path, prompts: int = PROMPTS_PER_TASK) -> Result:
    """Measure one row on the test prompts of every target task, in known wordings.

    out: the zoo's folder, with base, lora and full.
    """
    if row.method == "twin":
        return _measure_twin(row, out, prompts)
    if row.method == "routed":
        return _measure_routed(row, out, prompts)
    if row.method == "base":
        return Result(row, _accuracies(out, {}, prompts))
    merged = merges.merge(list(_expert_deltas(out, row.experts).values()), row.method)
    scale = 1.0 if row.method == "weight average" else best_scale(merged, out)
    return Result(row, _accuracies(out, merges.scaled(merged, scale), prompts), scale=scale)


def best_scale(merged: merges.Deltas, out: Path) -> float:
    """Choose the scale of merged deltas by accuracy on training inputs of all target tasks."""
    tokenizer = load_tokenizer(out / "base")
    examples = [
        example
        for task in target_tasks(load_tasks())
        for example in router_examples(task, SCALE_PROMPTS)
    ]

    def score(scale: float) -> float:
        model = load_model(out / "base")
        merges.apply(model, merges.scaled(merged, scale))
        return accuracy(model, tokenizer, examples)

    return max(SCALES, key=score)


def normalised(result: Result, experts: Result) -> float:
    """Return the mean over the tasks of 100 times accuracy over the expert's accuracy."""
    shares = [
        100 * accuracy / max(experts.accuracies[task], 1e-9)
        for task, accuracy in result.accuracies.items()
    ]
    return sum(shares) / len(shares)


def summarise(results: list[Result], out: Path) -> list[dict[str, object]]:
    """Add the scores and sizes to the results, write table.json, and return its rows."""
    experts = {result.row.experts: result for result in results if result.row.method == "routed"}
    model_bytes = (out / "base" / "model.safetensors").stat().st_size
    entries: list[dict[str, object]] = [
        {
            **asdict(result.row),
            "normalised": normalised(result, experts[result.row.experts]),
            "accuracy": 100 * sum(result.accuracies.values()) / len(result.accuracies),
            "module_percent": 100 * result.module_bytes / model_bytes,
            "scale": result.scale,
            "accuracies": result.accuracies,
        }
        for result in results
    ]
    (out / "table.json").write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    return entries


def show(entries: list[dict[str, object]], console: Console) -> None:
    """Print the table."""
    table = Table(title="Target tasks, known wordings (normalised: experts = 100)")
    for heading in ("what", "experts", "normalised", "exact match %", "bytes a module, % of model"):
        table.add_column(heading, justify="left" if heading in ("what", "experts") else "right")
    for entry in entries:
        figures = (entry["normalised"], entry["accuracy"], entry["module_percent"])
        table.add_row(
            str(entry["label"]), str(entry["experts"]), *(f"{figure:.1f}" for figure in figures)
        )
    console.print(table)


def _expert_deltas(out: Path, kind: ExpertKind) -> dict[str, merges.Deltas]:
    """Read the deltas of every expert of a kind, by task."""
    names = [task.name for task in target_tasks(load_tasks())]
    if kind == "lora":
        return {name: merges.lora_deltas(out / "lora" / name) for name in names}
    return {name: merges.full_deltas(out / "base", out / "full" / name) for name in names}


def _accuracies(out: Path, deltas: merges.Deltas, prompts: int) -> dict[str, float]:
    """Measure the base plus the deltas on every target task."""
    tokenizer, model = load_tokenizer(out / "base"), load_model(out / "base")
    merges.apply(model, deltas)
    return {
        task.name: accuracy(model, tokenizer, evaluation_examples(task, prompts, wording="known"))
        for task in target_tasks(load_tasks())
    }


def _measure_twin(row: Row, out: Path, prompts: int) -> Result:
    tokenizer = load_tokenizer(out / "base")
    experts = _expert_deltas(out, row.experts)
    shared = merges.merge(list(experts.values()), "weight average")
    accuracies = {}
    for task in target_tasks(load_tasks()):
        model = load_model(out / "base")
        merges.apply(model, merges.twin(shared, experts[task.name], row.rank))
        accuracies[task.name] = accuracy(model, tokenizer, evaluation_examples(task, prompts))
    return Result(row, accuracies, merges.low_rank_bytes(shared, row.rank))


def _measure_routed(row: Row, out: Path, prompts: int) -> Result:
    tokenizer = load_tokenizer(out / "base")
    accuracies = {}
    for task in target_tasks(load_tasks()):
        folder = out / row.experts / task.name
        model = load_lora(out / "base", folder) if row.experts == "lora" else load_model(folder)
        accuracies[task.name] = accuracy(model, tokenizer, evaluation_examples(task, prompts))
    file = "adapter_model.safetensors" if row.experts == "lora" else "model.safetensors"
    return Result(row, accuracies, (folder / file).stat().st_size)
