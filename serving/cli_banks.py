"""Commands that make and measure banks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .errors import UsageError
from .options import DeviceOption, DtypeOption, console
from .scoring import MetricName
from .settings_file import read_settings

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not
    from .figures import Report

bank_commands = typer.Typer()
_PLAIN_WIDTH = 200


@bank_commands.command()
def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML, ours or mergekit's.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the bank goes.")],
    device: DeviceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that is there.")] = False,
) -> None:
    """Merge experts of one base into a backbone, and compress what is exclusive to each."""
    from ..adapters.recipe_file import read_any_recipe
    from .building import build_bank, summary

    bank = build_bank(
        read_any_recipe(recipe), out, force=force, device=device or "auto", console=console
    )
    Console(emoji=False).print(summary(bank))
    console.print(f"written to {escape(str(out))}", soft_wrap=True)


@bank_commands.command()
def export(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Bank folder.")],
    module: Annotated[str, typer.Option(metavar="NAME", help="Which module.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    dtype: DtypeOption = None,
) -> None:
    """Write a module as a plain PEFT LoRA folder, whatever form the bank stores it in."""
    from .exporting import export_module

    export_module(bank, module, out, dtype=dtype or "bfloat16")
    console.print(f"{escape(str(out))}: module {escape(module)} as a PEFT LoRA folder")


@bank_commands.command()
def fold(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Bank folder.")],
    out: Annotated[Path, typer.Option(metavar="BANK2", help="Where the new bank goes.")],
    to: Annotated[
        int | None, typer.Option(metavar="N", help="Merge modules that are alike: N are left.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="SIZE",
            help="Make modules, with --to those left, smaller: 2MB in all.",
        ),
    ] = None,
    usage: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --to: what was used most is kept best. JSON, or what /metrics gave.",
        ),
    ] = None,
    method: Annotated[
        Literal["svd", "lego"], typer.Option(help="How deltas are merged or shrunk.")
    ] = "svd",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The new bank's; default: BANK's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that is there.")] = False,
) -> None:
    """Make a bank with fewer modules, or smaller ones; its router keeps working."""
    from ..adapters.bank import Bank
    from ..adapters.fold_settings import FoldSettings
    from .folding import fold_bank, summary
    from .usage import read_usage

    if to is None and size is None:
        raise UsageError("give --to, a number of modules, --bytes, a size for all, or both")
    settings = FoldSettings(
        to=to,
        nbytes=None if size is None else _size(size),
        usage=None if usage is None else read_usage(usage, Bank.open(bank, verify=False)),
        method=method,
        name=name,
        force=force,
    )
    folded = fold_bank(bank, out, settings, console=console)
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(emoji=False, width=width).print(summary(folded))


def _size(text: str) -> int:
    from ..adapters.recipe import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--bytes: {error}") from error


@bank_commands.command("eval")
def evaluate(
    bank: Annotated[str, typer.Argument(metavar="BANK", help="Bank folder.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: task, prompt, answer.")],
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also with each task's module pinned.")
    ] = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="Also the experts it was built from; normalises.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help="Also this static merge of the experts; repeatable."),
    ] = None,
    metric: Annotated[MetricName, typer.Option(help="How answers are scored.")] = MetricName.EXACT,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")
    ] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most prompts of a task.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Every figure, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture: .png, .svg or .pdf.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Score a bank on held-out prompts: router, pinned modules, backbone, experts, merges."""

    from .building import progress_bars
    from .eval_plot import check_plot, plot_report
    from .evaluation import EvalOptions
    from .evaluation import evaluate as measure

    if plot:
        check_plot(plot)
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UsageError(f"{json_file} cannot be written: name a file in a folder that exists")
    options = EvalOptions(
        metric=metric,
        max_tokens=max_tokens,
        oracle=oracle,
        experts=experts,
        compare=tuple(compare or ()),
        limit=limit,
    )
    settings = read_settings(None, {"banks": (bank,), "device": device, "dtype": dtype})
    with progress_bars(console) as progress:
        verified = progress("verifying the bank", 1)
        (opened,) = settings.open_banks()
        verified()
        report = measure(opened, data, options, placement=settings.placement, progress=progress)
    _show(report)
    if json_file:
        document = json.dumps(report.document(), ensure_ascii=False, indent=2)
        json_file.write_text(document + "\n", encoding="utf-8")
    if plot:
        plot_report(report, plot)


def _show(report: Report) -> None:
    is_terminal = sys.stdout.isatty()
    output = Console(emoji=False, highlight=False, width=None if is_terminal else _PLAIN_WIDTH)
    for table in report.tables():
        output.print(table)
    for note in report.notes:
        output.print(f"note: {note}", markup=False)
