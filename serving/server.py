"""Running the application: a socket, uvicorn, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from contextlib import suppress

import transformers
import uvicorn

from .app import create_app
from .service import Service
from .settings import SettingsError

DRAIN_S = 25
"""How long running requests may go on after the server is told to stop."""

_LAST_WORDS_S = 5


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is told before a model is loaded.

    Raises:
        SettingsError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
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


def run(service: Service, listening: socket.socket) -> None:
    """Serve until interrupted; running requests get time to end."""
    config = uvicorn.Config(
        create_app(service), log_config=None, timeout_graceful_shutdown=DRAIN_S + _LAST_WORDS_S
    )
    with suppress(KeyboardInterrupt):  # uvicorn has shut down in order by then
        Server(config, service).run(sockets=[listening])


class Server(uvicorn.Server):
    """Running requests get DRAIN_S to end; what still runs then ends with an error of ours, before
    uvicorn would cut its connection.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, drain, stop the engines."""
        ending = asyncio.create_task(self._end_generations())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_generations(self) -> None:
        await asyncio.sleep(DRAIN_S)
        await asyncio.to_thread(self._service.stop)


def configure_logging(log_format: str) -> None:
    """Log lines on standard error, as text or as one JSON object a line. Prompts are not logged."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    transformers.utils.logging.disable_progress_bar()


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
