"""Folding the zoo's eight modules into four and two: `python -m benchmarks.fold`.

Every row is a bank that `mergeroute fold`'s own code wrote, but for the averaged factors. Its score
is the exact match of greedy answers on held-out inputs in known wordings, every prompt with the
module that its task's went into, over that of the modules as they are. Traffic falls as 1 / rank
over the modules in the bank's order, and then in the opposite order; `used` weighs tasks by it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.zoo.evaluate import forced_accuracy
from examples.zoo.model import load_model, load_tokenizer
from examples.zoo.tasks import evaluation_examples, load_tasks
from examples.zoo.workers import quieten, run, worker_pool
from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.fold import fold
from mergeroute.adapters.fold_settings import FoldSettings
from mergeroute.adapters.lora import Module
from mergeroute.adapters.pool import stored_bytes
from mergeroute.routers.store import rename_modules
from mergeroute.runtime.merging import merge_into

from .machine import describe_machine

BUDGETS = (1.0, 0.5, 0.25)
COLUMNS = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())


@dataclass(frozen=True)
class Row:
    """One line of the table. to: modules left; None: all. share: of the bytes that the modules
    take as they are; None: what the method takes. traffic: what usage it is folded by, if any.
    """

    label: str
    method: str
    to: int | None = None
    share: float | None = None
    traffic: str | None = None


@dataclass(frozen=True)
class Result:
    """accuracies: by task, in 0 to 1. nbytes: of all modules' factors, in bfloat16."""

    row: Row
    accuracies: Mapping[str, float]
    nbytes: int


def rows() -> list[Row]:
    """The rows in the order in which they are printed."""
    return [Row("as they are", "none"), *_whole_rows(), *(r for n in (4, 2) for r in _rows_to(n))]


def _whole_rows() -> Iterator[Row]:
    for share in BUDGETS[1:]:
        yield Row("eight, svd", "svd", None, share)
        yield Row("eight, LEGO", "lego", None, share)


def _rows_to(count: int) -> Iterator[Row]:
    yield Row("averaged factors", "factors", count)
    yield Row("LEGO", "lego", count)
    for share in BUDGETS:
        yield Row("averaged changes (svd)", "svd", count, share)
        for traffic in ("falling", "rising"):
            yield Row(f"usage, {traffic}", "svd", count, share, traffic)


def traffic_of(names: list[str], kind: str) -> dict[str, float]:
    """Shares of the traffic by module."""
    ordered = names if kind == "falling" else names[::-1]
    total = sum(1 / rank for rank in range(1, len(names) + 1))
    return {name: 1 / rank / total for rank, name in enumerate(ordered, 1)}


def measure(row: Row, path: Path, prompts: int) -> Result:
    """Fold a bank and ask every task's prompts. prompts: per task."""
    bank = Bank.open(path, verify=False)
    whole = [bank.load(module) for module in bank.modules]
    names = [module.name for module in whole]
    budget = stored_bytes(whole, ["bfloat16"] * len(whole))
    with tempfile.TemporaryDirectory() as folder:
        if row.method == "none":
            found = dict(zip(names, whole, strict=True))
        else:
            settings = FoldSettings(
                to=row.to,
                nbytes=None if row.share is None else int(row.share * budget),
                usage=None if row.traffic is None else traffic_of(names, row.traffic),
                method="lego" if row.method == "lego" else "svd",
            )
            folded = fold(path, Path(folder) / "folded", settings, rename=rename_modules)
            found = _by_old_name(folded, names)
        if row.method == "factors":
            found = _with_averaged_factors(found, dict(zip(names, whole, strict=True)))
    kept = list({id(module): module for module in found.values()}.values())
    accuracies = {name: _accuracy(bank, name, module, prompts) for name, module in found.items()}
    return Result(row, accuracies, stored_bytes(kept, ["bfloat16"] * len(kept)))


def _by_old_name(bank: Bank, names: list[str]) -> dict[str, Module]:
    """Every old module's new one; modules that became one are one object."""
    renamed: Mapping[str, str] = {}
    if bank.router_path is not None:
        renamed = json.loads((bank.router_path / "router.json").read_text()).get("renamed", {})
    loaded = {module.name: bank.load(module) for module in bank.modules}
    return {name: loaded[renamed.get(name, name)] for name in names}


def _with_averaged_factors(
    found: Mapping[str, Module], whole: Mapping[str, Module]
) -> dict[str, Module]:
    """The same groups, the factors of each averaged one by one, as PEFT's `linear` does."""
    averaged = {}
    for module in {id(m): m for m in found.values()}.values():
        own = [whole[name].deltas for name, other in found.items() if other is module]
        deltas = {
            layer: LowRank(
                torch.stack([deltas[layer].left for deltas in own]).mean(0),
                torch.stack([deltas[layer].right for deltas in own]).mean(0),
            )
            for layer in own[0]
        }
        averaged[id(module)] = replace(module, deltas=deltas)
    return {name: averaged[id(module)] for name, module in found.items()}


def _accuracy(bank: Bank, task: str, module: Module, prompts: int) -> float:
    model = load_model(bank.backbone.path)
    merge_into(model, {module.name: module}, Blend({module.name: 1.0}))
    examples = evaluation_examples(load_tasks()[task], prompts, wording="known")
    return forced_accuracy(model, load_tokenizer(bank.backbone.path), examples)


def summarise(results: list[Result]) -> list[dict[str, Any]]:
    """The table's rows with normalised scores and sizes."""
    whole = next(result for result in results if result.row.method == "none")
    names = list(whole.accuracies)

    def entry(result: Result) -> dict[str, Any]:
        own = {t: 100 * a / whole.accuracies[t] for t, a in result.accuracies.items()}
        weighed = {
            kind: round(sum(own[t] * share for t, share in traffic_of(names, kind).items()), 1)
            for kind in ("falling", "rising")
        }
        return {
            "label": result.row.label,
            "modules": result.row.to or len(names),
            "budget_percent": None if result.row.share is None else 100 * result.row.share,
            "bytes": result.nbytes,
            "percent_of_bytes": round(100 * result.nbytes / whole.nbytes, 1),
            "normalised": round(sum(own.values()) / len(own), 1),
            "used": weighed,
            "accuracies": result.accuracies,
        }

    return [entry(result) for result in results]


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table as docs/fold.md shows it."""
    lines = [
        "| modules | how | bytes, % | normalised | used, falling | used, rising |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        lines.append(
            f"| {entry['modules']} | {entry['label']} | {entry['percent_of_bytes']:.0f} | "
            f"{entry['normalised']:.1f} | {entry['used']['falling']:.1f} | "
            f"{entry['used']['rising']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def show(entries: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Held-out inputs, known wordings (modules as they are = 100)")
    for heading in ("modules", "how", "bytes, %", "normalised", "used, falling", "used, rising"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    for line in markdown(entries).splitlines()[2:]:
        table.add_row(*(cell.strip() for cell in line.strip("|").split("|")))
    Console().print(table)


def main() -> None:
    """Measure all rows, print and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fold", description=__doc__)
    parser.add_argument("--bank", type=Path, default=Path("serving/demo_bank"))
    parser.add_argument("--prompts", type=int, default=100, help="per task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    quieten()
    path = arguments.bank.resolve()
    jobs: list[Callable[[], Result]] = [
        partial(measure, row, path, arguments.prompts) for row in rows()
    ]
    bars = Progress(*COLUMNS, TimeElapsedColumn(), console=Console(stderr=True))
    with bars as progress, worker_pool(arguments.workers) as pool:
        entries = summarise(run(pool, "rows", jobs, progress))
    show(entries)
    if arguments.json:
        document = {"machine": describe_machine(), "prompts": arguments.prompts, "rows": entries}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(entries), "utf-8")


if __name__ == "__main__":
    main()
