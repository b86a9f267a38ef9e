"""The modules that are served now, and their changes: one at a time, kept before it is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..access.checks import check_load
from ..hosted import HostedBank
from ..targets import Targets
from . import changes
from .changes import Change
from .listing import module_entries, module_entry
from .restoring import restore
from .schemas import LoadModuleRequest, UnloadModuleRequest
from .sources import Sources
from .state import State, StateFolder
from .uploads import remove_unused

_Result = TypeVar("_Result")


class LiveModules:
    """The modules that can be asked for now.

    targets: what they, and their banks, are asked for by. They are replaced as a whole when modules
    come or go; a request is assigned within those that it finds. sources: where modules may come
    from. folder: where loads and unloads are kept, so that they outlive the process; closed by
    `close`.
    """

    def __init__(
        self, hosted: Sequence[HostedBank], sources: Sources, folder: StateFolder | None = None
    ) -> None:
        self.targets = Targets(hosted)
        self.sources = sources
        self._folder = folder
        self._state = State()
        if folder:
            self.targets, self._state = restore(self.targets, folder.read(), self.sources)
            remove_unused(folder.uploads, self._state)
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="mergeroute-changes")
        self._downloads = ThreadPoolExecutor(2, thread_name_prefix="mergeroute-downloads")

    async def load(self, body: LoadModuleRequest) -> Change:
        """Load a module while requests run; what it comes to has been done and kept.

        Raises:
            MergerouteError: it cannot be loaded; nothing has changed.
        """
        check_load(body, self.sources.limits)
        if await asyncio.to_thread(self.sources.is_on_hub, body.lora_path):
            await self._run(self._downloads, lambda: self.sources.download(body.lora_path))
        return await self._change(lambda t, state: changes.load(t, state, body, self.sources))

    async def unload(self, body: UnloadModuleRequest) -> Change:
        """Take a module away; requests that run on it keep it.

        Raises:
            MergerouteError: it cannot be unloaded; nothing has changed.
        """
        return await self._change(lambda targets, state: changes.unload(targets, state, body))

    def entries(self) -> list[dict[str, Any]]:
        """What is known of every module."""
        return module_entries(self.targets, self._state)

    def entry(self, name: str) -> dict[str, Any]:
        """What is known of one module.

        Raises:
            ApiError: there is none.
        """
        return module_entry(self.targets, self._state, name)

    def close(self) -> None:
        """Let go of the folder."""
        if self._folder:
            self._folder.close()

    async def _change(self, make: Callable[[Targets, State], Change]) -> Change:
        """One change at a time, on a thread of their own: many that wait take none from routing.
        Who reads the targets sees all of a change, or nothing; it is kept before it is seen.
        """

        def run() -> Change:
            change = make(self.targets, self._state)
            try:
                if self._folder:
                    self._folder.write(change.state)
            except BaseException:
                _unregister(change.added)
                raise
            self._state = change.state
            self.targets = change.targets
            _unregister(change.retired)
            return change

        return await self._run(self._changes, run)

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _unregister(loaded: tuple[HostedBank, str] | None) -> None:
    if loaded:
        host, name = loaded
        host.release(name)
