"""Rerouting: a bank with another router, from a bank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .bank import Bank, new_bank, seal
from .errors import BankError
from .fold import copy_backbone
from .manifest import check_names, read_manifest


def with_router(
    path: str | Path,
    out: str | Path,
    *,
    write_router: Callable[[Bank, Path], None],
    name: str | None = None,
    force: bool = False,
) -> Bank:
    """Write a bank that is another one but for its router. Backbone, modules, shared module and
    sources are carried over byte for byte; so is the recipe, but for its section on the router,
    which is no longer true.

    write_router: given the bank, writes the router's files into a folder. name: of the new bank;
    None keeps it. force: replace the bank that stands at `out`.

    Raises:
        BankError: `out` is taken, is the bank itself or lies in it; nothing is left behind.
        MergerouteError: the bank cannot be read, or the router not be written.
    """
    source = Path(path).expanduser().resolve()
    check_apart(source, out)
    bank = Bank.open(source)
    manifest = read_manifest(source)
    with new_bank(out, force=force) as folder:
        name = name or bank.name
        check_names([name, *(module.name for module in bank.modules)])
        (folder / "router").mkdir()
        write_router(bank, folder / "router")
        modules = []
        for module in bank.modules:
            target = folder / "modules" / module.name
            shutil.copytree(module.path, target)
            modules.append(replace(module, path=target))
        if bank.shared is not None:
            shutil.copytree(bank.shared.path, folder / "shared")
        recipe = manifest.recipe
        seal(
            folder,
            name=name,
            backbone=copy_backbone(source, manifest, bank, folder),
            modules=modules,
            recipe=recipe and {key: recipe[key] for key in recipe if key != "router"},
            sources=manifest.sources,
        )
    return Bank.open(out, verify=False)


def check_apart(path: str | Path, out: str | Path) -> None:
    """Refuse to write a bank into the one that it is made from.

    Raises:
        BankError: `out` is the bank, or lies in it.
    """
    source, target = (Path(p).expanduser().resolve() for p in (path, out))
    if target.is_relative_to(source):
        raise BankError(
            f"{out} is the bank itself, or lies in it: choose another folder; banks do not change"
        )
