"""`mergeroute doctor`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .errors import SettingsError, UsageError
from .options import DeviceOption, DtypeOption, JsonOption, console
from .settings import ServeSettings
from .settings_file import read_settings

doctor_command = typer.Typer()
_COLOURS = {"ok": "green", "note": "blue", "warning": "yellow", "error": "bold red"}
_COUNTED = ("error", "warning")


@doctor_command.command()
def doctor(
    banks: Annotated[
        list[str] | None, typer.Argument(metavar="[BANK]...", help="Bank folders.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML (serve.yaml).")] = None,
    port: Annotated[int | None, typer.Option(help="Port that would be listened on.")] = None,
    engine: Annotated[str | None, typer.Option(help="torch or vllm.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    fast: Annotated[bool, typer.Option("--fast", help="Load no backbone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what will work and what will not, before `mergeroute serve` is started.

    Without a bank or settings, only the installation is looked at. Exit status 1 after any error.
    """
    overrides: dict[str, object] = {"banks": tuple(banks or ()), "port": port}
    overrides |= {"device": device, "dtype": dtype, "engine": {"kind": engine} if engine else None}
    findings = []
    with console.status("looking"):
        for finding in _examine(config, overrides, loads=not fast):
            findings.append(finding)
            if not as_json:
                _show(finding)
    counts = Counter(finding["level"] for finding in findings)
    if as_json:
        document = {"ok": not counts["error"], "findings": findings}
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        typer.echo(", ".join(_count(counts[level], level) for level in _COUNTED))
    if counts["error"]:
        raise typer.Exit(1)


def _examine(
    config: Path | None, overrides: Mapping[str, object], *, loads: bool
) -> Iterator[dict[str, str]]:
    from .doctor import examine

    settings: ServeSettings | None = None
    if config or overrides["banks"]:
        try:
            settings = read_settings(config, overrides)
        except UsageError:
            raise
        except SettingsError as error:
            yield {"level": "error", "subject": "settings", "text": str(error)}
    yield from (asdict(finding) for finding in examine(settings, loads=loads))


def _show(finding: dict[str, str]) -> None:
    level = finding["level"]
    output = Console(emoji=False, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    colour, subject = _COLOURS[level], escape(finding["subject"])
    output.print(f"[{colour}]{level:7}[/]  {subject}: {escape(finding['text'])}", soft_wrap=True)


def _count(number: int, level: str) -> str:
    return f"{number} {level}" if number == 1 else f"{number} {level}s"
