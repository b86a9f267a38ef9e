"""Merges, modules and compressors on the zoo: `python -m benchmarks.merging --zoo build/zoo`.

Every row is a bank built by `mergeroute build`'s own code, or the experts compressed one by one. Its
score is the exact match of greedy answers on held-out inputs in known wordings, with oracle routing,
relative to the experts it is made of. A static merge's scale, and a module's, is chosen on training
inputs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

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

Experts = Literal["full", "lora"]
Group = Literal["reference", "static", "twin", "lego", "compressor"]

SCALES = (0.1, 0.2, 0.3, 0.5, 1.0)
SCALE_PROMPTS = 20
COLUMNS = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())


@dataclass(frozen=True)
class Row:
    """One line of the table.

    backbone, modules: as in a recipe. scales: of the merge to choose from. compressor: name and
    parameters, instead of a bank. others: further keys of the recipe.
    """

    label: str
    group: Group
    experts: Experts
    backbone: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=lambda: {"method": "none"})
    scales: tuple[float, ...] = ()
    compressor: tuple[str, Mapping[str, Any]] | None = None
    looks_at_data: bool = False


@dataclass(frozen=True)
class Result:
    """What was measured. accuracies: by task, in 0 to 1. module_bytes: one module's files."""

    row: Row
    accuracies: dict[str, float]
    module_bytes: int = 0
    scale: float | None = None


STATIC: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("weight average", {"method": "linear"}),
    ("task arithmetic", {"method": "task_arithmetic"}),
    (
        "task arithmetic + LiNeS",
        {"method": "task_arithmetic", "lines": {"alpha": 0.5, "beta": 1.0}},
    ),
    ("TIES", {"method": "ties"}),
    ("DARE-linear", {"method": "dare_linear"}),
    ("DARE-TIES", {"method": "dare_ties"}),
    ("DELLA", {"method": "della"}),
    ("Breadcrumbs", {"method": "breadcrumbs"}),
    ("SCE", {"method": "sce", "select_topk": 0.5}),
    ("PCB", {"method": "pcb"}),
    ("Consensus", {"method": "consensus"}),
    ("EMR, unified only", {"method": "emr"}),
    ("WIDEN", {"method": "widen"}),
    ("TSV-M", {"method": "tsv"}),
    ("ISO-C", {"method": "iso_c"}),
    ("KnOTS-TIES", {"method": "knots"}),
    ("WUDI, ridge", {"method": "wudi"}),
    ("OPCM", {"method": "opcm"}),
    ("Fisher", {"method": "fisher"}),
    ("RegMean", {"method": "regmean"}),
    ("RegMean++", {"method": "regmean_plus_plus"}),
)
UNSCALED = ("linear", "fisher", "regmean", "regmean_plus_plus")
CALIBRATED = ("fisher", "regmean", "regmean_plus_plus")
TWIN = {"method": "task_arithmetic", "scale": 0.3}
TWIN_RANKS = (1, 2, 4, 7, 8, 15, 16, 32, 64)


def rows() -> list[Row]:
    """The rows in the order in which they are printed."""
    kinds: tuple[Experts, ...] = ("full", "lora")
    return [
        *(Row("base", "reference", kind, {"method": "none"}) for kind in kinds),
        *(Row("experts", "reference", kind) for kind in kinds),
        *(_static(label, backbone, kind) for kind in kinds for label, backbone in STATIC),
        *_twin_rows(),
        *_lego_rows(),
        *_compressor_rows(),
    ]


def _static(label: str, backbone: Mapping[str, Any], kind: Experts) -> Row:
    method = backbone["method"]
    scales = () if method in UNSCALED else SCALES
    return Row(label, "static", kind, backbone, scales=scales, looks_at_data=method in CALIBRATED)


def _twin_rows() -> Iterator[Row]:
    def twin(label: str, kind: Experts = "full", /, **modules: Any) -> Row:
        looks = modules.get("fit") == "outputs"
        return Row(label, "twin", kind, TWIN, {"method": "svd", **modules}, looks_at_data=looks)

    for rank in TWIN_RANKS:
        yield twin(f"Twin, rank {rank}, int8", rank=rank, dtype="int8")
    for rank in (8, 16):
        yield twin(f"Twin, rank {rank}, bfloat16", rank=rank, dtype="bfloat16")
    for rank, scale in ((7, 1.1), (15, 1.1)):
        yield twin(f"Twin, rank {rank}, int8, times {scale}", rank=rank, dtype="int8", scale=scale)
    for percent in (5, 10):
        budget = {"bytes": percent * 17_000, "dtype": "int8"}
        yield twin(f"Twin, {percent} % of the bytes, int8", **budget)
        for fit in ("weights", "outputs"):
            label = f"Twin, {percent} %, int8, rank by energy of {fit}"
            yield twin(label, **budget, allocation="energy", fit=fit)
        yield twin(f"Twin, {percent} %, int8, closest outputs", **budget, fit="outputs")
    for rank in (4, 8, 16):
        yield twin(f"Twin, rank {rank}, bfloat16", "lora", rank=rank, dtype="bfloat16")
    yield twin("Twin, rank 8, int8", "lora", rank=8, dtype="int8")
    own = {"method": "lora", "dtype": "bfloat16"}
    yield Row("LoRAs as they are, routed", "twin", "lora", {"method": "none"}, own)


def _lego_rows() -> Iterator[Row]:
    for rank in (8, 16, 32, 64):
        backbone = {"method": "lego", "rank": rank}
        yield Row(f"LEGO, {rank} clusters, merged", "lego", "lora", backbone, scales=SCALES)
    raw = {"method": "lego", "rank": 8, "gauge": "raw"}
    yield Row("LEGO, 8 clusters, raw gauge, merged", "lego", "lora", raw, scales=SCALES)
    for rank in (2, 4):
        modules = {"method": "lego", "rank": rank}
        yield Row(
            f"LEGO, each to {rank} units, routed", "lego", "lora", {"method": "none"}, modules
        )


def _compressor_rows() -> Iterator[Row]:
    named: list[tuple[str, str, dict[str, Any]]] = [
        *((f"magnitude, {d:.0%} kept", "magnitude", {"density": d}) for d in (0.05, 0.1, 0.2, 0.5)),
        *((f"ComPEFT, {d:.0%} kept", "compeft", {"density": d}) for d in (0.2, 0.5)),
        ("BitDelta, no distillation", "bitdelta", {}),
        ("TALL masks", "tall", {}),
        ("EMR masks", "emr", {}),
        *((f"expert in int{bits}", "quantised", {"bits": bits}) for bits in (8, 4, 3)),
    ]
    for label, name, parameters in named:
        yield Row(label, "compressor", "full", compressor=(name, parameters))
    modules = {"method": "magnitude", "density": 0.2, "rank": 16, "dtype": "int8"}
    yield Row("magnitude, 20 %, to rank 16, int8", "compressor", "full", TWIN, modules)


def measure(row: Row, zoo: Path, prompts: int) -> Result:
    """Measure one row. zoo: the folder that `python -m examples.zoo` wrote. prompts: per task."""
    if row.label == "experts":
        return _measure_experts(row, zoo, prompts)
    if row.compressor is not None:
        return _measure_compressor(row, zoo, prompts)
    with tempfile.TemporaryDirectory() as folder:
        scale = best_scale(row, zoo, Path(folder)) if row.scales else None
        bank = build(row, zoo, Path(folder) / "bank", scale)
        accuracies = {t.name: _task_accuracy(bank, t, prompts, zoo) for t in tasks()}
        sizes = [module.provenance["bytes"] for module in bank.modules]
        return Result(row, accuracies, max(sizes, default=0), scale)


def build(row: Row, zoo: Path, out: Path, scale: float | None = None) -> Bank:
    """Build a row's bank."""
    backbone = dict(row.backbone) if scale is None else {**row.backbone, "scale": scale}
    document = {
        "name": "row",
        "base": str(zoo / "base"),
        "experts": [{"name": t.name, "path": str(zoo / row.experts / t.name)} for t in tasks()],
        "backbone": backbone,
        "modules": row.modules,
        "calibration": str(zoo / "calibration.jsonl") if row.looks_at_data else None,
    }
    recipe = Recipe.model_validate(document)
    return build_bank(recipe, out, device="cpu", console=Console(quiet=True))


def best_scale(row: Row, zoo: Path, folder: Path) -> float:
    """The scale with the best answers to training inputs of all tasks."""
    tokenizer = load_tokenizer(zoo / "base")
    examples = [e for task in tasks() for e in router_examples(task, SCALE_PROMPTS)]
    scores = {}
    for scale in row.scales:
        bank = build(row, zoo, folder / f"scale-{scale}", scale)
        scores[scale] = accuracy(load_model(bank.backbone.path), tokenizer, examples)
    return max(scores, key=lambda scale: scores[scale])


def tasks() -> list[Task]:
    """The tasks that have experts."""
    return target_tasks(load_tasks())


def _task_accuracy(bank: Bank, task: Task, prompts: int, zoo: Path) -> float:
    """The backbone with the task's own module, if there is one, on the task."""
    model = load_model(bank.backbone.path)
    entry = next((m for m in bank.modules if m.name == task.name), None)
    if entry is not None:
        merge_into(model, {task.name: bank.load(entry)}, Blend({task.name: 1.0}))
    return accuracy(model, load_tokenizer(zoo / "base"), _examples(task, prompts))


def _examples(task: Task, prompts: int) -> list[Example]:
    return evaluation_examples(task, prompts, wording="known")


def _measure_experts(row: Row, zoo: Path, prompts: int) -> Result:
    tokenizer, accuracies = load_tokenizer(zoo / "base"), {}
    for task in tasks():
        folder = zoo / row.experts / task.name
        model = load_lora(zoo / "base", folder) if row.experts == "lora" else load_model(folder)
        accuracies[task.name] = accuracy(model, tokenizer, _examples(task, prompts))
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
        accuracies[task.name] = accuracy(model, tokenizer, _examples(task, prompts))
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
            "scale": r.scale,
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
        scale = "" if entry["scale"] is None else f"{entry['scale']:g}"
        size = f"{entry['module_percent']:.1f}" if entry["module_bytes"] else ""
        score = f"{entry['normalised']:.1f}"
        table.add_row(entry["label"], entry["experts"], score, size, scale)
    console.print(table)


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
    parser.add_argument("--plot", type=Path, help="also draw score against bytes there, PNG")
    arguments = parser.parse_args()
    quieten()
    write_calibration(arguments.zoo)
    chosen = [r for r in rows() if _is_chosen(r, arguments.only)]
    jobs: list[Callable[[], Result]] = [
        partial(measure, row, arguments.zoo, arguments.prompts) for row in chosen
    ]
    console = Console(stderr=True)
    with Progress(*COLUMNS, TimeElapsedColumn(), console=console) as progress:
        with worker_pool(arguments.workers) as pool:
            results = run(pool, "rows", jobs, progress)
    entries = summarise(results, arguments.zoo)
    show(entries, Console())
    if arguments.json:
        document = {"machine": describe_machine(), "prompts": arguments.prompts, "rows": entries}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if arguments.plot:
        plot(entries, arguments.plot)


def _is_chosen(row: Row, only: str | None) -> bool:
    return only is None or row.label == "experts" or only in row.label or only == row.group


if __name__ == "__main__":
    main()
