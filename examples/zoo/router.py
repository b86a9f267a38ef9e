"""Fit the bundled bank's router again: ``python -m examples.zoo.router``.

Backbone and modules stay as they are, byte for byte; nothing is trained.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mergeroute.adapters.bank import Bank
from mergeroute.serving.building import progress_bars
from mergeroute.serving.cli import DEMO_BANK
from mergeroute.serving.fitting import fit_bank
from mergeroute.serving.router_report import fit_tables

from .bank import OPTIONS
from .data import write_router_data
from .tasks import load_tasks


def main() -> None:
    """Fit, replace, and say what was measured."""
    console = Console()
    with tempfile.TemporaryDirectory(dir=DEMO_BANK.parent, prefix=".demo.") as name:
        folder = Path(name)
        write_router_data(load_tasks(), folder)
        with progress_bars(console) as progress:
            _, router = fit_bank(
                DEMO_BANK,
                folder / "bank",
                replace(OPTIONS, with_curve=True),
                data=folder / "router.jsonl",
                none=folder / "none.jsonl",
                device="cpu",
                progress=progress,
            )
        shutil.rmtree(DEMO_BANK)
        (folder / "bank").rename(DEMO_BANK)
    for table in fit_tables(router):
        console.print(table)
    console.print(f"{DEMO_BANK}: {Bank.open(DEMO_BANK).digest}", soft_wrap=True)


if __name__ == "__main__":
    main()
