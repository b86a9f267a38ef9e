"""Commands that make, list and revoke API keys."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .access.key_file import add_key, read_keys, revoke_key
from .access.keys import Key, new_token, token_hash
from .errors import UsageError
from .options import JsonOption, console

key_commands = typer.Typer()
_keys = typer.Typer(no_args_is_help=True)
key_commands.add_typer(_keys, name="key", help="API keys of a server: made, listed, revoked.")

FileOption = Annotated[Path, typer.Option("--file", metavar="FILE", help="The file of keys.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]


class ScopeName(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    ADMIN = "admin"


@_keys.command()
def create(
    name: NameArgument,
    file: FileOption,
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(help="What it may do; repeatable. (default: inference)"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What `model` may name; repeatable. (default: all)"),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    expires: Annotated[datetime | None, typer.Option(help="When it ends, in UTC.")] = None,
) -> None:
    """Make a key and print it, once: the file holds its hash alone."""
    token = new_token()
    values = {
        "name": name,
        "hash": token_hash(token.encode()),
        "scopes": [s.value for s in scope or (ScopeName.INFERENCE,)],
        "targets": target or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "expires": expires,
    }
    try:
        key = Key.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            f"{name!r} names no key: use up to 64 of A-Z, a-z, 0-9, '.', '_' and '-'"
        ) from error
    if not key.is_valid(datetime.now(UTC)):
        raise UsageError(f"--expires {expires} (UTC) is over: name a time to come, or leave it out")
    add_key(file, key)
    typer.echo(token)
    console.print(f"{escape(str(file))}: key {escape(name)}; it is shown this once", soft_wrap=True)


@_keys.command("list")
def list_(file: FileOption, as_json: JsonOption = False) -> None:
    """Show the keys of a file: names and rights, never keys."""
    keys = read_keys(file)
    if as_json:
        shown = [key.model_dump(mode="json", exclude={"hash"}) for key in keys]
        Console(soft_wrap=True).print_json(data=shown)
        return
    table = Table("name", "scopes", "targets", "requests/min", "tokens/min", "expires")
    for key in keys:
        table.add_row(*map(escape, _row(key)))
    Console(emoji=False, highlight=False).print(table)


@_keys.command()
def revoke(name: NameArgument, file: FileOption) -> None:
    """Take a key out; a running server refuses it within a second."""
    revoke_key(file, name)
    console.print(f"{escape(str(file))}: key {escape(name)} is revoked", soft_wrap=True)


def _row(key: Key) -> list[str]:
    targets = "all" if key.targets is None else ", ".join(sorted(key.targets)) or "none"
    limits = (key.requests_per_minute, key.tokens_per_minute)
    expires = "never" if key.expires is None else key.expires.isoformat()
    return [
        key.name,
        ", ".join(sorted(key.scopes)),
        targets,
        *(str(limit or "any") for limit in limits),
        expires,
    ]
