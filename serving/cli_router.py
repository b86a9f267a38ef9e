"""Commands about routers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .errors import UsageError
from .options import DeviceOption, DtypeOption, JsonOption, console
from .scoring import MetricName
from .settings_file import read_settings

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not
    from collections.abc import Iterable

    from rich.table import Table

    from .assigning import Assignment

router_commands = typer.Typer(
    name="router", help="Fit a bank's router, and measure it.", no_args_is_help=True
)
route_command = typer.Typer()
_PLAIN_WIDTH = 200

BankArgument = Annotated[str, typer.Argument(metavar="BANK", help="Bank folder.")]
NoneOption = Annotated[
    Path | None,
    typer.Option("--none", metavar="FILE", help="JSON lines: prompts that no module serves."),
]


@router_commands.command()
def fit(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Bank folder.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: task, prompt.")],
    out: Annotated[Path, typer.Option(metavar="BANK2", help="Where the new bank goes.")],
    none: NoneOption = None,
    scorer: Annotated[
        Literal["prototype", "mlp", "retriever"], typer.Option(help="What is fitted.")
    ] = "prototype",
    signal: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            # a terminal breaks lines at the spaces
            help="What it reads: layer=3, pooling=last, ngrams=256, window=256, embedding=..., "
            "recency=0.5; default: what the bank's router reads, or a twelfth of the layers.",
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="STEPS", help="Scores to weights, steps joined by |.")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: rules that go before it.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also report.json and pictures.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The new bank's; default: BANK's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that is there.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Write a bank with a router fitted on prompts; backbone and modules stay as they are."""
    _check_files(data, none)
    from ..routers.settings import DEFAULT_POLICY
    from .building import progress_bars
    from .fitting import fit_bank
    from .router_options import FitOptions, parse_signal, read_rules, usual_signal
    from .router_plots import check_folder, plot_router
    from .router_report import fit_tables

    if policy is not None and not policy.strip():
        raise UsageError("--policy is empty: give steps joined by |, or leave it out")
    if report:
        _check_place(report)
    usual = usual_signal(bank / "router")
    options = FitOptions(
        scorer=scorer,
        signal=usual if signal is None else parse_signal(signal, usual),
        policy=policy or DEFAULT_POLICY,
        rules=read_rules(rules) if rules else (),
        with_curve=report is not None,
        name=name,
        force=force,
    )
    with progress_bars(console) as progress:
        made, fitted = fit_bank(
            bank,
            out,
            options,
            data=data,
            none=none,
            device=device or "auto",
            dtype=dtype or "float32",
            progress=progress,
        )
    _show(fit_tables(fitted))
    if report:
        check_folder(report)
        trial = fitted.trial
        pictures = (
            plot_router(trial.report, trial.cases, report, curve=trial.curve) if trial else []
        )
        _write_json(fitted.document(), report / "report.json")
        _say([report / "report.json", *pictures])
    console.print(f"written to {escape(str(out))}: {made.digest}", soft_wrap=True)


@router_commands.command("eval")
def evaluate(
    bank: BankArgument,
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: task, prompt.")],
    none: NoneOption = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also answer, where the answer is known: regret.")
    ] = False,
    metric: Annotated[MetricName, typer.Option(help="How answers are scored.")] = MetricName.EXACT,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")
    ] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Every figure, as JSON.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Also pictures.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure a bank's router on prompts it was not fitted on, through the server's own code."""
    _check_files(data, none)
    from .building import progress_bars
    from .router_evaluation import AnswerOptions, evaluate_router
    from .router_plots import check_folder, plot_router
    from .router_report import evaluation_tables

    if plot:
        _check_place(plot)
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UsageError(f"{json_file} cannot be written: name a file in a folder that exists")
    settings = read_settings(None, {"banks": (bank,), "device": device, "dtype": dtype})
    with progress_bars(console) as progress:
        (opened,) = settings.open_banks()
        evaluation = evaluate_router(
            opened,
            data,
            none=none,
            answers=AnswerOptions(metric, max_tokens) if answers else None,
            placement=settings.placement,
            progress=progress,
        )
    _show(evaluation_tables(evaluation))
    if json_file:
        _write_json(evaluation.document(), json_file)
    if plot:
        check_folder(plot)
        _say(plot_router(evaluation.report, evaluation.cases, plot))


@route_command.command()
def route(
    bank: BankArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What a user would write.")],
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A header of the request, for rules; repeatable."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of its metadata, for rules; repeatable."),
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Show which modules would serve a prompt, and why; the server's own code decides."""
    from .context import Context
    from .hosting import host_banks
    from .router_report import explanation
    from .schemas.completions import ChatRequest, CompletionRequest
    from .service import Service
    from .validation import validate

    _check_text(prompt, *(header or ()), *(metadata or ()))
    context = Context(headers=_labels("--header", header))
    labels = {"metadata": _labels("--metadata", metadata)}
    settings = read_settings(None, {"banks": (bank,), "device": device, "dtype": dtype})
    with console.status("loading the bank"):
        service = Service(host_banks(settings.open_banks(), settings.placement))
    try:
        body: ChatRequest | CompletionRequest
        if service.hosted[0].tokenizer.chat_template:
            message = {"role": "user", "content": prompt}
            body = validate({"messages": [message], **labels}, ChatRequest)
        else:
            body = validate({"prompt": prompt, **labels}, CompletionRequest)
        if as_json:
            _print_json(asyncio.run(service.preview(body, context)))
            return
        (assignment,) = asyncio.run(service.assign(body, context))
        lines = explanation(assignment.decision, _rate(assignment))
    finally:
        service.stop()
    output = Console(highlight=False, emoji=False, soft_wrap=True, markup=False)
    for line in lines:
        output.print(line)


def _rate(assignment: Assignment) -> float | None:
    from ..routers.base import Query
    from .router_report import abstaining_rate

    router = assignment.hosted.router
    return None if router is None else abstaining_rate(router, Query(assignment.prompt.turns))


def _check_text(*given: str) -> None:
    """Refuse bytes of the command line that are no text, which Python keeps as lone surrogates."""
    for text in given:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"{text!a} is not UTF-8: convert it") from error


def _labels(option: str, given: list[str] | None) -> dict[str, str]:
    """What `NAME=VALUE` says, by name."""
    labels: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"{option} {text!r} is not NAME=VALUE")
        if name in labels:
            raise UsageError(f"{option} {name} is given twice: give it once")
        labels[name] = value
    return labels


def _check_files(data: Path, none: Path | None) -> None:
    """Refuse a damaged file of prompts before torch is imported, which takes seconds."""
    from ..routers.data import read_examples

    read_examples(data, needs=("task",))
    if none:
        read_examples(none)


def _check_place(folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything takes long; it is made at the end."""
    place = folder.absolute()
    standing = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not (standing.is_dir() and os.access(standing, os.W_OK)):
        raise UsageError(f"{folder} cannot be made: {standing} is no folder that can be written to")


def _show(parts: Iterable[Table | str]) -> None:
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    output = Console(emoji=False, highlight=False, width=width)
    for part in parts:
        output.print(escape(part) if isinstance(part, str) else part)


def _say(files: Iterable[Path]) -> None:
    for file in files:
        console.print(escape(str(file)), soft_wrap=True)


def _write_json(document: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
