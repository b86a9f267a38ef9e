"""Running the application: a socket, uvicorn, logs."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from types import FrameType

import transformers
import uvicorn

from .access.connections import connection_within
from .access.guard import EVERYBODY, Policy
from .access.redaction import WithoutKeys
from .app import create_app
from .errors import SettingsError
from .readers import reading_within
from .service import Service
from .telemetry.options import QUIET, Telemetry
from .telemetry.request_log import JsonLines, TextLines

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 5
"""For connections to close, once nothing is waited for any more."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is told before a model is loaded.

    Raises:
        SettingsError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small chunks at once only on a socket that says it is TCP
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose another with --port"
        ) from error
    return bound


def configuration(
    service: Service, policy: Policy = EVERYBODY, telemetry: Telemetry = QUIET
) -> uvicorn.Config:
    """How uvicorn runs a service. policy: who is let in. telemetry: what is told of it."""
    limits = service.limits
    return uvicorn.Config(
        create_app(service, policy, telemetry),
        log_config=None,
        access_log=False,  # telemetry has lines of its own
        timeout_graceful_shutdown=_LAST_WORDS_S,
        http=reading_within(
            connection_within(limits.header_seconds), service.pressure.stalled_reader_seconds
        ),
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=limits.connections,
    )


def run(
    service: Service,
    listening: socket.socket,
    policy: Policy = EVERYBODY,
    telemetry: Telemetry = QUIET,
) -> None:
    """Serve until told to stop, and drain. policy: who is let in."""
    Server(configuration(service, policy, telemetry), service).run(sockets=[listening])


class Server(uvicorn.Server):
    """Told to stop (SIGTERM, Ctrl+C), it drains: it goes on listening, to say that it is not ready
    and to refuse what is new, until running requests have ended. Those that take longer than
    `pressure.drain_seconds` end with an error. Told twice, it quits at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drained_by: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at the second signal, quit. uvicorn would raise the signal again afterwards."""
        if self._service.is_draining:
            os._exit(128 + sig)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to shut down."""
        if self._service.is_draining:
            await self._drain()
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        allowed_s = self._service.pressure.drain_seconds
        if self._drained_by is None:
            self._drained_by = time.monotonic() + allowed_s
            logger.info(
                "draining: %d requests get %g s to end; Ctrl+C quits at once",
                len(self.server_state.tasks),
                allowed_s,
            )
        if time.monotonic() >= self._drained_by:
            await asyncio.to_thread(self._service.stop)
            self.should_exit = True
        elif not self.server_state.tasks:
            self.should_exit = True


def configure_logging(log_format: str) -> None:
    """Log lines on standard error, as text or as one JSON object a line."""
    handler = logging.StreamHandler()
    formatter = JsonLines() if log_format == "json" else TextLines()
    handler.setFormatter(WithoutKeys(formatter))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new database is no news
    transformers.utils.logging.disable_progress_bar()
