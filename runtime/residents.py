"""What a residency needs of an engine's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from ..adapters.lora import Module
from .footprint import Footprint


class Space(Protocol):
    """The memory that modules may take. setting: what it is changed by, for messages."""

    @property
    def budget(self) -> int | None:
        """In bytes; None: whatever is asked for."""

    @property
    def setting(self) -> str:
        """Which setting states it."""

    def needed(self, footprints: Iterable[Footprint]) -> int:
        """Bytes that modules take together."""

    def fits(self, footprints: Iterable[Footprint]) -> bool:
        """Whether modules can be resident at the same time."""


class Prepared(Protocol):
    """A module that the engine has checked."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def digest(self) -> str:
        """Of its content."""

    @property
    def footprint(self) -> Footprint:
        """What it asks of the memory."""


class Modules(Protocol):
    """The modules of one engine. on_idle: called when a request has ended that ran on modules."""

    on_idle: Callable[[], None]

    @property
    def room(self) -> Space:
        """The memory that modules may take."""

    def prepare(self, module: Module) -> Any:  # noqa: ANN401 - a Prepared that `put` knows
        """Check a module and make it ready to be put in.

        Raises:
            ModuleError: it does not fit the backbone.
        """

    def put(self, prepared: Any, /) -> None:  # noqa: ANN401
        """Make a module resident.

        Raises:
            MergerouteError: it cannot be.
        """

    def drop(self, digest: str) -> Future[None]:
        """Take a module away that no request runs on."""

    def is_used(self, digest: str) -> bool:
        """Whether a request that runs or waits needs the module."""
