"""Running the application: a socket, uvicorn, logs."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import suppress

import uvicorn

from .app import create_app
from .service import Service
from .settings import ServeSettings, SettingsError

DRAIN_S = 30
"""How long running requests may go on after the server is told to stop."""


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


def run(service: Service, listening: socket.socket, settings: ServeSettings) -> None:
    """Serve until interrupted; running requests get time to end."""
    configure_logging(settings.log_format)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=True,
        timeout_graceful_shutdown=DRAIN_S,
    )
    with suppress(KeyboardInterrupt):  # uvicorn has shut down in order by then
        uvicorn.Server(config).run(sockets=[listening])


def configure_logging(log_format: str) -> None:
    """Log lines on standard error, as text or as one JSON object a line. Prompts are not logged."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


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
