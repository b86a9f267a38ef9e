"""How long each model of the zoo is trained, and the jobs that do it."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from .tasks import load_tasks, target_tasks
from .train import Schedule, train_full, train_lora

MARKS = ".done"
SOURCES = ("model.py", "numerals.py", "tasks.py", "tokenizer.py", "train.py", "wordings.toml")


@dataclass(frozen=True)
class Plan:
    """The schedules of one run. Tasks that are not named in a table take its default.

    prompt_share: of the usual number of test prompts, in (0, 1].
    """

    base: Schedule
    full_default: Schedule
    lora_default: Schedule
    full: dict[str, Schedule] = field(default_factory=dict)
    lora: dict[str, Schedule] = field(default_factory=dict)
    prompt_share: float = 1.0


FULL = Plan(
    base=Schedule(1300, 8e-3),
    full_default=Schedule(200, 8e-4),
    lora_default=Schedule(200, 5e-3),
    full={name: Schedule(350, 8e-4) for name in ("english", "german", "spanish", "reverse")},
    lora={
        "reverse": Schedule(350, 8e-3),
        **{name: Schedule(320, 5e-3) for name in ("english", "german", "spanish")},
    },
)
QUICK = Plan(
    base=Schedule(2, 8e-3),
    full_default=Schedule(1, 5e-4),
    lora_default=Schedule(1, 5e-3),
    prompt_share=0.01,
)


def is_done(out: Path, name: str, schedule: Schedule) -> bool:
    """Tell whether a model was already trained with this very schedule and these sources."""
    mark = out / MARKS / name
    return mark.exists() and mark.read_text("utf-8") == _recipe(schedule)


def mark_done(out: Path, name: str, schedule: Schedule) -> None:
    """Remember that a model was trained, and how."""
    (out / MARKS).mkdir(parents=True, exist_ok=True)
    (out / MARKS / name).write_text(_recipe(schedule), "utf-8")


def _recipe(schedule: Schedule) -> str:
    """What decides the weights: the schedule, and the sources of data and model."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    return f"{schedule} {digest.hexdigest()}"


def forget_all(out: Path) -> None:
    """Remove the marks of all models, so that each is trained again."""
    shutil.rmtree(out / MARKS, ignore_errors=True)


def train_expert(kind: Literal["lora", "full"], name: str, out: Path, schedule: Schedule) -> None:
    """Train one expert into its folder, unless it is there.

    Every LoRA starts from a seed of its own: experts that share one merge unlike real ones.
    """
    folder, task = out / kind / name, load_tasks()[name]
    if is_done(out, f"{kind}-{name}", schedule):
        return
    if kind == "full":
        train_full(out / "base", folder, task, schedule)
    else:
        train_lora(out / "base", folder, task, schedule, seed=1 + list(load_tasks()).index(name))
    mark_done(out, f"{kind}-{name}", schedule)


def training_jobs(out: Path, plan: Plan) -> list[Callable[[], None]]:
    """List the trainings of all experts, the longest first so that no worker waits at the end."""
    jobs: list[tuple[int, Callable[[], None]]] = []
    for task in target_tasks(load_tasks()):
        lora = plan.lora.get(task.name, plan.lora_default)
        full = plan.full.get(task.name, plan.full_default)
        jobs.append((lora.steps, partial(train_expert, "lora", task.name, out, lora)))
        jobs.append((full.steps, partial(train_expert, "full", task.name, out, full)))
    return [job for _, job in sorted(jobs, key=lambda item: -item[0])]
