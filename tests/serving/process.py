"""`mergeroute` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MERGEROUTE = Path(sys.executable).parent / "mergeroute"


class serving:
    """A server process for the length of a block; the block gets its URL.

    lines: what it printed on standard error, once the block has ended.
    """

    def __init__(self, *arguments: object) -> None:
        command = [str(MERGEROUTE), *map(str, arguments), "--port", "0"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(command, stderr=self._log, text=True)
        self.lines: list[str] = []

    def __enter__(self) -> str:
        while self.process.poll() is None:
            if match := re.search(r"ready: (http://\S+)/v1", self._printed()):
                return match[1]
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self._printed()}")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.lines = self._printed().splitlines()
            self._log.close()

    def _printed(self) -> str:
        self._log.seek(0)
        return self._log.read()
