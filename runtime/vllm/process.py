"""One server process of ours, behind a keeper: nothing of it outlives the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...adapters.errors import EngineError
from . import keeper

_TAIL_BYTES = 16 << 10
_KEEPER_GRACE_S = 5.0


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    environment: in addition to the gateway's own. log: what it prints is appended there.
    grace_s: how long it may take to end once it is asked to, before it is killed.
    folder: the gateway's own, which goes with it, however it goes.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 15.0
    folder: Path | None = None


class ServerProcess:
    """A server that can be started again and again. One thread at a time may use it."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.starts = 0
        self._keeper: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None

    def start(self) -> None:
        """Start it, where it does not run.

        Raises:
            EngineError: the command cannot be started, or its log cannot be written.
        """
        assert self._keeper is None
        try:
            reading, self._lifeline = os.pipe()
            try:
                self._keeper = self._begin(reading)
            finally:
                os.close(reading)
        except OSError as error:
            self._cut()
            raise EngineError(f"{self.launch.command[0]} cannot be started: {error}") from error
        self.starts += 1

    def _begin(self, lifeline: int) -> subprocess.Popen[bytes]:
        launch = self.launch
        told = (str(lifeline), str(launch.grace_s), str(launch.folder or ""))
        with launch.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, *told, *launch.command],
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lifeline,),
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Of the keeper, and of the group of all processes that came of it."""
        return self._keeper.pid if self._keeper else None

    def poll(self) -> int | None:
        """The exit status, once it has ended; None while it runs or was never started."""
        return self._keeper.poll() if self._keeper else None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._keeper is not None and self._keeper.poll() is None

    def ask_to_end(self) -> None:
        """Ask it to end; `end` waits for it."""
        if self._keeper and self._keeper.poll() is None:
            self._keeper.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """See to it that nothing of it runs."""
        if self._keeper is None:
            return
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(self.launch.grace_s + _KEEPER_GRACE_S)
        self._kill_group()
        self._keeper.wait()
        self._keeper = None
        self._cut()

    def tail(self, lines: int = 12) -> str:
        """The last lines that it printed."""
        with suppress(OSError), self.launch.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
            return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
        return ""

    def _kill_group(self) -> None:
        """What the keeper has not ended, since it was killed itself."""
        assert self._keeper is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._keeper.pid, signal.SIGKILL)

    def _cut(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
