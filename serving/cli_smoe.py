"""Commands for sparse mixtures of experts: made from dense experts, and trained after a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .options import DeviceOption, console

smoe_commands = typer.Typer()
_smoe = typer.Typer(no_args_is_help=True)
smoe_commands.add_typer(
    _smoe, name="smoe", help="Make sparse mixtures of experts, and recover merged ones."
)

ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@_smoe.command()
def upcycle(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Dense experts of one base.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint goes.")],
    top_k: Annotated[
        int, typer.Option(min=1, metavar="K", help="Experts that a token is sent to.")
    ] = 2,
    device: DeviceOption = None,
    force: ForceOption = False,
) -> None:
    """Make a Mixtral of which each expert is the feed-forward part of one of a recipe's."""
    from ..adapters.recipe_file import read_recipe
    from .upcycling import upcycle_recipe

    upcycle_recipe(
        read_recipe(recipe),
        out,
        top_k=top_k,
        force=force,
        device=device or "auto",
        console=console,
    )
    console.print(f"written to {escape(str(out))}", soft_wrap=True)


@_smoe.command()
def recover(
    path: Annotated[
        Path, typer.Argument(metavar="BANK_OR_DIR", help="Bank or checkpoint with merged experts.")
    ],
    teacher: Annotated[
        str, typer.Option(metavar="PATH", help="The model it was made from: folder or hub id.")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: prompt, answer.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the result goes.")],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 200,
    rate: Annotated[
        float, typer.Option("--learning-rate", min=0, metavar="RATE", help="The peak.")
    ] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of a step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of prompts.")] = 0,
    device: DeviceOption = None,
    force: ForceOption = False,
) -> None:
    """Train merged experts and routers for a short while to answer as the original does."""
    from ..runtime.distillation import DistillationSettings
    from .recovery import recover_model, told

    settings = DistillationSettings(
        steps=steps, learning_rate=rate, batch_size=batch_size, seed=seed
    )
    found = recover_model(
        path,
        out,
        settings,
        teacher=teacher,
        data=data,
        device=device or "auto",
        force=force,
        console=console,
    )
    console.print(told(found), soft_wrap=True)
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
