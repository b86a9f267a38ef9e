"""Who is let in: ASGI middleware before every route."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from ..errors import ApiError, describe
from .callers import ANYBODY
from .key_file import KeyRing
from .keys import Key, find_key
from .limits import Limits
from .rates import Account, Accounts, Allowance, headers
from .scopes import Access, access_to, route_path

_WRONG = "a valid API key is needed: send it as 'Authorization: Bearer KEY'"
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True)
class Policy:
    """Who is let in.

    keys: None: everybody is. is_exposed: whether the server listens on more than loopback
    addresses. cors_origins: whose pages may call it from a browser.
    """

    keys: KeyRing | None = None
    is_exposed: bool = False
    cors_origins: tuple[str, ...] = ()


EVERYBODY = Policy()
"""No keys, on this machine alone."""


class Guard:
    """ASGI middleware: the key, its scope and its rate. It leaves in a request's state what the
    routes need: `caller`, `limits` and `account`, which is None where nothing is counted.

    routes: of the application, as they are when a request comes.
    """

    def __init__(
        self, app: ASGIApp, *, policy: Policy, limits: Limits, routes: Sequence[BaseRoute]
    ) -> None:
        self._app = app
        self._policy = policy
        self._limits = limits
        self._routes = routes
        self._accounts = Accounts()

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state |= {"caller": ANYBODY, "account": None, "limits": self._limits}
        try:
            key = await self._admitted(scope)
        except ApiError as error:
            await _refusal(error)(scope, receive, send)
            return
        if key is None:
            await self._app(scope, receive, send)
            return
        account = self._accounts.of(key)
        state |= {"caller": key.caller, "account": account}
        await self._metered(account, scope, receive, send)

    async def _admitted(self, scope: Connection) -> Key | None:
        """The key that lets a request in; None where none is needed.

        Raises:
            ApiError: it is not let in.
        """
        path = route_path(scope, self._routes)
        access: Access = "any" if path is None else access_to(path)
        if access == "open":
            return None
        ring = self._policy.keys
        if ring is None:
            if access == "admin":
                self._check_local(Headers(scope=scope))
            return None
        if ring.is_stale():
            await asyncio.to_thread(ring.reload)
        key = find_key(ring.keys, _token(scope["headers"]))
        if key is None:
            raise ApiError(_WRONG, status=401, code="invalid_api_key")
        if access != "any" and access not in key.scopes:
            raise ApiError(
                f"the key {key.name!r} lacks the scope {access!r}, which {path} needs: use another",
                status=403,
                code="insufficient_scope",
            )
        return key

    def _check_local(self, given: Headers) -> None:
        """Without keys only this machine's own programs administer: no other machine, no proxy that
        passes others on, and no page of another site that a browser here shows.

        Raises:
            ApiError: it may be somebody else.
        """
        if self._policy.is_exposed:
            raise _unkeyed("listens on more than this machine")
        if not is_loopback(_host_name(given.get("host", ""))):
            raise _unkeyed("was asked under another machine's name")
        if any(name in given for name in _FORWARDED):
            raise _unkeyed("was asked through a proxy")
        if "origin" in given and given["origin"] not in self._policy.cors_origins:
            raise _unkeyed("was asked by a page in a browser")

    async def _metered(
        self, account: Account, scope: Connection, receive: Receive, send: Send
    ) -> None:
        allowances = account.allowances()
        if refused := max((a.retry_s for a in allowances.values()), default=0):
            await _too_much(account.key, allowances, refused)(scope, receive, send)
            return
        account.count_request()

        async def send_with_rates(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                _add(message, headers(account.allowances()))
            await send(message)

        await self._app(scope, receive, send_with_rates)


def add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins call the application from a browser; none: no page."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine alone."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _host_name(given: str) -> str:
    """Of a Host header, without its port; empty: it is none."""
    try:
        return urlsplit(f"//{given}").hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""


def _token(sent: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key that a request sends, in any of the usual headers; empty: none."""
    given = dict(sent)
    scheme, _, token = given.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return given.get(b"x-api-key") or given.get(b"api-key") or b""


def _unkeyed(why: str) -> ApiError:
    return ApiError(
        f"without API keys this is for programs on this machine alone, and the server {why}: start "
        "it with --api-keys FILE (mergeroute key create makes one)",
        status=403,
        code="api_keys_required",
    )


def _refusal(error: ApiError) -> Response:
    status, body = describe(error)
    shown = {"WWW-Authenticate": 'Bearer realm="mergeroute"'} if status == 401 else None
    return JSONResponse(body, status_code=status, headers=shown)


def _too_much(key: Key, allowances: dict[str, Allowance], retry_s: int) -> Response:
    name, allowance = max(allowances.items(), key=lambda item: item[1].retry_s)
    error = ApiError(
        f"the key {key.name!r} has used its {allowance.limit:,} {name} a minute: try again in "
        f"{retry_s} s",
        status=429,
        code="rate_limit_exceeded",
    )
    _, body = describe(error)
    shown = {"Retry-After": str(retry_s), **dict(headers(allowances))}
    return JSONResponse(body, status_code=429, headers=shown)


def _add(message: Message, pairs: Iterable[tuple[str, str]]) -> None:
    shown = MutableHeaders(scope=message)
    for name, value in pairs:
        shown[name] = value
