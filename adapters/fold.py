"""Fold: a bank with fewer modules, or with smaller ones, from a bank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .bank import Bank, BankModule, new_bank, seal
from .build import MODULE_DTYPES, Progress
from .errors import BankError
from .fold_settings import FoldSettings
from .lora import Module
from .manifest import BackboneEntry, Manifest, check_names, read_manifest
from .module_files import CONFIG_FILE, INT8_FILE, module_files
from .pool import (
    groups,
    layers_of,
    likeness,
    merge_modules,
    ranks_within,
    relative_error,
    shrink_module,
    stored_bytes,
    used_groups,
    without_double_head,
)
from .ranks import ITEM_BYTES

RenameModules = Callable[[Path, Mapping[str, str]], None]
"""Tells the router in a folder where modules have gone, old names to new."""

_LONGEST_NAME = 64
_FLOOR = 0.01
"""Of the traffic: what a module counts at least, so that one that is not used is not lost."""

_DTYPES = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class _Member:
    """A module of the old bank, read. dtype: what its factors are stored in."""

    entry: BankModule
    module: Module
    dtype: str


@dataclass(frozen=True)
class _Folding:
    """What is at hand while a bank is folded. folder: of the new bank."""

    bank: Bank
    folder: Path
    settings: FoldSettings
    progress: Progress
    members: Sequence[_Member]


def fold(
    path: str | Path,
    out: str | Path,
    settings: FoldSettings,
    *,
    rename: RenameModules,
    progress: Progress = lambda stage, total: lambda: None,
) -> Bank:
    """Write a bank whose modules are fewer or smaller. Backbone, shared module, recipe and sources
    are carried over; so is the router, which is told where modules have gone. Every module that is
    written anew says in its provenance how it was folded, and of which bank.

    Raises:
        BankError: a number is out of range, the bank has no modules, or `out` is taken or the bank
            itself; nothing is left behind.
        MergerouteError: the bank, or its router, cannot be read.
    """
    source, target = (Path(p).expanduser().resolve() for p in (path, out))
    if target.is_relative_to(source):
        raise BankError(
            f"{out} is the bank that is folded, or lies in it: choose another folder; banks do not "
            "change"
        )
    step = progress("verifying the bank", 1)
    bank = Bank.open(source)
    step()
    _check_count(bank, settings.to)
    _check_used(bank, settings.usage or {})
    with new_bank(out, force=settings.force) as folder:
        folding = _Folding(bank, folder, settings, progress, _members(bank, progress))
        modules, renamed = _shrink(folding) if settings.to is None else _merge(folding, settings.to)
        name = settings.name or bank.name
        check_names([name, *(module.name for module in modules)])
        if bank.shared is not None:
            shutil.copytree(bank.shared.path, folder / "shared")
        if bank.router_path is not None:
            shutil.copytree(bank.router_path, folder / "router")
            if renamed:
                rename(folder / "router", renamed)
        manifest = read_manifest(source)
        seal(
            folder,
            name=name,
            backbone=copy_backbone(source, manifest, bank, folder),
            modules=modules,
            recipe=manifest.recipe,
            sources=manifest.sources,
        )
    return Bank.open(out, verify=False)


def _check_count(bank: Bank, to: int | None) -> None:
    if not bank.modules:
        raise BankError(f"bank {bank.name!r} has no modules: there is nothing to fold")
    if to is not None and not 1 <= to < len(bank.modules):
        raise BankError(
            f"{to} is out of range: bank {bank.name!r} has {len(bank.modules)} modules, so fold it "
            f"to 1 to {len(bank.modules) - 1}"
            if len(bank.modules) > 1
            else f"bank {bank.name!r} has one module, which cannot be fewer: fold it by bytes"
        )


def _check_used(bank: Bank, usage: Mapping[str, float]) -> None:
    names = [module.name for module in bank.modules]
    if unknown := sorted(usage.keys() - set(names)):
        raise BankError(
            f"usage names {unknown[0]!r}, which is no module of bank {bank.name!r}: "
            f"{', '.join(names)}"
        )


def copy_backbone(source: Path, manifest: Manifest, bank: Bank, folder: Path) -> BackboneEntry:
    """Copy the backbone, or refer to where it is."""
    entry = manifest.backbone
    if entry.folder is not None:
        shutil.copytree(bank.backbone.path, folder / "backbone")
        return entry.model_copy(update={"folder": "backbone"})
    if (source / str(entry.reference)).is_dir():
        return entry.model_copy(update={"reference": str(bank.backbone.path)})
    return entry


def _members(bank: Bank, progress: Progress) -> tuple[_Member, ...]:
    step = progress("reading modules", len(bank.modules))
    members = []
    for entry in bank.modules:
        module = without_double_head(bank.load(entry), bank.backbone.shapes)
        members.append(_Member(entry, module, stored_dtype(entry.path)))
        step()
    return tuple(members)


def stored_dtype(folder: Path) -> str:
    """What a module folder's factors are stored in; of several float types the widest."""
    path = module_files(folder)[1]
    if path.name == INT8_FILE:
        return "int8"
    with safe_open(path, framework="pt") as file:
        found = {_DTYPES[file.get_slice(name).get_dtype()] for name in file.keys()}  # noqa: SIM118
    return _widest(found or {"float32"})


def _widest(dtypes: set[str]) -> str:
    return min(dtypes, key=list(ITEM_BYTES).index)


def _merge(folding: _Folding, count: int) -> tuple[list[BankModule], dict[str, str]]:
    """Write `count` modules, and where the old ones have gone. Groups and what becomes of them do
    not depend on the order of the bank.
    """
    members = sorted(folding.members, key=lambda member: member.entry.name)
    order = {entry.name: k for k, entry in enumerate(folding.bank.modules)}
    shares = _shares(folding, members)
    pools = [[members[k] for k in group] for group in _groups(folding, members, shares, count)]
    pools.sort(key=lambda pool: min(order[member.entry.name] for member in pool))
    names = _names(pools, folding.settings.name or folding.bank.name)
    step = folding.progress("merging modules", len(pools))
    merged = []
    for pool, name in zip(pools, names, strict=True):
        merged.append(_merged(folding, pool, name, shares))
        step()
    small = _fitted(folding, merged, [_widest({m.dtype for m in pool}) for pool in pools])
    written = []
    for pool, before, module in zip(pools, merged, small, strict=True):
        if len(pool) > 1:
            written.append(_join(folding, pool, module, shares))
        elif module is before:
            written.append(_keep(folding, pool[0]))
        else:
            written.append(_smaller(folding, pool[0], module))
    renamed = {
        member.entry.name: name
        for pool, name in zip(pools, names, strict=True)
        for member in pool
        if len(pool) > 1
    }
    return written, renamed


def _shares(folding: _Folding, members: Sequence[_Member]) -> dict[str, float] | None:
    """Each module's share of the traffic, if it is known; none below the floor."""
    usage = folding.settings.usage
    if usage is None:
        return None
    total = sum(usage.values())
    names = [member.entry.name for member in members]
    return {name: max(usage.get(name, 0.0) / total, _FLOOR) for name in names}


def _groups(
    folding: _Folding,
    members: Sequence[_Member],
    shares: Mapping[str, float] | None,
    count: int,
) -> list[list[int]]:
    """Which members become one."""
    modules, shapes = [member.module for member in members], folding.bank.backbone.shapes
    step = folding.progress("likeness of modules", len(layers_of(modules, shapes)))
    cosine = likeness(modules, shapes, on_layer=step)
    if shares is None:
        return groups(cosine, count)
    return used_groups(cosine, [shares[member.entry.name] for member in members], count)


def _merged(
    folding: _Folding, pool: Sequence[_Member], name: str, shares: Mapping[str, float] | None
) -> Module:
    """What several modules become before it is made to fit; one stays what it is."""
    if len(pool) == 1:
        return pool[0].module
    own = None if shares is None else [shares[member.entry.name] for member in pool]
    return merge_modules(
        [member.module for member in pool],
        name=name,
        shapes=folding.bank.backbone.shapes,
        method=folding.settings.method,
        shares=None if own is None else [share / sum(own) for share in own],
        keeps_rank=folding.settings.nbytes is not None,
    )


def _fitted(folding: _Folding, modules: Sequence[Module], dtypes: Sequence[str]) -> list[Module]:
    """The modules within the bytes that are given, if any are; the same ones where they fit."""
    nbytes = folding.settings.nbytes
    if nbytes is None or stored_bytes(modules, dtypes) <= nbytes:
        return list(modules)
    ranks = ranks_within(modules, dtypes, nbytes)
    method = folding.settings.method
    return [shrink_module(m, own, method) for m, own in zip(modules, ranks, strict=True)]


def _names(pools: Sequence[Sequence[_Member]], bank: str) -> list[str]:
    """A name for each pool: its members', or fold-1 and so on where that is too long or taken."""
    joined = [".".join(member.entry.name for member in pool) for pool in pools]
    taken = {bank, *(member.entry.name for pool in pools for member in pool)}
    names, number = [], 0
    for name, pool in zip(joined, pools, strict=True):
        if len(pool) > 1:
            while len(name) > _LONGEST_NAME or name in taken:
                number += 1
                name = f"fold-{number}"
            taken.add(name)
        names.append(name)
    return names


def _keep(folding: _Folding, member: _Member) -> BankModule:
    """A module as it stands, byte for byte."""
    path = folding.folder / "modules" / member.entry.name
    shutil.copytree(member.entry.path, path)
    return replace(member.entry, path=path)


def _join(
    folding: _Folding,
    pool: Sequence[_Member],
    merged: Module,
    shares: Mapping[str, float] | None,
) -> BankModule:
    """Write one module in place of several."""
    shapes, path = folding.bank.backbone.shapes, folding.folder / "modules" / merged.name
    dtype = _widest({member.dtype for member in pool})
    stored = _save(merged, path, base=_base_of(pool[0].entry.path), dtype=dtype)
    errors = [relative_error(stored, member.module, shapes) for member in pool]
    used = [{} if shares is None else {"share": shares[member.entry.name]} for member in pool]
    return BankModule(
        name=merged.name,
        path=path,
        description="; ".join(m.entry.description for m in pool if m.entry.description),
        samples=tuple(sample for member in pool for sample in member.entry.samples),
        provenance={
            **_report(folding, stored, path, dtype=dtype),
            "error": max(errors),
            "members": [
                {"name": m.entry.name, "error": error, **own, "provenance": m.entry.provenance}
                for m, error, own in zip(pool, errors, used, strict=True)
            ],
        },
    )


def _shrink(folding: _Folding) -> tuple[list[BankModule], dict[str, str]]:
    """Write every module, recompressed; none goes anywhere."""
    method, nbytes = folding.settings.method, folding.settings.nbytes or 0
    ranks = ranks_within(
        [m.module for m in folding.members], [m.dtype for m in folding.members], nbytes
    )
    step = folding.progress("shrinking modules", len(folding.members))
    written = []
    for member, own in zip(folding.members, ranks, strict=True):
        written.append(_smaller(folding, member, shrink_module(member.module, own, method)))
        step()
    return written, {}


def _smaller(folding: _Folding, member: _Member, small: Module) -> BankModule:
    """Write one module, recompressed."""
    path = folding.folder / "modules" / member.entry.name
    stored = _save(small, path, base=_base_of(member.entry.path), dtype=member.dtype)
    report = {
        **_report(folding, stored, path, dtype=member.dtype),
        "error": relative_error(stored, member.module, folding.bank.backbone.shapes),
        "before": member.entry.provenance,
    }
    return replace(member.entry, path=path, provenance=report)


def _save(module: Module, path: Path, *, base: str, dtype: str) -> Module:
    """Write a module; what is read back."""
    module.save(path, base=base, dtype=MODULE_DTYPES[dtype])
    return Module.read(path, name=module.name)


def _base_of(folder: Path) -> str:
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    return str(config.get("base_model_name_or_path") or "")


def _report(folding: _Folding, module: Module, path: Path, *, dtype: str) -> dict[str, Any]:
    """How a module came about, in the words that a build uses where they are the same; with the
    fold's settings and the digest of the bank that was folded.
    """
    settings = folding.settings
    ranks = [delta.rank for delta in module.deltas.values()]
    stated = {"to": settings.to, "bytes": settings.nbytes}
    measure = {key: value for key, value in stated.items() if value is not None}
    return {
        "method": "fold",
        "folded_by": settings.method,
        "fold": {**measure, "method": settings.method, "bank": folding.bank.digest},
        "dtype": dtype,
        "ranks": [min(ranks, default=0), max(ranks, default=0)],
        "bytes": sum(file.stat().st_size for file in module_files(path)[1:]),
    }
