"""Server processes: nothing of them outlives the gateway, however it ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.process import Launch, ServerProcess

FAMILY = """
import os, signal, subprocess, sys, time
deaf = "deaf" in sys.argv
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
"""A server with a child that leaves its session and does not listen to SIGTERM."""

GATEWAY = """
import sys, time
from pathlib import Path
from mergeroute.runtime.vllm.process import Launch, ServerProcess
log, own = Path(sys.argv[1]), Path(sys.argv[3])
launch = Launch([sys.executable, "-c", sys.argv[2]], log, grace_s=0.2, folder=own)
process = ServerProcess(launch)
process.start()
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} seconds"
        time.sleep(0.02)


def pids_in(log: Path) -> list[int]:
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    return [int(pid) for pid in log.read_text().split()[1:]]


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def started(log: Path, *arguments: str, grace_s: float = 0.2) -> ServerProcess:
    command = [sys.executable, "-c", FAMILY, *arguments]
    process = ServerProcess(Launch(command, log, grace_s=grace_s))
    process.start()
    return process


@pytest.mark.parametrize("arguments", [(), ("deaf",)])
def test_ended_nothing_is_left(tmp_path: Path, arguments: tuple[str]) -> None:
    process = started(tmp_path / "log", *arguments)
    pids = pids_in(tmp_path / "log")
    assert process.is_running
    keeper = process.pid
    assert keeper is not None
    process.end()
    assert not process.is_running
    assert all(map(is_gone, (keeper, *pids)))
    process.start()
    assert process.starts == 2
    process.end()


def test_a_gateway_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    log, own = tmp_path / "log", tmp_path / "own"
    own.mkdir()
    (own / "module").touch()
    gateway = subprocess.Popen([sys.executable, "-c", GATEWAY, str(log), FAMILY, str(own)])
    pids = pids_in(log)
    gateway.kill()
    gateway.wait()
    wait_for(lambda: all(map(is_gone, pids)))
    wait_for(lambda: not own.exists())


def test_a_keeper_that_is_killed_takes_the_server_along(tmp_path: Path) -> None:
    process = started(tmp_path / "log")
    server, child = pids_in(tmp_path / "log")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: is_gone(server))
    assert process.poll() == -signal.SIGKILL
    process.end()
    os.kill(child, signal.SIGKILL)


def test_a_server_that_ends_tells_how_and_takes_its_children_along(tmp_path: Path) -> None:
    process = started(tmp_path / "log")
    server, child = pids_in(tmp_path / "log")
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: process.poll() is not None)
    assert process.poll() == 128 + signal.SIGKILL
    assert is_gone(child)
    process.end()


def test_asked_to_end_it_may_take_its_time(tmp_path: Path) -> None:
    slow = (
        "import signal, sys, time\n"
        "def leave(*_):\n    time.sleep(0.3)\n    print('left', flush=True)\n    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    process = ServerProcess(Launch([sys.executable, "-c", slow], tmp_path / "log", grace_s=5))
    process.start()
    wait_for(lambda: process.tail() == "up")
    process.ask_to_end()
    wait_for(lambda: process.poll() is not None)
    assert process.poll() == 7
    assert process.tail(1) == "left"
    process.end()


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    process = ServerProcess(Launch(["true"], tmp_path / "none" / "log"))
    with pytest.raises(EngineError, match=r"true cannot be started: .*No such file"):
        process.start()
    missing = ServerProcess(Launch(["/no/such/vllm"], tmp_path / "log"))
    missing.start()
    wait_for(lambda: missing.poll() is not None)
    assert missing.poll() != 0
    assert "/no/such/vllm" in missing.tail()
    missing.end()


def test_where_files_run_out_that_is_told_too(tmp_path: Path) -> None:
    process = ServerProcess(Launch(["true"], tmp_path / "log"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limit[1]))
    try:
        with pytest.raises(EngineError, match=r"true cannot be started: .*Too many open files"):
            process.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    process.start()
    wait_for(lambda: process.poll() == 0)
    process.end()


def test_the_environment_is_added_to(tmp_path: Path) -> None:
    show = "import os; print(os.environ['MR_X'], 'PATH' in os.environ)"
    launch = Launch([sys.executable, "-c", show], tmp_path / "log", {"MR_X": "1"})
    process = ServerProcess(launch)
    process.start()
    wait_for(lambda: process.poll() is not None)
    assert process.tail() == "1 True"
    process.end()
