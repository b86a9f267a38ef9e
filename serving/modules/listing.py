"""What `GET /v1/modules` tells."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ...adapters.bank import BankModule
from ...adapters.errors import UnknownModuleError
from ..errors import ApiError
from ..hosting import HostedBank
from ..targets import Targets
from .state import ModuleChange, State


def module_entries(targets: Targets, state: State) -> list[dict[str, Any]]:
    """Every module, and every one that could not be brought back after a restart."""
    entries = []
    for host in targets.hosted:
        told = state.of(host)
        for module in host.bank.modules:
            with suppress(UnknownModuleError):  # it is being taken away
                entries.append(_served(targets, host, module, state))
        entries += [
            _missing(host, change, told.generations.get(change.name, 0))
            for change in told.changes
            if change.error is not None and change.name not in host.digests
        ]
    return entries


def module_entry(targets: Targets, state: State, name: str) -> dict[str, Any]:
    """One module's entry, by its name as it may be asked for, or by `bank:module`.

    Raises:
        ApiError: there is none.
    """
    for entry in module_entries(targets, state):
        if name in (entry["id"], f"{entry['bank']}:{entry['name']}"):
            return entry
    raise ApiError(
        f"The lora adapter '{name}' cannot be found.",
        status=404,
        param="name",
        code="lora_adapter_not_found",
    )


def _served(targets: Targets, host: HostedBank, module: BankModule, state: State) -> dict[str, Any]:
    digest = host.digests[module.name]
    told = state.of(host).change(module.name)
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
        "generation": state.generation(host, module.name),
        "hits": info.hits,
        "cold_loads": info.cold_loads,
        "last_used": info.last_used or None,
        "description": module.description,
        "samples": len(module.samples),
        "path": str(module.path),
        "error": info.error or (told.error if told else None),
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
