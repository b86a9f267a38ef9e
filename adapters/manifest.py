"""Manifest: the table of contents of a bank, and the checks that hold it against the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .digest import file_digest, json_digest
from .errors import BankError

FORMAT_VERSION = 2
_SINCE_2 = ("shared", "recipe", "sources")
MANIFEST = "manifest.json"
RESERVED_NAMES = ("auto", "none", "backbone", "base", "blend")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """A name of a bank or module that requests can use.

    Raises:
        ValueError: other characters than letters, digits, `.`, `_`, `-`, or a reserved word.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r} is not allowed: 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"name {name!r} is reserved: choose another ({', '.join(RESERVED_NAMES)})")
    return name


def _check_path(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leads out of the bank: relative, without '..'")
    return path


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneEntry(_Strict):
    """Where the backbone is: inside the bank, or a folder or hub id outside."""

    name: str = Field(description="what requests call it")
    folder: Annotated[str, AfterValidator(_check_path)] | None = Field(
        None, description="folder inside the bank"
    )
    reference: str | None = Field(None, description="folder or hub id outside the bank")
    digest: str = Field(description="content digest of the checkpoint")


class ModuleEntry(_Strict):
    """One module of a bank."""

    name: Annotated[str, AfterValidator(check_name)] = Field(description="what requests call it")
    folder: Annotated[str, AfterValidator(_check_path)] = Field(description="its PEFT folder")
    description: str = Field("", description="what it is for, one sentence")
    samples: tuple[str, ...] = Field((), description="prompts it is for")
    provenance: dict[str, Any] = Field(default_factory=dict, description="how it came about")


class FileEntry(_Strict):
    """Size and digest of one file."""

    bytes: int = Field(ge=0, description="size")
    digest: str = Field(description="sha256 of its bytes")


class Manifest(_Strict):
    """The bank's table of contents. Its own digest names the bank."""

    format: Literal["mergeroute-bank"] = Field("mergeroute-bank", description="what this file is")
    version: int = Field(FORMAT_VERSION, description="format version")
    name: Annotated[str, AfterValidator(check_name)] = Field(description="what requests call it")
    backbone: BackboneEntry
    modules: tuple[ModuleEntry, ...] = Field(description="in the router's order")
    router: Annotated[str, AfterValidator(_check_path)] | None = Field(
        None, description="folder of the router"
    )
    shared: Annotated[str, AfterValidator(_check_path)] | None = Field(
        None, description="folder of the always-on module"
    )
    recipe: dict[str, Any] | None = Field(None, description="what it was built from")
    sources: dict[str, str] = Field(
        default_factory=dict, description="digests of base and experts, by name"
    )
    files: dict[Annotated[str, AfterValidator(_check_path)], FileEntry] = Field(
        description="every file of the bank but this one"
    )

    @property
    def digest(self) -> str:
        """The bank's content digest. Keys that a format 1 bank lacks do not count when empty."""
        document = self.model_dump(mode="json")
        return json_digest({k: v for k, v in document.items() if v or k not in _SINCE_2})


def read_manifest(folder: Path) -> Manifest:
    """A bank's manifest.

    Raises:
        BankError: it is missing, damaged or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BankError(f"{folder} is no bank: it holds no {MANIFEST}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BankError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("format") != "mergeroute-bank":
        raise BankError(
            f"{path} is not the manifest of a bank: format 'mergeroute-bank' is missing"
        )
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise BankError(
            f"{path} has format version {version}, this program reads 1 to {FORMAT_VERSION}: "
            "upgrade mergeroute"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BankError(f"{path} is damaged at {where!r}: {first['msg']}") from error


def check_folders(folder: Path, manifest: Manifest) -> None:
    """Each folder that is served holds listed files, and no others: a reader would pick them up."""
    modules = (module.folder for module in manifest.modules)
    folders = [manifest.backbone.folder, manifest.router, manifest.shared, *modules]
    for name in filter(None, folders):
        if not any(file.startswith(f"{name.rstrip('/')}/") for file in manifest.files):
            raise BankError(f"{folder / MANIFEST} lists no file of {name}: the bank is incomplete")
        for path in (folder / name).rglob("*"):
            if not path.is_dir() and path.relative_to(folder).as_posix() not in manifest.files:
                raise BankError(f"{path} is not in the manifest: remove it or build the bank again")


def check_file(folder: Path, name: str, entry: FileEntry, *, verify: bool) -> None:
    """Hold one file against its entry; its digest too when `verify`.

    Raises:
        BankError: it is missing, truncated, changed or a link out of the bank.
    """
    path = folder / name
    if not path.is_file():
        raise BankError(f"{path} is missing: the bank is incomplete, copy it again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BankError(f"{path} is a link out of the bank, which is not allowed: copy the file in")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BankError(
            f"{path} has {size:,} bytes, the manifest says {entry.bytes:,}: it is truncated or "
            "changed, copy the bank again"
        )
    if verify and (digest := file_digest(path)) != entry.digest:
        raise BankError(
            f"{path} has digest {digest}, the manifest says {entry.digest}: it is corrupt or was "
            "changed, copy the bank again"
        )


def check_names(names: Sequence[str]) -> None:
    """Names of a bank and its modules together.

    Raises:
        BankError: one is not allowed, or given twice.
    """
    try:
        for name in names:
            check_name(name)
    except ValueError as error:
        raise BankError(str(error)) from error
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise BankError(f"the name {min(twice)!r} is given twice: bank and modules share one space")
