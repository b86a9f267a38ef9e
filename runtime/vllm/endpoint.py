"""Endpoint: where a vLLM server is, and pooled HTTP clients for it."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import httpx

from ...adapters.errors import EngineError

_CONNECT_S = 5.0
_KEPT_S = 2.0
"""For an idle connection: less than the 5 s after which vLLM closes it from its side."""

_CLOSING_S = 2.0
_MOST_SOCKET_BYTES = 107
"""Of a Unix socket's path. Source: unix(7), sun_path, without the zero at its end."""


@dataclass(frozen=True)
class Endpoint:
    """A server's address. socket: a Unix socket that it listens on; None: TCP.

    name: what clients and metrics see of it. api_key: what it lets in.

    Raises:
        EngineError: no socket can have such a long path.
    """

    name: str
    url: str
    socket: Path | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.socket and (size := len(os.fsencode(self.socket))) > _MOST_SOCKET_BYTES:
            raise EngineError(
                f"the socket's path {self.socket} is {size} bytes, the limit is "
                f"{_MOST_SOCKET_BYTES}: set TMPDIR to a folder with a shorter path"
            )

    def __str__(self) -> str:
        """For logs: with the URL, where it is somebody's."""
        return self.name if self.socket else f"{self.name} at {self.url}"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def is_open(self) -> bool:
        """Whether a server listens, where that can be told at once: on a Unix socket."""
        if self.socket is None:
            return True
        with socket.socket(socket.AF_UNIX) as probe:  # httpcore leaks one that is refused
            probe.settimeout(_CONNECT_S)
            return probe.connect_ex(str(self.socket)) == 0

    @property
    def _verify(self) -> ssl.SSLContext | bool:
        """Certificates are read once, and only for those who have one to show."""
        return _certificates() if self.url.startswith("https:") else False

    def client(self, timeout_s: float) -> httpx.Client:
        """A client for threads; whoever asks for it closes it."""
        limits = httpx.Limits(keepalive_expiry=_KEPT_S)
        path = str(self.socket) if self.socket else None
        return httpx.Client(
            base_url=self.url,
            headers=self._headers,
            transport=httpx.HTTPTransport(verify=self._verify, uds=path, limits=limits),
            timeout=timeout_s,
            trust_env=False,  # a proxy of the environment is not for our own servers
        )

    def async_client(self) -> httpx.AsyncClient:
        """A client for one event loop. It waits for answers without a limit: its user has some."""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEPT_S)
        path = str(self.socket) if self.socket else None
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            transport=httpx.AsyncHTTPTransport(verify=self._verify, uds=path, limits=limits),
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            trust_env=False,
        )


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


class Clients:
    """The clients of one endpoint, one per event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._finishing: set[asyncio.Task[None]] = set()
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            WeakKeyDictionary()
        )

    def here(self) -> httpx.AsyncClient:
        """The client of the loop that runs."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._by_loop:
                self._by_loop[loop] = self._endpoint.async_client()
            return self._by_loop[loop]

    def finish(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Have work done to its end, whether or not somebody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return task

    def close(self) -> None:
        """Close them where their loops still run; not from one of them."""
        with self._lock:
            clients = list(self._by_loop.items())
            self._by_loop.clear()
        for loop, client in clients:
            if loop.is_running():
                with suppress(FutureTimeoutError, RuntimeError):
                    closing = asyncio.run_coroutine_threadsafe(client.aclose(), loop)
                    closing.result(_CLOSING_S)
