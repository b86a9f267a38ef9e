"""The server that is soaked: a process of its own, with keys, a state folder and little room."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from mergeroute.serving.access.key_file import add_key
from mergeroute.serving.access.keys import Key, new_token, token_hash
from mergeroute.serving.cli import DEMO_BANK

_STARTS_WITHIN_S = 120
_ENDS_WITHIN_S = 60
SLOW_KEY_REQUESTS = 30
"""That the key `slow` may ask in a minute."""

_KEYS: dict[str, dict[str, object]] = {
    "one": {"scopes": ["inference"]},
    "two": {"scopes": ["inference"]},
    "admin": {"scopes": ["admin"]},
    "roman": {"scopes": ["inference"], "targets": ["roman"]},
    "slow": {"scopes": ["inference"], "requests_per_minute": SLOW_KEY_REQUESTS},
}


@dataclass(frozen=True)
class Sample:
    """What the process takes at one moment. at: of `time.monotonic`. rss: bytes."""

    at: float
    rss: int
    files: int
    threads: int


class Server:
    """A running `mergeroute serve` on the demo bank in float32. keys: tokens by name."""

    def __init__(self, folder: Path, *, module_bytes: int) -> None:
        self.folder, self.root = folder, folder / "loras"
        self.log = folder / "server.log"
        self.keys = {name: _make_key(folder / "keys.yaml", name) for name in _KEYS}
        config = folder / "serve.yaml"
        config.write_text(yaml.safe_dump(_settings(module_bytes)))
        command = [
            str(Path(sys.executable).parent / "mergeroute"),
            "serve",
            "--config",
            str(config),
        ]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=out, env=_environment()
            )
        self.url = self._wait_for_url()

    def sample(self) -> Sample:
        """What it takes now. Linux only."""
        proc = Path("/proc", str(self.process.pid))
        fields = dict(x.split(":", 1) for x in (proc / "status").read_text().splitlines())
        rss = 1024 * int(fields["VmRSS"].split()[0])
        files = len(list((proc / "fd").iterdir()))
        return Sample(time.monotonic(), rss, files, int(fields["Threads"]))

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def stop(self) -> int:
        """Tell it to stop; its exit status, -9 where it had to be killed."""
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def log_end(self) -> str:
        """The last lines that it logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while self.is_running and time.monotonic() < deadline:
            if match := re.search(r"ready: (http://[^/\s]+)/v1", self.log_end()):
                return match[1]
            time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"the server did not start:\n{self.log_end()}")


def _settings(module_bytes: int) -> dict[str, object]:
    return {
        "banks": [str(DEMO_BANK)],
        "dtype": "float32",
        "port": 0,
        "max_concurrency": 8,
        "module_roots": ["loras"],
        "module_memory": module_bytes,
        "pinned_modules": ["english"],
        "state": "state",
        "api_keys": "keys.yaml",
        "log_format": "json",
        "conversations": {"sessions": 200},
        "limits": {"body_bytes": 65_536},
        "pressure": {"stalled_reader_seconds": 3},
    }


def _make_key(file: Path, name: str) -> str:
    token = new_token()
    add_key(file, Key.model_validate({"name": name, "hash": _hashed(token), **_KEYS[name]}))
    return token


def _hashed(token: str) -> str:
    return token_hash(token.encode())


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
