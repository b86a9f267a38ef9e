"""`mergeroute fold`: a bank with fewer modules, or smaller ones, that its router still fits."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..adapters.bank import Bank
from ..adapters.fold import fold
from ..adapters.fold_settings import FoldSettings
from ..adapters.module_files import module_files
from ..routers.store import rename_modules
from .building import progress_bars


def fold_bank(path: Path, out: Path, settings: FoldSettings, *, console: Console) -> Bank:
    """Fold a bank and show how far it is; see `mergeroute.adapters.fold.fold`.

    Raises:
        MergerouteError: it cannot be folded so; nothing is left behind.
    """
    with progress_bars(console) as stage:
        return fold(path, out, settings, rename=rename_modules, progress=stage)


def summary(bank: Bank) -> Table:
    """What came out: a row per module."""
    table = Table(title=f"bank {escape(bank.name)}, {len(bank.modules)} modules")
    for column in ("module", "from", "ranks", "MB", "largest error"):
        table.add_column(column, justify="left" if column in ("module", "from") else "right")
    for module in bank.modules:
        report = module.provenance
        is_folded = report.get("method") == "fold"
        low, high = report.get("ranks", ("", ""))
        size = sum(file.stat().st_size for file in module_files(module.path)[1:])
        table.add_row(
            escape(module.name),
            escape(", ".join(member["name"] for member in report.get("members", ()))),
            str(high) if low == high else f"{low} to {high}",
            f"{size / 1e6:,.2f}",
            f"{report['error']:.3f}" if is_folded else "",
        )
    return table
