"""The command line."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from ..adapters.errors import MergerouteError
from .cli_banks import bank_commands
from .cli_doctor import doctor_command
from .cli_experiments import experiment_commands
from .cli_keys import key_commands
from .cli_router import route_command, router_commands
from .cli_smoe import smoe_commands
from .errors import UsageError
from .options import DeviceOption, DtypeOption, JsonOption, console
from .settings import DEFAULT_PORT, ServeSettings
from .settings_file import read_settings

app = typer.Typer(
    name="mergeroute",
    help="Serve one shared backbone and many task modules, blended for every input by a router.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bank_commands)
app.add_typer(key_commands)
app.add_typer(doctor_command)
app.add_typer(route_command)
app.add_typer(router_commands)
app.add_typer(smoe_commands)
app.add_typer(experiment_commands)

OPEN_TO_ALL = (
    "anybody who reaches %s may use the models, since no API keys are set: start with --api-keys "
    "FILE, or listen on 127.0.0.1. Routes that administer are refused meanwhile."
)
_ADHOC = "A bank made on the spot"
_ENGINE = "Engine vllm"
_LIMITS = "Limits"
_RUN_TIME = "Modules and experiments at run time"
_TOLD = "Access, log and metrics"
DEMO_BANK = Path(__file__).parent / "demo_bank"


class EngineName(StrEnum):
    """What runs the model."""

    TORCH = "torch"
    VLLM = "vllm"


class LogFormat(StrEnum):
    """Form of the log lines."""

    TEXT = "text"
    JSON = "json"


class Compatible(StrEnum):
    """Servers whose metrics' names are known."""

    VLLM = "vllm"


HostOption = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
PortOption = Annotated[int | None, typer.Option("--port", help="Port; 0 takes a free one.")]


def main() -> None:
    """Run a command; our own errors become one line on standard error and exit status 1."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except MergerouteError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _stop(number: int, _frame: object) -> None:
    """Leave as Ctrl+C does, so that what was begun is cleared away."""
    sys.exit(128 + number)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("mergeroute"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(host: HostOption = None, port: PortOption = None) -> None:
    """Serve the bundled demo bank."""
    _serve(read_settings(None, {"banks": (str(DEMO_BANK),), "host": host, "port": port}))


@app.command()
def serve(
    banks: Annotated[
        list[str] | None, typer.Argument(metavar="[BANK]...", help="Bank folders.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML (serve.yaml).")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or hub id, served as one more bank.", rich_help_panel=_ADHOC
        ),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="A LoRA folder; repeatable.", rich_help_panel=_ADHOC
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the bank made of --backbone and --module.", rich_help_panel=_ADHOC
        ),
    ] = None,
    host: HostOption = None,
    port: PortOption = None,
    engine: Annotated[EngineName | None, typer.Option(help="What runs the model.")] = None,
    vllm_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of vllm serve, as tensor_parallel_size=2; repeatable.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="vLLM servers to start. (default: 1)", rich_help_panel=_ENGINE
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Most tokens of prompt and completion.", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most requests that run at once.", rich_help_panel=_LIMITS),
    ] = None,
    module_root: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Folder that modules may be loaded from; repeatable. (default: .)",
            rich_help_panel=_RUN_TIME,
        ),
    ] = None,
    module_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory of modules, as 2GB; the others are read when asked for. "
            "(default: all stay in memory)",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder that loads are kept in for a restart, or none. "
            "(default: ~/.local/state/mergeroute/PORT)",
            rich_help_panel=_RUN_TIME,
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database of experiments, as SQLAlchemy writes it. (default: SQLite in --state)",
            rich_help_panel=_RUN_TIME,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys; see: mergeroute key. (default: none needed)",
            rich_help_panel=_TOLD,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="Form of the log lines.", rich_help_panel=_TOLD)
    ] = None,
    metrics_compat: Annotated[
        Compatible | None,
        typer.Option(help="Whose metrics to show beside ours.", rich_help_panel=_TOLD),
    ] = None,
    otel: Annotated[
        bool | None,
        typer.Option(
            "--otel", help="Send OpenTelemetry traces, as OTEL_* says.", rich_help_panel=_TOLD
        ),
    ] = None,
) -> None:
    """Serve banks, or a backbone with LoRA modules, behind the OpenAI API."""
    overrides = {
        "banks": tuple(banks or ()),
        "backbone": backbone,
        "modules": _modules(module or ()),
        "name": name,
        "host": host,
        "port": port,
        "engine": _engine(engine, vllm_option or (), replicas),
        "device": device,
        "dtype": dtype,
        "max_length": max_length,
        "max_concurrency": max_concurrency,
        "module_roots": tuple(module_root or ()),
        "module_memory": module_memory,
        "state": state,
        "database": database,
        "api_keys": None if api_keys is None else str(api_keys),
        "log_format": log_format,
        "metrics_compat": metrics_compat,
        "otel": otel,
    }
    _serve(read_settings(config, overrides))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Recipe, bank, checkpoint or LoRA folder.")
    ],
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also pictures: energy by rank, likeness of experts."),
    ] = None,
) -> None:
    """Show what is in a recipe's sources, a bank, a checkpoint or a PEFT LoRA folder.

    Nothing is built; a bank is verified.
    """
    from . import inspect_plots
    from .building import progress_bars
    from .inspect_tables import tables
    from .inspection import inspect_path

    if plot:
        inspect_plots.check_folder(plot)
    with progress_bars(console) as progress:
        found = inspect_path(path, progress=progress)
    for picture in inspect_plots.plot(found, plot) if plot else ():
        _say(str(picture))
    if as_json:
        _print_json(found.document)
        return
    output = Console(emoji=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    for table in tables(found.document):
        output.print(table)


def _serve(settings: ServeSettings) -> None:
    from .access.guard import is_loopback
    from .experiments.declared import declare
    from .hosting import host_banks
    from .server import bind, configure_logging, run
    from .service import Service

    configure_logging(settings.log_format)
    options = settings.service_options
    telemetry = settings.telemetry
    listening = bind(settings.host, settings.port)
    folder = experiments = None
    try:
        folder = settings.state_folder(listening.getsockname()[1])
        experiments = settings.open_experiments(folder)
        policy = settings.policy(is_exposed=not is_loopback(listening.getsockname()[0]))
        with console.status("loading") as status:
            banks = settings.open_banks(report=status.update)
            say = _say if settings.log_format == "text" else logging.getLogger("mergeroute").info
            hosted = host_banks(banks, settings.placement, report=say)
            service = Service(hosted, options, folder, experiments)
            if experiments and settings.experiments:
                declare(experiments, settings.experiments, service.targets)
    except BaseException:
        listening.close()
        if experiments:
            experiments.close()
        if folder:
            folder.close()
        raise
    host, port = listening.getsockname()[:2]
    say("models: " + ", ".join(entry["id"] for entry in service.targets.listing()))
    if policy.is_exposed and policy.keys is None:
        logging.getLogger("mergeroute").warning(OPEN_TO_ALL, host)
    say(f"ready: http://{host}:{port}/v1  (Ctrl+C stops)")
    run(service, listening, policy, telemetry)


def _say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _engine(
    kind: EngineName | None, options: Sequence[str], replicas: int | None
) -> dict[str, object]:
    """What the command line says of the engine."""
    named = {"kind": kind.value} if kind else {"kind": "vllm"} if options or replicas else {}
    started = {"replicas": replicas} if replicas is not None else {}
    values = {name: yaml.safe_load(value) for name, value in map(_name_and_value, options)}
    return {**named, **started, **({"options": values} if values else {})}


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--vllm-option")
    return name, value if equals else "true"


def _modules(texts: Sequence[str]) -> dict[str, str]:
    modules: dict[str, str] = {}
    for name, path in map(_name_and_path, texts):
        if name in modules:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--module")
        modules[name] = path
    return modules


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise typer.BadParameter(f"{text!r} is not NAME=PATH", param_hint="--module")
    return name, path


__all__ = ["DEFAULT_PORT", "DEMO_BANK", "app", "main"]
