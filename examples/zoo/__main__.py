"""The command line: ``python -m examples.zoo --out build/zoo``."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plan
from .bank import write_demo_bank
from .data import write_data
from .summary import Score, score, show_summary, write_summary
from .tasks import load_tasks
from .train import train_base
from .workers import quieten, run, worker_pool

COLUMNS = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())


def main() -> None:
    """Train the zoo, measure it, print the table."""
    arguments = parse_arguments()
    out: Path = arguments.out
    chosen = plan.QUICK if arguments.quick else plan.FULL
    console = Console()
    quieten()
    write_data(load_tasks(), out / "data")
    with Progress(*COLUMNS, TimeElapsedColumn(), console=console) as progress:
        pretrain(out, chosen, progress=progress, threads=arguments.workers)
        with worker_pool(arguments.workers) as pool:
            run(pool, "LoRA experts and fine-tunes", plan.training_jobs(out, chosen), progress)
            assemble(out, arguments.bank or out / "bank", progress)
            scores = run(pool, "accuracy", score_jobs(out, chosen), progress)
    write_summary(scores, out)
    show_summary(scores, console)


def assemble(out: Path, bank: Path, progress: Progress) -> None:
    """Fit the router and write the bank."""

    def stage(name: str, total: int) -> Callable[[], None]:
        bar = progress.add_task(name, total=total)
        return lambda: progress.advance(bar)

    write_demo_bank(out, bank, stage)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.zoo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/zoo"), help="where to write")
    parser.add_argument("--bank", type=Path, help="where the bank goes; default: OUT/bank")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps only: a smoke test")
    return parser.parse_args()


def pretrain(out: Path, chosen: plan.Plan, *, progress: Progress, threads: int) -> None:
    """Train the base, unless it is there; experts of an earlier base will be trained anew."""
    bar = progress.add_task("base", total=chosen.base.steps)
    if plan.is_done(out, "base", chosen.base):
        progress.update(bar, completed=chosen.base.steps)
        return
    plan.forget_all(out)
    torch.set_num_threads(threads)
    train_base(out / "base", chosen.base, on_step=lambda: progress.advance(bar))
    plan.mark_done(out, "base", chosen.base)


def score_jobs(out: Path, chosen: plan.Plan) -> list[Callable[[], Score]]:
    """List the measurements of the base on all tasks and of the experts on their own."""
    jobs: list[Callable[[], Score]] = []
    for task in load_tasks().values():
        jobs.append(partial(score, "base", task.name, out, share=chosen.prompt_share))
        if task.kind == "expert":
            jobs.append(partial(score, "lora", task.name, out, share=chosen.prompt_share))
            jobs.append(partial(score, "full", task.name, out, share=chosen.prompt_share))
    return jobs


if __name__ == "__main__":
    main()
