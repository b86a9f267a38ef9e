"""A program of its own, between the gateway and a server that it starts: whatever ends the gateway,
nothing of the server stays behind. Standard library alone, so that it is there at once.

    python keeper.py LIFELINE GRACE_S FOLDER COMMAND...

LIFELINE: a pipe's file descriptor, whose other end the gateway holds. It ends with the gateway.
FOLDER: the gateway's own, which is removed where the gateway cannot any more; empty: none.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

_SET_DEATH_SIGNAL = 1
_SET_SUBREAPER = 36
_TICK_S = 0.05


def main(lifeline: int, grace_s: float, folder: str, command: list[str]) -> int:
    """Run a command until it ends, the lifeline breaks or SIGTERM comes; returns its exit status.
    Then all that it started is ended too, whoever its parent has become.
    """
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _control(_SET_SUBREAPER, 1)
    server = subprocess.Popen(command, preexec_fn=_die_with_parent, pass_fds=())
    is_orphan = False
    while server.poll() is None and not asked:
        ready, _, _ = select.select([lifeline, wake], [], [])
        with suppress(BlockingIOError):
            os.read(wake, 4096)
        if lifeline in ready:
            is_orphan = True
            break
    if server.poll() is None:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    _end_all(server)
    if is_orphan and folder:
        shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _end_all(server: subprocess.Popen[bytes]) -> None:
    """Kill what is left, generation by generation: orphans become children of this process."""
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if server.poll() is None:
            server.wait()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(_TICK_S)
            continue
        return


def _children() -> Iterator[int]:
    """Process ids whose parent is this process.

    Source: proc(5), /proc/PID/stat: the fourth field, after a name in parentheses.
    """
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not entry.isdigit():
            continue
        with suppress(OSError, ValueError), open(f"/proc/{entry}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            if int(fields[1]) == os.getpid():
                yield int(entry)


def _die_with_parent() -> None:
    """In the server, before it begins: it is killed where this process is."""
    _control(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _control(what: int, value: int) -> None:
    """prctl(2), where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
