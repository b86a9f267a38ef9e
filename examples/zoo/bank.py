"""The demo bank: the base as backbone, the LoRA experts as modules, a router fitted on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.routers.base import Query
from mergeroute.routers.store import PrototypeSettings, SignalSettings, save_prototype
from mergeroute.routers.training import Labelled, fit_prototype
from mergeroute.runtime.torch_engine import TorchEngine

from .tasks import load_tasks, target_tasks

SIGNAL = SignalSettings(layer=3, pooling="last")
"""The last token of the third of four layers: mean pooling keeps only a third of the generic
prompts on the backbone, see docs/zoo.md.
"""
SAMPLES = 3


def write_demo_bank(out: Path, target: Path, *, on_prompt: Callable[[], None]) -> Bank:
    """Assemble the bank from what training left in `out`; replaces what stands at `target`.

    on_prompt: called after each prompt the router is fitted on.
    """
    prompts = read_lines(out / "data" / "router.jsonl")
    tasks = target_tasks(load_tasks())
    modules = [
        BankModule(
            name=task.name,
            path=out / "lora" / task.name,
            description=task.description,
            samples=tuple([p["prompt"] for p in prompts if p["task"] == task.name][:SAMPLES]),
            provenance={"method": "lora", "made_by": "examples/zoo"},
        )
        for task in tasks
    ]
    backbone = Backbone.open(out / "base", name="zoo-base")
    settings = PrototypeSettings(modules=tuple(m.name for m in modules), signal=SIGNAL)

    def write_router(folder: Path) -> None:
        with TorchEngine.load(backbone.path, device="cpu", dtype="float32") as engine:
            examples = []
            for prompt in prompts:
                query = Query(rendered(engine, prompt["prompt"]), prompt["prompt"])
                examples.append(Labelled(query, prompt["task"]))
                on_prompt()
            scorer = fit_prototype(examples, settings, encode=engine.encode)
        save_prototype(folder, scorer, settings)

    return write_bank(
        target,
        name="zoo",
        backbone=backbone,
        modules=modules,
        write_router=write_router,
        force=True,
    )


def rendered(engine: TorchEngine, text: str) -> tuple[int, ...]:
    """A user's message as the backbone sees it."""
    ids = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return tuple(ids)


def read_lines(file: Path) -> list[dict[str, str]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
