"""What a command takes: wall time, CPU time and peak memory, its children included. Linux only."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.02
"""Between two looks at the memory."""


class CommandFailed(RuntimeError):
    """A command ended with another status than 0; the message holds the end of what it wrote."""


@dataclass(frozen=True)
class Usage:
    """wall_s, cpu_s: seconds, CPU time of user and system.

    resident: peak bytes in memory, file pages that are mapped into it included; the kernel counts
    these although it can drop them at any time. anonymous: peak bytes without them.
    """

    wall_s: float
    cpu_s: float
    resident: int
    anonymous: int

    def __str__(self) -> str:
        memory = f"{self.resident / 1e9:.2f} GB resident, {self.anonymous / 1e9:.2f} GB anonymous"
        return f"{self.wall_s:.1f} s, {self.cpu_s:.1f} s of CPU, {memory}"


def run(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str]) -> Usage:
    """Run a command to its end and watch it.

    log: takes what it writes. env: added to this process's environment.

    Raises:
        CommandFailed: it ended with another status than 0.
    """
    begin, resident, anonymous = time.perf_counter(), 0, 0
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **env}
        )
        while True:
            pid, status, taken = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            now = [_memory(process) for process in _tree(child.pid)]
            resident = max(resident, sum(m.resident for m in now), *(m.most for m in now))
            anonymous = max(anonymous, sum(m.anonymous for m in now))
            time.sleep(PERIOD_S)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise CommandFailed(f"{command[0]} ended with status {child.returncode}:\n{end}")
    return Usage(wall, taken.ru_utime + taken.ru_stime, resident, anonymous)


def _tree(pid: int) -> Iterator[int]:
    """A process and all below it that still run."""
    yield pid
    for file in Path("/proc", str(pid), "task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # ended meanwhile
            continue
        for child in children:
            yield from _tree(int(child))


@dataclass(frozen=True)
class _Memory:
    """Bytes of one process; most: resident, the kernel's own peak.

    The peak that wait4 tells is of no use: it begins with that of the process that forked.
    """

    resident: int = 0
    anonymous: int = 0
    most: int = 0


def _memory(pid: int) -> _Memory:
    """What a process takes now."""
    try:
        lines = Path("/proc", str(pid), "status").read_text().splitlines()
    except OSError:  # ended meanwhile
        return _Memory()
    fields = dict(line.split(":", 1) for line in lines)
    keys = ("VmRSS", "RssAnon", "VmHWM")
    return _Memory(*(1024 * int(fields.get(key, "0 kB").split()[0]) for key in keys))
