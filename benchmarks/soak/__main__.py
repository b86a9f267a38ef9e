"""Mixed load on a real server for a while: every answer checked, no leak, no stuck slot."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..machine import describe_machine
from .report import figures, tables
from .soaking import Plan, soak


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30,
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask at once.")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures there.")] = None,
) -> None:
    """Soak a server; exit status 1 when anything was wrong."""
    with tempfile.TemporaryDirectory(prefix="mergeroute-soak-") as folder:
        result = soak(Plan(minutes * 60, clients), Path(folder))
    found = {"machine": describe_machine(), **figures(result)}
    console = Console()
    console.print(*tables(found))
    if json_file:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    for violation in found["violations"]:
        console.print(violation, markup=False)
    if result.ledger.violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
