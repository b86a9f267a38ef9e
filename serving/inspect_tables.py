"""The tables of `mergeroute inspect`: the same document as the JSON, the long lists condensed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

MOST_COSINES = 12
"""More experts than this make no table of cosines: it would be too wide to read."""

MOST_EXPERTS = 16
"""Of a layer with more, the tables do not tell one by one."""

_SPECIAL = (
    *("kinds", "experts", "modules", "shared", "similarity", "layers", "parameters"),
    "sparse_layers",
)

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], object]]
"""Title to what stands in a row's cell; None leaves it empty."""


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """What was found as tables: single values first, then one table per list."""
    single = Table(title=document["kind"], show_header=False)
    for key, value in document.items():
        if key not in _SPECIAL and value not in (None, {}):
            single.add_row(key.replace("_", " "), escape(_text(value)))
    yield single
    if kinds := document.get("kinds"):
        yield _table("parameters", kinds, _KINDS)
    if experts := document.get("experts"):
        yield _table("experts", experts, _expert_columns(document))
    modules = [*filter(None, (document.get("shared"),)), *document.get("modules", ())]
    if modules:
        yield _table("modules", modules, _MODULES)
    names = document.get("similarity", {}).get("names", ())
    if 2 <= len(names) <= MOST_COSINES:
        yield _cosines(names, document["similarity"]["cosine"])
    if layers := document.get("layers"):
        yield _table("layers", layers, _LORA_LAYERS if "rank" in layers[0] else _LAYERS)
    if sparse := document.get("sparse_layers"):
        yield _table("sparse layers", sparse, _SPARSE_LAYERS)


def _table(title: str, rows: Sequence[Row], columns: Columns) -> Table:
    """A table without the columns that are empty in every row."""
    table = Table(title=title)
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: own for name, own in cells.items() if any(c is not None for c in own)}
    for name, own in cells.items():
        is_text = all(isinstance(cell, str) for cell in own)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*(escape(_text(cell)) for cell in row))
    return table


def _cosines(names: Sequence[str], cosine: Sequence[Sequence[float | None]]) -> Table:
    table = Table(title="cosine between deltas, all linear layers together")
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    for name, row in zip(names, cosine, strict=True):
        table.add_row(escape(name), *("-" if c is None else f"{c:z.2f}" for c in row))
    return table


def _expert_columns(document: dict[str, Any]) -> Columns:
    totals = {
        kind["kind"]: sum(p["kind"] == kind["kind"] for p in document["parameters"])
        for kind in document["kinds"]
    }
    return {
        "expert": lambda row: row["name"],
        "kind": lambda row: row["kind"],
        "ranks": lambda row: _span(row["ranks"]),
        "MB": lambda row: _megabytes(row["bytes"]),
        "changed tensors": lambda row: f"{row['changed']} of {sum(totals.values())}",
        **{f"relative norm, {kind}": _norm_of(kind) for kind in totals},
        "rank for 90 %": lambda row: _number(row["rank_90"], 1),
        "for 99 %": lambda row: _number(row["rank_99"], 1),
        f"energy at rank {document['rank']}": lambda row: _percent(row["kept"]),
    }


def _norm_of(kind: str) -> Callable[[Row], object]:
    return lambda row: row["relative_norm"].get(kind)


_KINDS: Columns = {
    "kind": lambda row: row["kind"],
    "tensors": lambda row: row["tensors"],
    "parameters": lambda row: row["parameters"],
    "MB": lambda row: _megabytes(row["bytes"]),
    "dtype": lambda row: row["dtype"],
}

_MODULES: Columns = {
    "module": lambda row: row["name"],
    "layers": lambda row: row["layers_matched"],
    "also": lambda row: ", ".join(row["outer"]) or None,
    "vectors": lambda row: row["vectors"] or None,
    "ranks": lambda row: _span(row["ranks"]),
    "MB": lambda row: _megabytes(row["bytes"]),
    "% of backbone": lambda row: f"{row['percent_of_backbone']:.1f}",
    "effect": lambda row: row["effect"],
    "method": lambda row: row["provenance"].get("method"),
    "dtype": lambda row: row["provenance"].get("dtype"),
    "error": lambda row: row["provenance"].get("error"),
    "rounding error": lambda row: row["provenance"].get("rounding_error"),
    "compressor error": lambda row: row["provenance"].get("compressor_error"),
    "energy kept": lambda row: _percent(row["energy_kept"]),
}

_LORA_LAYERS: Columns = {
    "layer": lambda row: row["layer"],
    "shape": lambda row: _shape(row["shape"]),
    "rank": lambda row: row["rank"],
    "effect": lambda row: row["effect"],
    "share of energy": lambda row: _percent(row["share"]),
    "rank for 90 %": lambda row: row["rank_90"],
    "for 99 %": lambda row: row["rank_99"],
}

_LAYERS: Columns = {
    "layer": lambda row: row["layer"],
    "shape": lambda row: _shape(row["shape"]),
    "changed by": lambda row: len(row["energy"]),
    "rank for 90 %": lambda row: _spread([e["rank_90"] for e in row["energy"].values()]),
    "for 99 %": lambda row: _spread([e["rank_99"] for e in row["energy"].values()]),
    "energy at the recipe's rank": lambda row: _kept(row["energy"].values()),
    "mean cosine": lambda row: _mean_cosine(row["cosine"]),
}


_SPARSE_LAYERS: Columns = {
    "layer": lambda row: row["layer"],
    "experts": lambda row: row["experts"],
    "groups": lambda row: _groups(row["groups"]),
    "unused": lambda row: " ".join(map(str, row["unused"])) or None,
    "error of centres": lambda row: _errors(row["centre_errors"]),
    "error of experts": lambda row: _errors(row["errors"]),
    "router KL": lambda row: _number(row["router_kl"], 4),
    "router agreement": lambda row: _percent(row["router_agreement"]),
}


def _groups(groups: Sequence[int]) -> str | None:
    """Each expert's group; of many experts, which would be too wide to read, nothing."""
    if len(groups) > MOST_EXPERTS:
        return None
    return " ".join("-" if group < 0 else str(group) for group in groups)


def _errors(errors: Sequence[float]) -> str:
    """Each expert's; of many, the extremes."""
    if len(errors) > MOST_EXPERTS:
        return f"{min(errors):.3f} to {max(errors):.3f}"
    return " ".join(f"{error:.3f}" for error in errors)


def _kept(spectra: Iterable[Row]) -> str | None:
    kept = [found["kept"] for found in spectra if "kept" in found]
    return _percent(sum(kept) / len(kept)) if kept else None


def _mean_cosine(cosine: Sequence[Sequence[float | None]]) -> str | None:
    """Over all pairs of two that change the layer."""
    pairs = [c for k, row in enumerate(cosine) for c in row[:k] if c is not None]
    return f"{sum(pairs) / len(pairs):z.2f}" if pairs else None


def _spread(ranks: Sequence[int]) -> str | None:
    """The median with the extremes."""
    if not ranks:
        return None
    middle = f"{median(ranks):g}"
    return middle if min(ranks) == max(ranks) else f"{middle} ({min(ranks)} to {max(ranks)})"


def _span(ranks: Sequence[int] | None) -> str | None:
    return None if ranks is None else " to ".join(map(str, sorted(set(ranks))))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return _span(value) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
