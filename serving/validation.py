"""From raw bodies to request models, and from pydantic's errors to sentences of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from ..adapters.errors import RequestError
from .access.checks import check_messages
from .access.limits import Limits
from .errors import CLIENT_CLOSED, ApiError
from .schemas.no_effect import without_no_effect

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")
_SHOWN = 60
_INLINE_BYTES = 64 << 10
"""Of a body that is read on the event loop; a longer one would hold up every stream."""

_RULES = {
    "missing": "is required",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_long": "may hold at most {max_length} items",
    "too_short": "must hold at least {min_length} item",
    "string_too_long": "may have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} character",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "may be at most {le}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match the pattern {pattern}",
}


_INSTEAD = {"functions": "use tools", "function_call": "use tool_choice"}


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: it is too large, no JSON object, or holds what is no text.
    """
    return await read_as(request, lambda document: document)


async def read_body(
    request: Request, kind: type[_Body], *, chat: type[_Body] | None = None
) -> _Body:
    """The body as its model. chat: of a body that holds messages, where that is another.

    Raises:
        ApiError: as `read_json` and `validate`; or it holds too many messages.
    """
    limits: Limits = request.state.limits

    def validated(document: dict[str, Any]) -> _Body:
        check_messages(document.get("messages"), limits)
        return validate(document, chat if chat and "messages" in document else kind)

    return await read_as(request, validated)


async def read_as(request: Request, understand: Callable[[dict[str, Any]], _Result]) -> _Result:
    """What a body says; a long one is understood off the event loop.

    Raises:
        ApiError: as `read_json`; or what `understand` raises.
    """
    content = await _read(request)
    if len(content) <= _INLINE_BYTES:
        return understand(_parsed(content))
    return await asyncio.to_thread(lambda: understand(_parsed(content)))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # fails on a lone surrogate
    except UnicodeEncodeError as error:
        raise ApiError("the body holds half a surrogate pair (\\ud800 to \\udfff)") from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return document


async def _read(request: Request) -> bytes:
    """The body, where it comes in time and is no longer than allowed.

    Raises:
        ApiError: it does not, or is; or the client is gone.
    """
    limits: Limits = request.state.limits
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > limits.body_bytes:
                    raise ApiError(
                        f"the body is over {limits.body_bytes:,} bytes (limits.body_bytes): "
                        "shorten it",
                        status=413,
                    )
    except TimeoutError as error:
        raise ApiError(
            f"the body did not arrive within {limits.body_seconds:g} s (limits.body_seconds)",
            status=408,
            code="request_timeout",
        ) from error
    except ClientDisconnect as error:
        raise ApiError("the client closed the connection", status=CLIENT_CLOSED) from error
    return bytes(content)


def validate(document: Mapping[str, Any], kind: type[_Body]) -> _Body:
    """The body as its model; a parameter that is not known is refused by name.

    Raises:
        ApiError: it says which parameter, its value and the rule.
    """
    try:
        body = without_no_effect(document)
        refuse_unknown(body.keys() - kind.model_fields.keys())
        return kind.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        raise _explained(_most_specific(error)) from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error


def refuse_unknown(names: Collection[str]) -> None:
    """Refuse parameters by name.

    Raises:
        ApiError: there is one.
    """
    if names:
        raise _unsupported(min(names))


def _most_specific(error: ValidationError) -> Mapping[str, Any]:
    """The first field's error; of a union, the branch that came furthest."""
    errors = [dict(each) for each in error.errors()]
    field = _path(errors[0])
    same_field = [each for each in errors if _path(each)[: len(field)] == field]
    return max(same_field, key=lambda each: (len(_path(each)), each["type"] == "value_error"))


def _explained(error: Mapping[str, Any]) -> ApiError:
    where = ".".join(map(str, _path(error))) or None
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return _unsupported(str(where))
    if error["type"] == "value_error":
        cause = context["error"]
        parameter = cause.parameter if isinstance(cause, RequestError) else where
        return ApiError(str(cause), param=parameter)
    if error["type"] == "json_invalid":  # it was JSON before: only its depth can be at fault
        return ApiError("the body is nested too deeply")
    rule = _RULES.get(error["type"], "").format(**context)
    rule = rule or error["msg"].replace("Input should be", "must be")
    value = json.dumps(error["input"], default=str, ensure_ascii=False)
    value = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
    stated = "" if error["type"] == "missing" else f" is {value}, it"
    return ApiError(f"{where}{stated} {rule}", param=where)


def _path(error: Mapping[str, Any]) -> list[int | str]:
    """Where in the body the error is: pydantic's location without its names of types."""
    types = ("str", "int", "constrained-str", "TextPart", "Conversation", "ToolChoice")
    return [p for p in error["loc"] if not (isinstance(p, str) and ("[" in p or p in types))]


def _unsupported(name: str) -> ApiError:
    return ApiError(
        f"the parameter {name!r} is not supported here: {_INSTEAD.get(name, 'leave it out')}",
        param=name,
        code="unsupported_parameter",
    )
