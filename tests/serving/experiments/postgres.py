"""A PostgreSQL of the tests' own: a cluster in a temporary folder, on a socket there."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_START_S = 60.0


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None: neither is installed."""
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "initdb").exists()), None)


class Cluster:
    """A PostgreSQL server that listens on a socket in its folder, and on no port. It runs as the
    user nobody where this process is root's, as which it refuses to run.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="mergeroute-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        told = ["--auth=trust", "--no-sync", "--username=tests", "--encoding=UTF8", "--locale=C"]
        subprocess.run(
            self._as_user("initdb", *told, "-D", str(self._folder / "data")),
            cwd=self._folder,
            check=True,
            capture_output=True,
            timeout=_START_S,
        )

    def url(self, database: str = "postgres") -> str:
        """Of one of its databases."""
        return f"postgresql://tests@/{database}?host={self._folder}"

    def start(self) -> None:
        """Serve, and return when connections are accepted."""
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off")
        options = [part for setting in settings for part in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user("postgres", "-D", str(self._folder / "data"), *options),
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        self._wait()

    def stop(self) -> None:
        """Stop serving at once, as a fast shutdown does: connections are cut."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(_START_S)
            self._process = None

    def remove(self) -> None:
        """Stop, and leave nothing."""
        self.stop()
        shutil.rmtree(self._folder)

    def _as_user(self, program: str, *arguments: str) -> list[str]:
        command = [str(self._programs / program), *arguments]
        if self._user is None:
            return command
        ids = (f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups")
        return ["setpriv", *ids, *command]

    def _wait(self) -> None:
        import psycopg

        end = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
