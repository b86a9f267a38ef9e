"""Experiments as a whole: whether the report finds the better bank and a killed server loses
nothing, and what taking part costs a request.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mergeroute.routers.data import read_examples

from .experiment_overhead import Cost, Overhead, measure_overhead
from .experiment_trial import DATA, ROUTED, Trial, run_trial
from .experiment_users import Crowd
from .machine import describe_machine

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the figures here")]


@app.command("end-to-end")
def end_to_end(
    users: Annotated[int, typer.Option(min=250)] = 1200,
    requests: Annotated[int, typer.Option(min=1, help="most of one user")] = 6,
    kills: Annotated[int, typer.Option(min=0, help="of the server, spread over the run")] = 3,
    page: Annotated[Path, typer.Option(help="where the report goes")] = Path("build/trial.html"),
    json_file: JsonFile = None,
) -> None:
    """A static merge against the routed bank, asked by synthetic users with the openai client."""
    examples = [example for example in read_examples(DATA) if example.task]
    page.parent.mkdir(parents=True, exist_ok=True)
    kill_at = [users * (n + 1) // (kills + 1) for n in range(kills)]
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=None)
        trial = run_trial(
            Path(folder),
            Crowd(users, requests),
            examples,
            kill_at=kill_at,
            page=page,
            step=lambda: bar.advance(task),
        )
    _show_trial(trial)
    _finish({"trial": trial.document}, json_file)


@app.command()
def overhead(
    pairs: Annotated[int, typer.Option(min=100, help="of requests")] = 2000,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    json_file: JsonFile = None,
) -> None:
    """What assignment and recording cost, on the event loop and at the client."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_overhead(Path(folder), ROUTED, pairs=pairs, clients=clients)
    _show_overhead(found)
    _finish({"overhead": asdict(found)}, json_file)


def _show_trial(trial: Trial) -> None:
    console = Console()
    console.print(f"winner: {trial.winner} ({trial.reason})")
    table = Table("variant", "users", "scored right", "truly right")
    stats = [trial.metric["control_stats"], *trial.metric["variant_results"]]
    for each in stats:
        name = each["variant_name"]
        shares = (f"{100 * share:.1f} %" for share in (each["mean"], trial.right[name]))
        table.add_row(name, f"{each['sample_size']:,}", *shares)
    console.print(table)
    console.print(
        f"{trial.answers:,} answers, {trial.scores:,} scores acknowledged, {trial.kills} kills, "
        f"{trial.interrupted} requests broke off; lost: {len(trial.lost.exposures)} exposures, "
        f"{len(trial.lost.feedback)} scores; users in two variants: {trial.restless}"
    )
    for stage, digest in trial.answering.items():
        console.print(f"auto, {stage}: {digest[:19]}")


def _show_overhead(found: Overhead) -> None:
    table = Table("", "requests", "wall p50", "wall p99", "CPU p50", "CPU p99", "ms p50", "ms p99")
    for name, cost in (("direct", found.direct), ("in an experiment", found.enrolled)):
        table.add_row(name, f"{cost.requests:,}", *_cells(cost))
    console = Console(width=120)
    console.print(table)
    apart = found.difference_ms
    console.print(
        f"microseconds on the event loop (bar: {found.bar_us:g} at p99), milliseconds at the "
        f"client; experiment less direct: {apart['p50']:+.2f} ms ({apart['p25']:+.2f} to "
        f"{apart['p75']:+.2f}, quartiles); {found.rate:.0f} requests a second; {found.stored:,} "
        "users stored"
    )


def _cells(cost: Cost) -> list[str]:
    sides = (cost.wall_us, cost.cpu_us, cost.latency_ms)
    return [f"{value:,.1f}" for side in sides for value in side.values()]


def _finish(document: dict[str, Any], json_file: Path | None) -> None:
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if json_file:
        json_file.write_text(json.dumps({"machine": machine, **document}, indent=2) + "\n")


if __name__ == "__main__":
    app()
