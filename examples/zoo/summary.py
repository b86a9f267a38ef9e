"""Accuracy of the base and of every expert, task by task, in known and held-out wordings."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from .evaluate import accuracy
from .model import load_lora, load_model, load_tokenizer
from .tasks import Kind, evaluation_examples, load_tasks

Source = Literal["base", "lora", "full"]
KNOWN_PROMPTS = 200
HELD_OUT_PROMPTS = 100
BAR = 0.95


@dataclass(frozen=True)
class Score:
    """Accuracy of one model on one task, in 0 to 1."""

    task: str
    kind: Kind
    source: Source
    known: float
    held_out: float


def score(source: Source, name: str, out: Path, *, share: float = 1.0) -> Score:
    """Measure the base or the task's own expert on held-out inputs of one task.

    share: of the usual number of prompts.
    """
    task, tokenizer = load_tasks()[name], load_tokenizer(out / "base")
    if source == "lora":
        model = load_lora(out / "base", out / "lora" / name)
    else:
        model = load_model(out / "base" if source == "base" else out / "full" / name)
    known = evaluation_examples(task, max(2, int(share * KNOWN_PROMPTS)))
    held_out = evaluation_examples(task, max(2, int(share * HELD_OUT_PROMPTS)), wording="held-out")
    return Score(
        task=name,
        kind=task.kind,
        source=source,
        known=accuracy(model, tokenizer, known),
        held_out=accuracy(model, tokenizer, held_out),
    )


def write_summary(scores: Sequence[Score], out: Path) -> None:
    """Write summary.json: one entry per score."""
    text = json.dumps([asdict(score) for score in scores], indent=2)
    (out / "summary.json").write_text(text + "\n", "utf-8")


def show_summary(scores: Sequence[Score], console: Console) -> None:
    """Print the scores as one table, and name those that miss the bar of 95 %."""
    table = Table(title="Exact match %, held-out inputs: known wording / held-out wording")
    for heading in ("task", "base", "lora", "full"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name in dict.fromkeys(score.task for score in scores):
        cells = {
            score.source: f"{100 * score.known:.1f} / {100 * score.held_out:.1f}"
            for score in scores
            if score.task == name
        }
        table.add_row(name, *(cells.get(source, "") for source in ("base", "lora", "full")))
    console.print(table)
    for score in scores:
        if score.known < BAR and (score.source != "base" or score.kind == "generic"):
            console.print(f"[yellow]{score.source} on {score.task} misses 95 %")
