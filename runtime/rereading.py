"""Reading a registered module's files again."""

from __future__ import annotations

from ..adapters.digest import short
from ..adapters.errors import MergerouteError, ModuleError
from ..adapters.lora import Module
from .resident_set import Entry


def read_again(entry: Entry) -> Module:
    """The module as it was registered, from the newest source that has it.

    Raises:
        ModuleError: none has.
    """
    problem: Exception | None = None
    for source in reversed(entry.sources):
        try:
            module = source()
        except (MergerouteError, OSError) as error:
            problem = problem or error
            continue
        if module.digest == entry.digest:
            return module
        problem = problem or ModuleError(
            f"its files changed since it was registered: they hold {short(module.digest)} now"
        )
    raise ModuleError(str(problem)) from problem


def unreadable(entry: Entry) -> str:
    """What a request is told that asks for a module that cannot be read."""
    return (
        f"module {entry.name!r} ({short(entry.digest)}) cannot be read any more: the server's log "
        "says why"
    )
