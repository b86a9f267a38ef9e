"""What `GET /v1/modules` tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ...adapters.bank import BankModule
from ...adapters.errors import UnknownModuleError
from ..errors import ApiError
from ..hosted import HostedBank
from ..targets import Targets
from .state import ModuleChange, State


def module_entries(targets: Targets, state: State) -> list[dict[str, Any]]:
    """Every module, and every one that could not be brought back after a restart."""
    return [entry for host in targets.hosted for entry in _entries(targets, host, state)]


def module_entry(targets: Targets, state: State, name: str) -> dict[str, Any]:
    """One module's entry, by its name as it may be asked for, or by `bank:module`.

    Raises:
        ApiError: there is none.
    """
    bank, _, bare = name.rpartition(":")
    for host in targets.hosted:
        if bank in ("", host.bank.name):
            for entry in _entries(targets, host, state, only=bare):
                if name in (entry["id"], f"{entry['bank']}:{entry['name']}"):
                    return entry
    raise ApiError(
        f"The lora adapter '{name}' cannot be found.",
        status=404,
        param="name",
        code="lora_adapter_not_found",
    )


def _entries(
    targets: Targets, host: HostedBank, state: State, *, only: str | None = None
) -> Iterator[dict[str, Any]]:
    """Of a bank's modules, or of one name alone."""
    changes = {c.name: c for c in state.of(host).changes if only in (None, c.name)}
    generations = state.generations(host)
    for module in host.bank.modules:
        if only in (None, module.name):
            with suppress(UnknownModuleError):  # it is being taken away
                change, generation = changes.get(module.name), generations[module.name]
                yield _served(targets, host, module, change, generation)
    for name, change in changes.items():
        if change.error is not None and name not in host.digests:
            yield _missing(host, change, generations[name])


def _served(
    targets: Targets,
    host: HostedBank,
    module: BankModule,
    change: ModuleChange | None,
    generation: int,
) -> dict[str, Any]:
    digest = host.digests[module.name]
    info = host.residency.info(digest)
    return {
        "id": targets.full_name(module.name, host),
        "object": "module",
        "name": module.name,
        "bank": host.bank.name,
        "state": info.state,
        "resident": info.is_resident,
        "pinned": info.is_pinned,
        "rank": info.rank,
        "bytes": info.bytes,
        "digest": digest,
        "generation": generation,
        "hits": info.hits,
        "cold_loads": info.cold_loads,
        "last_used": info.last_used or None,
        "description": module.description,
        "samples": len(module.samples),
        "path": str(module.path),
        "error": info.error or (change.error if change else None),
    }


def _missing(host: HostedBank, change: ModuleChange, generation: int) -> dict[str, Any]:
    return {
        "id": f"{host.bank.name}:{change.name}",
        "object": "module",
        "name": change.name,
        "bank": host.bank.name,
        "state": "failed",
        "resident": False,
        "pinned": change.pinned,
        "rank": None,
        "bytes": None,
        "digest": change.digest,
        "generation": generation,
        "hits": 0,
        "cold_loads": 0,
        "last_used": None,
        "description": change.description,
        "samples": len(change.samples),
        "path": change.path,
        "error": change.error,
    }
