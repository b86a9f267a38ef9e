"""The demo bank: the base as backbone, the LoRA experts as modules, a router fitted on top."""

from __future__ import annotations

import json
from pathlib import Path

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.build import Progress
from mergeroute.routers.settings import SignalSettings
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.fitting import fit_router, labelled, read_prompts
from mergeroute.serving.router_options import FitOptions

from .tasks import load_tasks, target_tasks

OPTIONS = FitOptions(signal=SignalSettings(layer=3))
"""The last token of the third of four layers, beside the prompt's n-grams: mean pooling tells
prompts that no module serves less well, see docs/zoo.md.
"""
SAMPLES = 3


def write_demo_bank(out: Path, target: Path, progress: Progress) -> Bank:
    """Assemble the bank from what training left in `out`; replaces what stands at `target`.

    progress: a bar for each stage of the router's fit.
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
    names = {task.name: task.description for task in tasks}

    def write_router(folder: Path) -> None:
        data, none = (out / "data" / name for name in ("router.jsonl", "none.jsonl"))
        examples = read_prompts(data, none, {name: name for name in names}.get, modules=list(names))
        with TorchEngine.load(backbone.path, device="cpu", dtype="float32") as engine:
            router = fit_router(
                OPTIONS,
                labelled(engine.tokenizer, examples),
                modules=names,
                encode=engine.encode,
                backbone=backbone.digest,
                progress=progress,
            )
        router.write(folder)

    return write_bank(
        target,
        name="zoo",
        backbone=backbone,
        modules=modules,
        write_router=write_router,
        force=True,
    )


def read_lines(file: Path) -> list[dict[str, str]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
