"""`mergeroute smoe recover`: merged experts trained for a short while against the original."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console

from ..adapters.backbone import checkpoint_files, digest_of_files, file_digests, locate
from ..adapters.bank import Bank, new_bank, seal
from ..adapters.errors import BankError, DataError, UnsupportedModelError
from ..adapters.manifest import MANIFEST, BackboneEntry, read_manifest
from ..adapters.smoe.stored import RECOVERY
from ..adapters.staging import staged
from ..routers.data import read_examples
from ..runtime.distillation import DistillationSettings, Distilled, distil, held_out_loss
from ..runtime.loading import choose_device, load_model, load_tokenizer
from ..runtime.rendering import Rendered, render
from ..runtime.saving import save_trained
from ..runtime.sparse_blocks import sparse_blocks
from .building import progress_bars

HELD_OUT = 0.1
"""Share of the prompts that is not trained on: it decides when training ends."""


@dataclass(frozen=True)
class Recovered:
    """What recovery came to. stored_loss: on held-out prompts, of what was written: training runs
    in float32, and what is stored in fewer bits is rounded.
    """

    training: Distilled
    stored_loss: float


def recover_model(
    path: Path,
    out: Path,
    settings: DistillationSettings,
    *,
    teacher: str,
    data: Path,
    device: str = "auto",
    force: bool = False,
    console: Console,
) -> Recovered:
    """Train the experts and routers of a bank's backbone, or of a checkpoint, to answer as another
    model does, and write the same again with the new weights; see `distil`. Everything else stays.

    Raises:
        MergerouteError: an input cannot be used, or `out` is taken; nothing is left behind.
    """
    is_bank = (path / MANIFEST).is_file()
    source = _backbone(path) if is_bank else locate(path)
    what, mark = ("bank", MANIFEST) if is_bank else ("checkpoint", "config.json")
    if out.exists() and not (force and (out / mark).is_file()):
        raise BankError(f"{out} exists: choose another folder, or --force replaces a {what}")
    place = choose_device(device)
    with progress_bars(console) as stage:
        train, held_out = _split(_prompts(data, source), seed=settings.seed)
        student, original = _loaded(source, teacher, place)
        step = stage("recovery", settings.steps)
        found = distil(student, original, train, held_out=held_out, settings=settings, on_step=step)
    made = {"teacher": teacher, **asdict(settings), **_document(found)}

    def write(folder: Path) -> Recovered:
        save_trained(student, source, folder)
        stored = load_model(folder, device=place, dtype=torch.float32)
        loss = held_out_loss(stored, original, held_out, settings=settings)
        record = {**made, "stored_held_out_loss": _finite(loss)}
        (folder / RECOVERY).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        return Recovered(found, loss)

    if not is_bank:
        with staged(out) as folder:
            return write(folder)
    with new_bank(out, force=force) as folder:
        recovered = write(folder / "backbone")
        _seal(path, folder)
    return recovered


def told(recovered: Recovered) -> str:
    """What training came to, in a sentence."""
    found = recovered.training
    before, after = found.losses[0], found.losses[found.best]
    if not found.best:
        return f"no step brought the held-out loss below {before:.4f}: the weights are as they were"
    return (
        f"held-out loss {before:.4f} before, {after:.4f} after {found.best} steps, "
        f"{recovered.stored_loss:.4f} as it is stored; {found.steps} steps done"
    )


def _backbone(path: Path) -> Path:
    bank = Bank.open(path)
    if bank.modules or bank.shared or bank.router_path:
        raise BankError(
            f"bank {bank.name!r} has modules or a router, which stand on its backbone as it is: "
            "recover the sparse model first, and add them to what comes out"
        )
    return bank.backbone.path


def _prompts(data: Path, model: Path) -> list[Rendered]:
    tokenizer = load_tokenizer(model)
    return [render(tokenizer, example) for example in read_examples(data)]


def _split(prompts: Sequence[Rendered], *, seed: int) -> tuple[list[Rendered], list[Rendered]]:
    """Prompts to train on and prompts held out; of equal ones all or none are held out."""
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise DataError(
            f"{len(different)} different prompts are too few: one at least is held out to tell "
            "when training ends"
        )
    count = max(1, round(HELD_OUT * len(different)))
    held_out = set(Random(seed).sample(different, count))
    return [p for p in prompts if p not in held_out], [p for p in different if p in held_out]


def _loaded(source: Path, teacher: str, place: torch.device) -> tuple[Any, Any]:
    """The model to train, of which experts and routers alone require gradients, and its teacher.

    Raises:
        UnsupportedModelError: they do not have one vocabulary.
    """
    student = load_model(source, device=place, dtype=torch.float32)
    student.requires_grad_(False)
    for block in sparse_blocks(student).values():
        block.requires_grad_(True)
    original = load_model(locate(teacher), device=place, dtype=torch.float32)
    sizes = [model.config.get_text_config().vocab_size for model in (student, original)]
    if sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"the teacher has {sizes[1]:,} tokens and {source} has {sizes[0]:,}: name the model "
            "that it was made from"
        )
    return student, original


def _seal(path: Path, folder: Path) -> None:
    """Make a bank of a folder with the new backbone; the rest is as in the bank at `path`."""
    bank, manifest = Bank.open(path, verify=False), read_manifest(path)
    digest = digest_of_files(file_digests(checkpoint_files(folder / "backbone")))
    seal(
        folder,
        name=bank.name,
        backbone=BackboneEntry(name=manifest.backbone.name, folder="backbone", digest=digest),
        modules=[],
        recipe=manifest.recipe,
        sources=manifest.sources,
    )


def _document(found: Distilled) -> dict[str, Any]:
    losses = {step: _finite(loss) for step, loss in found.losses.items()}
    return {"best_step": found.best, "steps_done": found.steps, "held_out_losses": losses}


def _finite(loss: float) -> float | None:
    """What JSON has a number for."""
    return loss if isfinite(loss) else None
