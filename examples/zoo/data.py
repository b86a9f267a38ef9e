"""The data sets: what the router is fitted on and what everything is tested on."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .tasks import Example, Task, evaluation_examples, router_examples, target_tasks

ROUTER_PROMPTS = 200
TEST_PROMPTS = 50


def write_data(tasks: dict[str, Task], folder: Path) -> None:
    """Write router.jsonl (training inputs, known wordings) and test.jsonl (held-out inputs)."""
    folder.mkdir(parents=True, exist_ok=True)
    router = (
        example for task in target_tasks(tasks) for example in router_examples(task, ROUTER_PROMPTS)
    )
    tests = (
        example
        for task in tasks.values()
        for wording in ("known", "held-out")
        for example in evaluation_examples(task, TEST_PROMPTS, wording=wording)
    )
    _write_lines(router, folder / "router.jsonl")
    _write_lines(tests, folder / "test.jsonl")


def _write_lines(examples: Iterable[Example], file: Path) -> None:
    lines = (json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)
    file.write_text("".join(lines), "utf-8")
