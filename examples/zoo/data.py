"""The data sets: what the router is fitted on and what everything is tested on."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .none import none_prompts
from .tasks import Task, evaluation_examples, router_examples, target_tasks

ROUTER_PROMPTS = 200
TEST_PROMPTS = 50


def write_data(tasks: dict[str, Task], folder: Path) -> None:
    """Write router.jsonl and none.jsonl (training inputs, known wordings), which the router is
    fitted on, and test.jsonl (held-out inputs).
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_router_data(tasks, folder)
    tests = (
        asdict(example)
        for task in tasks.values()
        for wording in ("known", "held-out")
        for example in evaluation_examples(task, TEST_PROMPTS, wording=wording)
    )
    _write_lines(tests, folder / "test.jsonl")


def write_router_data(tasks: dict[str, Task], folder: Path) -> None:
    """Write what the router is fitted on: prompts with their task, and prompts of no task."""
    router = (
        asdict(example)
        for task in target_tasks(tasks)
        for example in router_examples(task, ROUTER_PROMPTS)
    )
    _write_lines(router, folder / "router.jsonl")
    _write_lines(({"prompt": prompt} for prompt in none_prompts()), folder / "none.jsonl")


def _write_lines(rows: Iterable[dict[str, Any]], file: Path) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), "utf-8")
