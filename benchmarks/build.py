"""Time and memory of static merges, beside mergekit: `python -m benchmarks.build`.

TIES and task arithmetic over eight random experts of Qwen2.5-0.5B's shape (494 M parameters,
bfloat16), by `mergeroute build` and by `mergekit-yaml`, each a process of its own with the same
number of threads, all in turn in one run, the inputs read into the page cache before each. Ours
hashes its inputs on a thread beside, which mergekit does not do at all. mergekit runs with
`dtype: float32`, the arithmetic that mergeroute always uses, and with `dtype: bfloat16`, which
takes less memory but rounds every intermediate result. What both write is compared.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .agreement import Agreement, compare
from .checkpoints import Checkpoints, Shape
from .machine import describe_machine
from .process import Usage, run

OURS = "mergeroute"
RIVALS = {"mergekit float32": "float32", "mergekit bfloat16": "bfloat16"}
SAME = "mergekit float32"
"""The rival whose output must be ours."""

COMPARED = {
    "wall_s": "no slower",
    "cpu_s": "no more CPU time",
    "resident": "less resident memory",
    "anonymous": "less anonymous memory",
}
DENSITY, TASK_SCALE = 0.2, 0.3
LARGEST_SHARE = 1.5
"""The bar on our peak memory, in sizes of one checkpoint."""

INSTALL = "no mergekit-yaml found, so there is no comparison; pip install -e '.[parity]' brings it"


@dataclass(frozen=True)
class Method:
    """One merge in both tools' words. ours: of the recipe. theirs: by expert, and for all."""

    name: str
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    density: float | None = None


METHODS = (
    Method(
        "task_arithmetic",
        {"method": "task_arithmetic", "scale": TASK_SCALE},
        {"weight": TASK_SCALE},
    ),
    Method(
        "ties",
        {"method": "ties", "density": DENSITY, "scale": 1.0},
        {"weight": 1.0, "density": DENSITY},
        density=DENSITY,
    ),
)

Usages = dict[str, dict[str, list[Usage]]]
"""By method and tool, one per repeat."""


def our_recipe(models: Checkpoints, method: Method) -> dict[str, Any]:
    """A recipe of a static bank."""
    experts = [
        {"name": f"e{index}", "path": str(models.expert(index))} for index in range(models.experts)
    ]
    return {
        "name": "merged",
        "base": str(models.base),
        "experts": experts,
        "backbone": dict(method.ours),
        "modules": {"method": "none"},
        "dtype": "bfloat16",
    }


def their_recipe(models: Checkpoints, method: Method, *, dtype: str) -> dict[str, Any]:
    """The same in mergekit's form."""
    experts = [
        {"model": str(models.expert(index)), "parameters": dict(method.theirs)}
        for index in range(models.experts)
    ]
    return {
        "merge_method": method.name,
        "base_model": str(models.base),
        "models": experts,
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }


@dataclass(frozen=True)
class Bench:
    """Where it runs. mergekit: path of mergekit-yaml, None when absent."""

    models: Checkpoints
    scratch: Path
    mergekit: Path | None
    threads: int

    @property
    def tools(self) -> tuple[str, ...]:
        """What is measured, in turn."""
        return (OURS, *RIVALS) if self.mergekit else (OURS,)

    def out(self, tool: str) -> Path:
        """Where a tool writes."""
        return self.scratch / tool.replace(" ", "-")

    def weights(self, tool: str) -> Path:
        """The folder that holds the weights it wrote."""
        return self.out(tool) / "backbone" if tool == OURS else self.out(tool)

    def measure(self, method: Method, tool: str) -> Usage:
        """Merge once, over what the tool wrote before."""
        recipe, out = self.scratch / "recipe.yaml", self.out(tool)
        shutil.rmtree(out, ignore_errors=True)
        if tool == OURS:
            document = our_recipe(self.models, method)
            command = [Path(sys.executable).with_name(OURS), "build", recipe, "--out", out]
        else:
            document = their_recipe(self.models, method, dtype=RIVALS[tool])
            command = [self.mergekit, recipe, out, "--no-copy-tokenizer", "--quiet"]
        recipe.write_text(yaml.safe_dump(document))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        env = {**threads, "HF_HUB_OFFLINE": "1"}
        self.models.warm()
        return run(command, log=self.scratch / "log.txt", env=env)

    def measure_all(
        self, methods: Sequence[Method], *, repeats: int
    ) -> tuple[Usages, dict[str, Agreement]]:
        """Every method, repeat and tool in turn; the last outputs of each method are compared."""
        usages: Usages = {m.name: {tool: [] for tool in self.tools} for m in methods}
        agreements = {}
        rounds = [(method, last == repeats - 1) for method in methods for last in range(repeats)]
        console = Console(stderr=True)
        for method, last in track(rounds, "measuring", console=console):
            for tool in self.tools:
                usage = self.measure(method, tool)
                usages[method.name][tool].append(usage)
                console.print(f"{method.name}, {tool}: {usage}", highlight=False)
            if last and self.mergekit:
                ours, theirs = self.weights(OURS), self.weights(SAME)
                agreements[method.name] = compare(
                    ours, theirs, models=self.models, density=method.density
                )
        return usages, agreements


def usage_table(usages: Usages, nbytes: int, *, title: str) -> Table:
    """Medians by method and tool; memory also in sizes of a checkpoint."""
    table = Table(title=title)
    for column in ("method", "tool", "wall s", "CPU s", "resident", "anonymous"):
        table.add_column(column, no_wrap=True)
    for method, tools in usages.items():
        for tool, taken in tools.items():
            seconds = [f"{middle(taken, key):.1f}" for key in ("wall_s", "cpu_s")]
            memory = [gigabytes(middle(taken, key), nbytes) for key in ("resident", "anonymous")]
            table.add_row(method, tool, *seconds, *memory)
    return table


def verdicts(usages: Usages, nbytes: int) -> dict[str, bool]:
    """The bars by what they say, and whether each is met, against either rival."""
    met = {}
    for method, tools in usages.items():
        ours = tools[OURS]
        for key in ("resident", "anonymous"):
            small = middle(ours, key) < LARGEST_SHARE * nbytes
            met[f"{method}: peak {key} below {LARGEST_SHARE} checkpoints"] = small
        for rival in (tool for tool in tools if tool != OURS):
            for key, words in COMPARED.items():
                better = middle(ours, key) <= middle(tools[rival], key)
                met[f"{method}: {words} than {rival}"] = better
    return met


def middle(usages: list[Usage], key: str) -> float:
    """The median of one figure."""
    return float(median(getattr(usage, key) for usage in usages))


def gigabytes(size: float, nbytes: int) -> str:
    """A size, and in brackets its ratio to a checkpoint's."""
    return f"{size / 1e9:.2f} ({size / nbytes:.2f})"


@contextmanager
def folder_of(keep: Path | None) -> Iterator[Path]:
    """A folder to keep, or one that is gone afterwards."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="mergeroute-bench-") as folder:
        yield Path(folder)


def find_mergekit(given: Path | None) -> Path | None:
    """The command given, else beside this Python, else on the path."""
    here = Path(sys.executable).with_name("mergekit-yaml")
    found = shutil.which("mergekit-yaml")
    return given or (here if here.exists() else Path(found) if found else None)


def main(
    experts: Annotated[int, typer.Option(min=1, help="Experts that are merged.")] = 8,
    layers: Annotated[int, typer.Option(min=1, help="Layers; 24 is the full size.")] = 24,
    vocabulary: Annotated[int, typer.Option(min=1, help="Rows of the embedding.")] = 151936,
    only: Annotated[str, typer.Option("--method", help="ties, task_arithmetic or all.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both.")] = 1,
    keep: Annotated[Path | None, typer.Option(help="Folder of models to keep or reuse.")] = None,
    mergekit: Annotated[Path | None, typer.Option(help="Path of mergekit-yaml.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
) -> None:
    """Measure `mergeroute build` beside mergekit."""
    torch.set_num_threads(threads)
    methods = [method for method in METHODS if only in (method.name, "all")]
    if not methods:
        raise typer.BadParameter(f"{only!r} is not measured", param_hint="--method")
    shape, console, rival = Shape(layers, vocabulary), Console(), find_mergekit(mergekit)
    with folder_of(keep) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = Checkpoints(folder, shape, experts)
        models.make()
        bench = Bench(models, Path(scratch), rival, threads)
        usages, agreements = bench.measure_all(methods, repeats=repeats)
    met, machine = verdicts(usages, shape.nbytes), describe_machine()
    title = f"{experts} experts of {shape.nbytes / 1e6:,.0f} MB, {threads} thread(s)"
    console.print(
        usage_table(usages, shape.nbytes, title=f"{title}; peak memory in GB (checkpoints)")
    )
    for bar, is_met in met.items():
        console.print(f"{'met   ' if is_met else 'missed'}  {bar}")
    for method, agreement in agreements.items():
        console.print(f"{method}: {agreement}")
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not rival:
        console.print(INSTALL, markup=False)
    if json_file:
        taken = {
            method: {tool: [asdict(usage) for usage in runs] for tool, runs in tools.items()}
            for method, tools in usages.items()
        }
        compared = {method: asdict(agreement) for method, agreement in agreements.items()}
        result = {"machine": machine, "experts": experts, "threads": threads, "bytes": shape.nbytes}
        result |= {"usage": taken, "bars": met, "agreement": compared}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if not all(agreement.holds for agreement in agreements.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
