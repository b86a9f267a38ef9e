"""What `mergeroute inspect` tells of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..adapters.backbone import Backbone
from ..adapters.bank import Bank
from ..adapters.errors import MergerouteError
from ..adapters.lora import CONFIG_FILE, Coverage, Module
from ..adapters.manifest import MANIFEST


class InspectError(MergerouteError):
    """The folder is nothing that can be told about."""


def describe_path(path: Path) -> dict[str, Any]:
    """A JSON description of a bank, a checkpoint or a LoRA folder.

    Raises:
        MergerouteError: the folder is none of them, or is damaged.
    """
    if (path / MANIFEST).is_file():
        return _describe_bank(Bank.open(path))
    if (path / CONFIG_FILE).is_file():
        return _describe_module(path)
    if (path / "config.json").is_file():
        return _describe_backbone(Backbone.open(path))
    raise InspectError(
        f"{path} holds none of {MANIFEST} (bank), {CONFIG_FILE} (LoRA) and config.json (checkpoint)"
    )


def tables(description: dict[str, Any]) -> Iterator[Table]:
    """The description as tables: single values first, then one table per list."""
    single = Table(title=description["kind"], show_header=False)
    for key, value in description.items():
        if not isinstance(value, list):
            single.add_row(key, escape(_text(value)))
    yield single
    for key, rows in description.items():
        if isinstance(rows, list) and rows:
            yield _rows_table(key, rows)


def _rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row.values()))
    return table


def _describe_bank(bank: Bank) -> dict[str, Any]:
    layers = bank.backbone.layers
    modules = []
    for entry in bank.modules:
        module = bank.load(entry)
        modules.append(
            {
                "name": entry.name,
                "description": entry.description,
                **_coverage(module.coverage(layers)),
                "digest": module.digest,
            }
        )
    return {
        "kind": "bank",
        "name": bank.name,
        "digest": bank.digest,
        "router": bank.router_path is not None,
        **{f"backbone_{key}": value for key, value in _backbone(bank.backbone).items()},
        "modules": modules,
    }


def _describe_backbone(backbone: Backbone) -> dict[str, Any]:
    return {"kind": "checkpoint", **_backbone(backbone)}


def _backbone(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "path": str(backbone.path),
        "digest": backbone.digest,
        "linear_layers": len(backbone.layers),
        "bytes": sum(file.stat().st_size for file in backbone.path.glob("*.safetensors")),
    }


def _describe_module(path: Path) -> dict[str, Any]:
    """A LoRA folder without its backbone: its own shapes are all there is to check against."""
    module = Module.read(path, name=path.resolve().name)
    shapes = {layer: delta.shape for layer, delta in module.deltas.items()}
    rows = [
        {"layer": layer, "shape": f"{o} x {i}", "rank": delta.rank, "effect": delta.norm()}
        for layer, delta in module.deltas.items()
        for o, i in [delta.shape]
    ]
    return {
        "kind": "LoRA",
        "name": module.name,
        **_coverage(module.coverage(shapes)),
        "digest": module.digest,
        "layers": rows,
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {key: value for key, value in asdict(coverage).items() if key != "layers_total"}


def _text(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return " to ".join(map(str, sorted(set(value))))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
