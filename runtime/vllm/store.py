"""ModuleStore: the folder through which vLLM's processes get their modules.

<key>/                  a plain float32 PEFT folder per registered module, named by content
.mismatch-<version>     why virtual blends did not pass the self-check of a vLLM of this version

The gateway writes, every worker reads. What lies there is never changed, only added and removed, so
that any number of servers on one folder agree without talking to each other.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters.errors import ModuleError
from ...adapters.staging import staged
from .blends import is_key, module_key

if (
    TYPE_CHECKING
):  # vLLM's processes only look here: they are to start without transformers and peft
    from ...adapters.lora import Module
    from ...adapters.shapes import Shapes

_EXPERTS = ".experts."
_MISMATCH = ".mismatch-"


@dataclass(frozen=True)
class ModuleStore:
    """A folder of modules. One process writes it.

    slots: most modules registered at once. rank: the largest rank of a module.
    """

    folder: Path
    slots: int
    rank: int

    def keys(self) -> frozenset[str]:
        """The registered modules."""
        if not self.folder.is_dir():
            return frozenset()
        return frozenset(path.name for path in self.folder.iterdir() if is_key(path.name))

    def path(self, key: str) -> Path:
        """Where a module lies, or would lie."""
        return self.folder / key

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_dir()

    def add(self, module: Module, shapes: Shapes) -> str:
        """Register a module for all servers on this folder; returns its key.

        Raises:
            ModuleError: it changes what cannot be blended inside vLLM, its rank is too large, or
                all slots are taken.
            BankError: the folder cannot be written.
        """
        module.check(shapes)
        check_inner(module, shapes)
        key = module_key(module.digest)
        if key in self:
            return key
        self._check_room(module)
        with staged(self.path(key)) as folder:
            _without_empty(module).save(folder)
        return key

    def remove(self, digest: str) -> None:
        """Take a module away; to be called when no request names it any more."""
        path = self.path(module_key(digest))
        if path.is_dir():
            gone = path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}"))
            shutil.rmtree(gone, ignore_errors=True)

    def mismatch(self, version: str = "*") -> str | None:
        """Why blends came out wrong in a vLLM of this version, or of any; None: they never did."""
        texts = (path.read_text() for path in self.folder.glob(f"{_MISMATCH}{version}"))
        return next(texts, None)

    def note_mismatch(self, version: str, why: str) -> Path:
        """Keep it for the next start, which materialises blends under `auto`; returns the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{uuid.uuid4().hex}"  # workers write at once, and others read
        new.write_text(why)
        return new.replace(self.folder / f"{_MISMATCH}{version}")

    def _check_room(self, module: Module) -> None:
        if module.rank > self.rank:
            raise ModuleError(
                f"module {module.name!r} has rank {module.rank}, vLLM was started for at most "
                f"{self.rank}: start it with --max-lora-rank {module.rank} or more"
            )
        if len(self.keys()) >= self.slots:
            raise ModuleError(
                f"module {module.name!r} finds no slot: all {self.slots} are taken; unload a "
                "module, or start vLLM with more slots"
            )


def check_inner(module: Module, shapes: Shapes) -> None:
    """Refuse a module that changes more than inner linear layers.

    Raises:
        ModuleError: it names what cannot be blended inside vLLM.
    """
    strange = [
        *(("the embedding", name) for name in sorted(module.embeddings)),
        *(("the head", name) for name in sorted(module.deltas.keys() & shapes.head.keys())),
        *(("experts", name) for name in sorted(module.deltas) if _EXPERTS in f"{name}."),
        *(("norms or biases", name) for name in sorted(module.vectors)),
    ]
    if strange:
        what, name = strange[0]
        raise ModuleError(
            f"module {module.name!r} changes {what} ({name!r}), which is not blended inside vLLM: "
            "build the bank with kinds shared, or serve it with the torch engine"
        )


def _without_empty(module: Module) -> Module:
    """The same module without layers of rank 0, which vLLM does not take."""
    deltas = {layer: delta for layer, delta in module.deltas.items() if delta.rank}
    return replace(module, deltas=deltas, gates={})
