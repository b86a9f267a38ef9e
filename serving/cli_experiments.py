"""Commands for the experiments of a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .errors import SettingsError, UsageError
from .options import JsonOption, console

if TYPE_CHECKING:
    from .experiment_client import ExperimentServer

experiment_commands = typer.Typer()
_experiments = typer.Typer(no_args_is_help=True)
experiment_commands.add_typer(
    _experiments, name="experiment", help="Compare targets on a server's live traffic."
)

_POINTS = 60
_MAX_BYTES = 2**20

UrlOption = Annotated[str, typer.Option(metavar="URL", help="The server.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file", metavar="FILE", help="API key. (default: that in MERGEROUTE_API_KEY, if any)"
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the experiment.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Kept with the change.")]
_HERE = "http://127.0.0.1:8000"


@_experiments.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment, YAML or JSON.")],
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a draft, which `start` starts."""
    document = _read(file)
    _tell(_server(url, key_file).create(document), as_json)


@_experiments.command("list")
def list_(
    url: UrlOption = _HERE, key_file: KeyFileOption = None, as_json: JsonOption = False
) -> None:
    """Show all experiments."""
    from .experiment_tables import list_table

    document = _server(url, key_file).all()
    _print_json(document) if as_json else _output().print(list_table(document))


@_experiments.command()
def show(
    name: NameArgument,
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an experiment: its state, its variants and their weights."""
    _tell(_server(url, key_file).show(name), as_json)


@_experiments.command()
def start(
    name: NameArgument,
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a draft begin, or a paused one go on."""
    _tell(_server(url, key_file).change(name, "start", reason=reason), as_json)


@_experiments.command()
def ramp(
    name: NameArgument,
    weights: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VARIANT=WEIGHT]...", help="Of all variants; they sum to 1."),
    ] = None,
    traffic: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of those who could take part.")
    ] = None,
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change weights or traffic; no more users change their variant than must."""
    body: dict[str, object] = {"reason": reason}
    if weights:
        body["weights"] = _weights(weights)
    if traffic is not None:
        body["traffic"] = traffic
    _tell(_server(url, key_file).ramp(name, body), as_json)


@_experiments.command()
def pause(
    name: NameArgument,
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the control answer alone, and count nothing, until `start`."""
    _tell(_server(url, key_file).change(name, "pause", reason=reason), as_json)


@_experiments.command()
def conclude(
    name: NameArgument,
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an experiment for good, and promote nothing."""
    _tell(_server(url, key_file).change(name, "conclude", reason=reason), as_json)


@_experiments.command()
def promote(
    name: NameArgument,
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="Whose target is promoted.")],
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an experiment, and let a variant's target answer `auto`."""
    server = _server(url, key_file)
    _tell(server.change(name, "promote", variant=variant, reason=reason), as_json)


@_experiments.command()
def rollback(
    name: NameArgument,
    reason: ReasonOption = "",
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let what answered `auto` before the promotion do so again."""
    _tell(_server(url, key_file).change(name, "rollback", reason=reason), as_json)


@_experiments.command()
def delete(
    name: NameArgument,
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
) -> None:
    """Take a draft, or a concluded experiment, away; what was recorded stays in the database."""
    _server(url, key_file).delete(name)
    console.print(f"{escape(name)} is deleted", soft_wrap=True)


@_experiments.command()
def report(
    name: NameArgument,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also a page, with plots of the effects over time."),
    ] = None,
    version_from: Annotated[
        int | None,
        typer.Option(min=1, metavar="VERSION", help="Count from there, not from the last ramp."),
    ] = None,
    url: UrlOption = _HERE,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is known so far: the verdict, and every metric in every variant."""
    from .experiment_report import check_page, read_results, write_page
    from .experiment_tables import result_tables

    if html:
        check_page(html)
    server = _server(url, key_file)
    document = server.results(name, points=_POINTS if html else 0, version_from=version_from)
    results = read_results(document)
    if html:
        write_page(html, results, server.versions(name))
        console.print(f"written to {escape(str(html))}", soft_wrap=True)
    if as_json:
        _print_json(document)
        return
    output = _output()
    for part in result_tables(results):
        output.print(part)


def _server(url: str, key_file: Path | None) -> ExperimentServer:
    from .experiment_client import ExperimentServer, read_key

    return ExperimentServer(url, read_key(key_file))


def _tell(document: dict[str, Any], as_json: bool) -> None:
    """An experiment, as the server told of it."""
    from .experiment_tables import experiment_tables

    if as_json:
        _print_json(document)
        return
    output = _output()
    for part in experiment_tables(document):
        output.print(part)


def _output() -> Console:
    width = None if sys.stdout.isatty() else 200
    return Console(emoji=False, highlight=False, width=width, soft_wrap=False)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _weights(texts: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in texts:
        variant, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not (variant and equals):
            raise UsageError(f"{text!r} is not VARIANT=WEIGHT: write routed=0.5")
        if variant in weights:
            raise UsageError(f"{variant!r} is given twice: keep one")
        weights[variant] = weight
    return weights


def _read(path: Path) -> dict[str, object]:
    """What a file says of an experiment; the server judges it.

    Raises:
        SettingsError: it cannot be read, or holds no mapping.
    """
    import yaml

    from ..adapters.unique_yaml import load_yaml

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise SettingsError(f"{path} holds more than {_MAX_BYTES:,} letters: no experiment")
        values = load_yaml(text)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no experiment: see examples/experiment.yaml")
    return {str(key): value for key, value in values.items()}
