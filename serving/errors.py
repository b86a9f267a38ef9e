"""Errors of this layer, and one table from exceptions to HTTP status and OpenAI's error body."""

from __future__ import annotations

from typing import Any

from ..adapters.errors import (
    BlendError,
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    EngineTimeoutError,
    MergerouteError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
    RouterError,
    UnknownModuleError,
    UnknownTargetError,
)

CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody reads it but the log and the metrics."""


class SettingsError(MergerouteError):
    """The settings are at fault."""


class UsageError(SettingsError):
    """The command line is at fault."""


class ApiError(MergerouteError):
    """An error with its HTTP form, for what only this layer can know."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    410: "invalid_request_error",
    412: "invalid_request_error",
    413: "invalid_request_error",
    428: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_STATUS: tuple[tuple[type[MergerouteError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (RequestError, 400, None),
    (BlendError, 400, None),
    (UnknownTargetError, 404, "model_not_found"),
    (UnknownModuleError, 404, "model_not_found"),
    (ModuleUnavailableError, 503, "module_unavailable"),
    (QueueFullError, 429, "queue_full"),
    (EngineStoppedError, 503, "not_ready"),
    (EngineTimeoutError, 504, "timeout"),
    (RouterError, 500, "router_failed"),
    (EngineError, 500, "engine_failed"),
)

_RETRY_AFTER_S = {429: 1, 503: 5}


def error_body(
    message: str, *, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = _TYPES.get(status, "internal_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an exception; what is not on purpose says nothing of its inside."""
    if isinstance(error, ApiError):
        body = error_body(str(error), status=error.status, param=error.param, code=error.code)
        return error.status, body
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            param = error.parameter if isinstance(error, RequestError) else _PARAMS.get(kind)
            return status, error_body(str(error), status=status, param=param, code=code)
    message = "internal error: the server's log has the details"
    return 500, error_body(message, status=500, code="internal_error")


_PARAMS: dict[type[MergerouteError], str] = {
    BlendError: "blend",
    UnknownTargetError: "model",
    UnknownModuleError: "model",
    ModuleUnavailableError: "model",
}


def retry_headers(status: int, error: Exception | None = None) -> dict[str, str]:
    """`Retry-After` where trying again helps."""
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(error.retry_s)}
    return {"Retry-After": str(_RETRY_AFTER_S[status])} if status in _RETRY_AFTER_S else {}
