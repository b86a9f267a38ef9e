"""Watch: a thread per server that sees to it that it runs, answers and serves every module."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

import httpx

from ...adapters.errors import EngineError
from .greetings import Health, greet, load, look, warm_up
from .options import VllmOptions
from .replicas import Replica, Replicas

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
_LOADING_S = 300.0
_LEAVING_S = 5.0


class Watch:
    """One server's. A process that ends is started again, after a pause that doubles as long as it
    does not become ready; so is one that does not answer for `hung_s`.

    wanted: digests of the modules that it is to serve.
    """

    def __init__(
        self,
        replica: Replica,
        replicas: Replicas,
        options: VllmOptions,
        wanted: Callable[[], Collection[str]],
    ) -> None:
        self.replica = replica
        self.failure: str | None = None
        self.has_settled = threading.Event()
        self._replicas = replicas
        self._options = options
        self._wanted = wanted
        self._stopping = threading.Event()
        self._silent_since = time.monotonic()
        self._began = time.monotonic()
        self._pause_s = options.probe_s
        self._start_at = 0.0
        self._tried: dict[str, float] = {}
        self._thread = threading.Thread(
            target=self._run, name=f"mergeroute-{replica.name}", daemon=True
        )

    def start(self) -> None:
        """Begin; the server is started where it is ours."""
        self._thread.start()

    def leave(self) -> None:
        """Look no more; `stop` is to follow."""
        self._stopping.set()

    def stop(self) -> None:
        """End the server where it is ours, and the thread."""
        self.leave()
        if self._thread.is_alive():  # it may wait for a server of others, which nobody ends
            self._thread.join(None if self.replica.process else _LEAVING_S)

    def _run(self) -> None:
        options, process = self._options, self.replica.process
        with self.replica.endpoint.client(min(options.silent_s, 5.0)) as client:
            while not self._stopping.is_set():
                try:
                    self._look(client)
                except EngineError as error:
                    self._tell(f"vLLM server {self.replica.endpoint}: {error}")
                except Exception as error:  # else nobody would look after the server any more
                    text = f"vLLM server {self.replica.endpoint} cannot be looked at: {error!r}"
                    self._tell(text, is_strange=True)
                self._stopping.wait(options.probe_s)
        self._replicas.became(self.replica, "stopped")
        if process:
            process.end()

    def _look(self, client: httpx.Client) -> None:
        process = self.replica.process
        if process and not process.is_running:
            self._restart()
        elif (health := self._health(client)) == "well":
            self._silent_since = time.monotonic()
            self._welcome(client)
        else:
            self._is_away(health)

    def _health(self, client: httpx.Client) -> Health:
        return look(client) if self.replica.endpoint.is_open else "ill"

    def _restart(self) -> None:
        process, now = self.replica.process, time.monotonic()
        assert process is not None
        if self._stopping.is_set():
            return
        if (status := process.poll()) is not None:
            was_ready = self.replica.state == "ready"
            self._replicas.became(self.replica, "lost")
            self._tell(
                f"vLLM server {self.replica.endpoint} ended with status {status}; its last words, "
                f"in {process.launch.log}:\n{process.tail()}"
            )
            process.end()
            self._pause_s = self._options.probe_s if was_ready else self._longer()
            self._start_at = now + self._pause_s
        if now >= self._start_at:
            self._clear_address()
            process.start()
            self.replica.restarts = process.starts - 1
            self._began = self._silent_since = now
            self._replicas.became(self.replica, "starting")

    def _longer(self) -> float:
        return min(_LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))

    def _clear_address(self) -> None:
        if self.replica.endpoint.socket:
            self.replica.endpoint.socket.unlink(missing_ok=True)

    def _welcome(self, client: httpx.Client) -> None:
        if self.replica.state != "ready":
            served = greet(client)
            if self.replica.process:
                with self.replica.endpoint.client(_LOADING_S) as patient:
                    warm_up(patient, served.model)
            self._replicas.became(self.replica, "ready", served)
            self._tried.clear()
        self._converge()

    def _converge(self) -> None:
        """Have the server load what it does not serve yet."""
        now = time.monotonic()
        missing = [module for module in self._wanted() if module not in self.replica.modules]
        due = [module for module in missing if now >= self._tried.get(module, 0.0)]
        if due:
            patience_s = min(_LOADING_S, self._options.hung_s)  # it is not looked at meanwhile
            with self.replica.endpoint.client(patience_s) as client:
                for module in due:
                    self._tried[module] = now + self._options.again_s
                    self._load(client, module)
        if not missing or all(module in self.replica.modules for module in missing):
            self._pause_s = self._options.probe_s
        self.has_settled.set()

    def _load(self, client: httpx.Client, module: str) -> None:
        refusal = load(client, module)
        if refusal is None:
            self._replicas.serves(self.replica, module)
        else:
            self._replicas.lacks(self.replica, [module], refusal.message)
            logger.error(
                "vLLM server %s lacks a module: %s", self.replica.endpoint, refusal.message
            )

    def _is_away(self, health: Health) -> None:
        """It does not answer, or says that it is not well."""
        now, options, process = time.monotonic(), self._options, self.replica.process
        silent_s = now - self._silent_since
        if self.replica.state == "ready" and (health == "ill" or silent_s >= options.silent_s):
            logger.error("vLLM server %s is %s", self.replica.endpoint, health)
            self._replicas.became(self.replica, "lost")
        if process is None:
            return
        is_starting = self.replica.state == "starting"
        if is_starting and now - self._began >= options.start_s:
            self._tell(
                f"vLLM server {self.replica.endpoint} was not ready after {options.start_s:g} s "
                f"(engine.start_seconds); its last words:\n{process.tail()}"
            )
            process.end()
            self._start_at = now
        elif not is_starting and silent_s >= options.hung_s:
            logger.error("vLLM server %s hangs: it is started again", self.replica.endpoint)
            process.end()
            self._start_at = now

    def _tell(self, text: str, *, is_strange: bool = False) -> None:
        """Of a server that never was ready it is kept: who started it waits for it. is_strange:
        the log needs to tell where it comes from.
        """
        if not self.has_settled.is_set():
            self.failure = text
        logger.error("%s", text, exc_info=is_strange)
