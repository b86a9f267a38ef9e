"""ASGI middleware: every request has an id and a record, and is told of when it is over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ..access.scopes import route_path
from .metrics import Metrics
from .options import Telemetry
from .record import UNKNOWN, RequestRecord
from .request_log import log_request

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MOST_ERROR_BYTES = 1 << 16
_CODE = re.compile(r"[A-Za-z_]{1,64}")


class Observed:
    """Every answer carries `x-request-id`. A request's state holds `request_id` and `record`.

    routes: of the application, as they are when a request comes. on_end: told of every request that
    is over.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        telemetry: Telemetry,
        routes: Sequence[BaseRoute],
        on_end: Callable[[RequestRecord], None],
    ) -> None:
        self._app = app
        self._on_end = on_end
        self._metrics = metrics
        self._telemetry = telemetry
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and tell of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _arrived(scope)
        scope.setdefault("state", {}).update(request_id=record.request_id, record=record)
        answer = _Answer(record.request_id, send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            record.route = self._route(scope)
            caller = scope["state"].get("caller")
            record.key = caller.name if caller else ""
            record.error = answer.error
            record.end(answer.status)
            self._tell(record)

    def _route(self, scope: Scope) -> str:
        """The path as the application writes it, of what was refused on its way too."""
        route = scope.get("route")
        path = route_path(scope, self._routes) if route is None else getattr(route, "path", None)
        return path or UNKNOWN

    def _tell(self, record: RequestRecord) -> None:
        self._on_end(record)
        if self._telemetry.traces:
            self._telemetry.traces.tell(record)
        self._metrics.count(record)
        log_request(record, logs_prompts=self._telemetry.logs_prompts)


class _Answer:
    """What is sent, with the request's id; of an error, its code."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.status = 500
        self._has_started = False
        self._request_id = request_id
        self._send = send
        self._body = bytearray()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self._has_started = message["status"], True
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        elif self.status >= 400 and len(self._body) < _MOST_ERROR_BYTES:
            self._body += message.get("body", b"")
        await self._send(message)

    @property
    def error(self) -> str | None:
        """The code of the error that was answered, or its type."""
        if self.status < 400:
            return None
        if not self._has_started:  # an exception, which is answered further out
            return "internal_error"
        try:
            error = json.loads(self._body)["error"]
            code = error["code"] or error["type"]
        except (ValueError, LookupError, TypeError):
            return f"http_{self.status}"
        return code if isinstance(code, str) and _CODE.fullmatch(code) else f"http_{self.status}"


def _arrived(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    given = headers.get("x-request-id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
    return RequestRecord(request_id, scope["method"], headers=headers, server=scope.get("server"))
