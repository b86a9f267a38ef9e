"""Materialised blends: one LoRA folder a blend, by concatenation. Slower than virtual blends by
far, and the way that needs no more than vLLM's public interface.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from ...adapters.blend import Blend
from ...adapters.delta import concat
from ...adapters.lora import Module
from ...adapters.staging import staged
from .blends import read_name
from .store import ModuleStore

_FOLDER = ".blends"


def blended(modules: Mapping[str, Module], blend: Blend) -> Module:
    """One module that equals a blend: factors side by side, weights folded in, ranks added.

    modules: what the blend names, inner linear layers alone.
    """
    layers = sorted({layer for name in blend for layer in modules[name].deltas})
    return Module(
        str(blend),
        {
            layer: concat(
                [
                    modules[name].deltas[layer].scaled(weight)
                    for name, weight in blend.items()
                    if layer in modules[name].deltas
                ]
            )
            for layer in layers
        },
    )


def materialise(store: ModuleStore, name: str) -> Path:
    """The folder of a blend, written where it is not there yet. Every server has its own.

    name: as `lora_name` writes it.

    Raises:
        BlendError: it is no such name.
        ModuleError: a module is not registered, or damaged.
        BankError: the folder cannot be written.
    """
    blend = read_name(name)
    own = f"{socket.gethostname()}-{os.getpid()}"
    target = store.folder / _FOLDER / own / hashlib.sha256(name.encode()).hexdigest()
    if not target.is_dir():
        modules = {key: Module.read(store.path(key), name=key) for key in blend}
        with staged(target) as folder:
            blended(modules, blend).save(folder)
    return target


def clear(store: ModuleStore) -> None:
    """Remove the blends of servers that ran on this machine. Those of a running one must stay, of
    another replica too: vLLM reads a folder again when its LoRA was evicted, and ends when it is
    gone.
    """
    for folder in (store.folder / _FOLDER).glob("*"):
        machine, _, process = folder.name.rpartition("-")
        is_over = process == str(os.getpid()) or not _runs(process)
        if machine == socket.gethostname() and is_over:
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
