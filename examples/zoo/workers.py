"""Worker processes: each trains or measures one model at a time on one thread."""

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
import transformers
from rich.progress import Progress

T = TypeVar("T")


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Make the pool in which experts are trained and measured."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


def run(
    pool: ProcessPoolExecutor, label: str, jobs: list[Callable[[], T]], progress: Progress
) -> list[T]:
    """Run jobs in the pool behind a progress bar; results come in the order of the jobs."""
    bar = progress.add_task(label, total=len(jobs))
    futures: list[Future[T]] = [pool.submit(job) for job in jobs]
    for future in as_completed(futures):
        future.result()
        progress.advance(bar)
    return [future.result() for future in futures]


def start_worker() -> None:
    """Prepare a worker process: one thread, no bars."""
    torch.set_num_threads(1)
    quieten()


def quieten() -> None:
    """Keep the libraries' own bars and notes off the screen."""
    warnings.filterwarnings("ignore", module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
