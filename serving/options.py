"""What the commands share: the terminal and the options that several of them take."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console(stderr=True, highlight=False, emoji=False)
"""Standard error: progress, messages. What a command is asked for goes to standard output."""

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
]
