"""Bank: what is saved, versioned and served: a backbone, modules and a router in one folder.

manifest.json            written last; a folder without it is no bank
backbone/                a Hugging Face checkpoint (absent when the manifest refers to one)
modules/<name>/          a PEFT LoRA folder each
shared/                  a PEFT LoRA folder that every blend contains, when there is one
router/                  what mergeroute.routers wrote
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .backbone import Backbone, checkpoint_files, digest_of_files, digest_of_weights
from .digest import file_digest, json_digest
from .errors import BankError, ModuleError
from .lora import Module
from .manifest import (
    MANIFEST,
    BackboneEntry,
    FileEntry,
    Manifest,
    ModuleEntry,
    check_file,
    check_folders,
    check_names,
    read_manifest,
)
from .module_files import module_files
from .staging import staged

Progress = Callable[[str], None]
"""Told the name of each file once it is read."""


@dataclass(frozen=True)
class BankModule:
    """A module of a bank: where it is and what it is for."""

    name: str
    path: Path
    description: str = ""
    samples: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bank:
    """An opened bank. Tensors are read when a module is loaded.

    sources: digests of the base and the experts it was built from, by name.
    """

    name: str
    digest: str
    backbone: Backbone
    modules: tuple[BankModule, ...]
    router_path: Path | None = None
    shared: BankModule | None = None
    recipe: Mapping[str, Any] | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, progress: Progress | None = None
    ) -> Bank:
        """Open a bank folder and check every file against its digest.

        verify: False checks sizes only.

        Raises:
            BankError: no bank, a newer format, or a file that is missing, truncated, changed or
                not in the manifest.
            BackboneError: the manifest refers to a backbone that is not there.
        """
        folder = Path(path).expanduser().resolve()
        manifest = read_manifest(folder)
        check_names([manifest.name, *(module.name for module in manifest.modules)])
        check_folders(folder, manifest)
        for name, entry in manifest.files.items():
            check_file(folder, name, entry, verify=verify)
            if progress:
                progress(name)
        return cls(
            name=manifest.name,
            digest=manifest.digest,
            backbone=_open_backbone(folder, manifest),
            modules=tuple(_open_module(folder, manifest, entry) for entry in manifest.modules),
            router_path=folder / manifest.router if manifest.router else None,
            shared=_open_shared(folder, manifest),
            recipe=manifest.recipe,
            sources=manifest.sources,
        )

    @classmethod
    def adhoc(cls, name: str, backbone: Backbone, modules: Sequence[BankModule]) -> Bank:
        """A bank that is nowhere on disk: a backbone and LoRA folders as they stand, no router.

        Raises:
            BankError: a name is not allowed or given twice, or a folder is incomplete.
        """
        check_names([name, *(module.name for module in modules)])
        digests = {module.name: _module_digests(module) for module in modules}
        digest = json_digest({"name": name, "backbone": backbone.digest, "modules": digests})
        return cls(name=name, digest=digest, backbone=backbone, modules=tuple(modules))

    def module_of(self, task: str) -> BankModule | None:
        """The module that serves a task: its own, or the one its own was folded into."""
        own = {module.name: module for module in self.modules}
        folded = {
            name: module for module in self.modules for name in _folded_names(module.provenance)
        }
        return own.get(task) or folded.get(task)

    def load(self, module: BankModule) -> Module:
        """Read one module's tensors.

        Raises:
            ModuleError: it cannot be served on this backbone, or was made for another.
        """
        loaded = Module.load(module.path, name=module.name, layers=self.backbone.shapes)
        loaded.check_backbone(self.backbone)
        return loaded


def write_bank(
    path: str | Path,
    *,
    name: str,
    backbone: Backbone,
    modules: Sequence[BankModule],
    write_router: Callable[[Path], None] | None = None,
    embed_backbone: bool = True,
    force: bool = False,
) -> Bank:
    """Write a bank beside its final place and rename it there, so that no half bank is ever seen.

    write_router: writes the router's files into the folder it is given.
    embed_backbone: False refers to the backbone's path instead of copying it.
    force: replace the bank that stands at `path`; nothing but a bank is replaced.

    Raises:
        BankError: `path` exists, a name is not allowed, or a module folder is incomplete.
    """
    check_names([name, *(module.name for module in modules)])
    with new_bank(path, force=force) as folder:
        if embed_backbone:
            copy_files(checkpoint_files(backbone.path), folder / "backbone")
        for module in modules:
            copy_files(_files_of(module), folder / "modules" / module.name)
        if write_router:
            (folder / "router").mkdir()
            write_router(folder / "router")
        entry = BackboneEntry(
            name=backbone.name,
            folder="backbone" if embed_backbone else None,
            reference=None if embed_backbone else str(backbone.path),
            digest=backbone.digest,
        )
        seal(folder, name=name, backbone=entry, modules=modules)
    return Bank.open(path, verify=False)


@contextmanager
def new_bank(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends well, sealed.

    force: replace the bank that stands at `path`; nothing but a bank is replaced.

    Raises:
        BankError: `path` exists, the disk is full, or what was written cannot be opened.
    """
    target = Path(path).expanduser()
    if target.is_file() or (target.is_dir() and not _is_replaceable(target)):
        raise BankError(
            f"{target} exists, is no bank and will not be replaced: choose another folder"
        )
    if target.exists() and not force:
        raise BankError(f"{target} exists: choose another folder, or --force its replacement")
    with staged(target) as folder:
        yield folder
        Bank.open(folder)  # what cannot be opened takes nobody's place


def seal(
    folder: Path,
    *,
    name: str,
    backbone: BackboneEntry,
    modules: Sequence[BankModule],
    recipe: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest of a bank's folder, which makes it a bank.

    modules: what lies under modules/, in the router's order. router/ and shared/ are listed when
    they are there. recipe: what the bank was built from. sources: digests of base and experts.
    """
    manifest = Manifest(
        name=name,
        backbone=backbone,
        modules=tuple(_entry(module) for module in modules),
        router="router" if (folder / "router").is_dir() else None,
        shared="shared" if (folder / "shared").is_dir() else None,
        recipe=dict(recipe) if recipe is not None else None,
        sources=dict(sources or {}),
        files=_file_entries(folder),
    )
    document = manifest.model_dump(mode="json")
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _folded_names(provenance: Mapping[str, Any]) -> Iterator[str]:
    """The modules that a module was folded of, and those that they were folded of before."""
    if provenance.get("method") == "fold":
        yield from _folded_names(provenance.get("before", {}))
        for member in provenance.get("members", ()):
            yield from _folded_names(member["provenance"])
            yield member["name"]


def _is_replaceable(target: Path) -> bool:
    return (target / MANIFEST).is_file() or not any(target.iterdir())


def _open_backbone(folder: Path, manifest: Manifest) -> Backbone:
    entry = manifest.backbone
    if entry.folder is None:
        if entry.reference is None:
            raise BankError(f"{folder / MANIFEST} names neither a backbone folder nor a reference")
        backbone = Backbone.open(_outside(folder, entry.reference), name=entry.name)
        if backbone.digest != entry.digest:
            raise BankError(
                f"the backbone {entry.reference} has digest {backbone.digest}, the bank was built "
                f"on {entry.digest}: put the same checkpoint there"
            )
        return backbone
    prefix = entry.folder.rstrip("/") + "/"
    files = {n.removeprefix(prefix): f for n, f in manifest.files.items() if n.startswith(prefix)}
    if "config.json" not in files:
        raise BankError(f"{folder / entry.folder} holds no config.json: the bank is incomplete")
    digests = {name: file.digest for name, file in files.items()}
    digest = digest_of_files(digests)
    if digest != entry.digest:
        raise BankError(
            f"{folder / entry.folder} has digest {digest}, the manifest says {entry.digest}"
        )
    return Backbone(
        path=(folder / entry.folder).resolve(),
        name=entry.name,
        digest=digest,
        weights_digest=digest_of_weights(digests),
    )


def _open_module(folder: Path, manifest: Manifest, entry: ModuleEntry) -> BankModule:
    _check_listed(folder, manifest, entry.folder)
    return BankModule(
        name=entry.name,
        path=folder / entry.folder,
        description=entry.description,
        samples=entry.samples,
        provenance=entry.provenance,
    )


def _open_shared(folder: Path, manifest: Manifest) -> BankModule | None:
    if manifest.shared is None:
        return None
    _check_listed(folder, manifest, manifest.shared)
    return BankModule(name="shared", path=folder / manifest.shared)


def _check_listed(folder: Path, manifest: Manifest, module: str) -> None:
    """The files of a module's folder are in the manifest."""
    for file in _files(folder / module):
        if f"{module}/{file.name}" not in manifest.files:
            raise BankError(f"{folder / module} lacks {file.name} in the manifest")


def _outside(folder: Path, reference: str) -> str:
    relative = folder / reference
    return str(relative) if relative.is_dir() else reference


def _entry(module: BankModule) -> ModuleEntry:
    return ModuleEntry(
        name=module.name,
        folder=f"modules/{module.name}",
        description=module.description,
        samples=module.samples,
        provenance=module.provenance,
    )


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            bytes=path.stat().st_size, digest=file_digest(path)
        )
        for path in files
    }


def _files_of(module: BankModule) -> list[Path]:
    try:
        return _files(module.path)
    except BankError as error:
        raise BankError(f"module {module.name!r}: {error}") from error


def _files(folder: Path) -> list[Path]:
    try:
        return module_files(folder)
    except ModuleError as error:
        raise BankError(str(error)) from error


def _module_digests(module: BankModule) -> list[str]:
    return [file_digest(file) for file in _files_of(module)]


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
