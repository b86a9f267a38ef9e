"""Whether the process answers, whether it should be sent requests, and how it says no to them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, describe, retry_headers
from .service import Service

_STILL_ANSWERED = frozenset(("/health", "/ready", "/live", "/metrics", "/version"))
_METHODS = ["GET", "HEAD"]
"""Of one route, whose 405 then names both; the document is told of GET by another one."""


def add_health_routes(app: FastAPI, service: Service) -> None:
    """/live: the process answers. /health and /ready: it should be sent requests, else 503."""

    @app.get("/live")
    @app.api_route("/live", methods=_METHODS, include_in_schema=False)
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    @app.api_route("/ready", methods=_METHODS, include_in_schema=False)
    @app.get("/health")
    @app.api_route("/health", methods=_METHODS, include_in_schema=False)
    async def ready() -> dict[str, Any]:
        if reason := service.unready:
            raise ApiError(reason, status=503, code="not_ready")
        warnings = service.warnings
        return {"status": "ok", **({"warnings": warnings} if warnings else {})}


class Draining:
    """ASGI middleware: once the service drains, requests are told to go elsewhere."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        is_asked = scope["type"] == "http" and scope["path"] not in _STILL_ANSWERED
        answer = _refusal() if is_asked and self._service.is_draining else self._app
        await answer(scope, receive, send)


def _refusal() -> JSONResponse:
    error = ApiError(
        "the server is shutting down: try another replica, or later", status=503, code="not_ready"
    )
    status, body = describe(error)
    headers = {**retry_headers(status, error), "Connection": "close"}
    return JSONResponse(body, status_code=status, headers=headers)
