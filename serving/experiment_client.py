"""What a command asks a running server about its experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from pydantic import ValidationError

from ..adapters.errors import MergerouteError
from .access.guard import is_loopback
from .errors import SettingsError, UsageError

KEY_VARIABLE = "MERGEROUTE_API_KEY"
_TIMEOUT_S = 60.0
_MAX_KEY = 512
_SHOWN = 200


class ServerError(MergerouteError):
    """A server refused what a command asked of it, or gave no answer."""


def not_understood(error: ValidationError) -> ServerError:
    """An answer that is not what this version knows."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return ServerError(
        f"the server's answer is not understood ({where}: {first['msg']}): ask with the version of "
        "mergeroute that it runs"
    )


def read_key(path: Path | None) -> str | None:
    """The API key in a file, or else in the environment; None: there is none.

    Raises:
        SettingsError: it is no key, or the file cannot be read.
    """
    if path is None:
        where, key = f"the environment's {KEY_VARIABLE}", os.environ.get(KEY_VARIABLE, "")
    else:
        where, key = str(path), _first_of(path)
    key = key.strip()
    if not key and path is None:
        return None
    if not 0 < len(key) <= _MAX_KEY or not all("!" <= letter <= "~" for letter in key):
        raise SettingsError(f"{where} holds no API key: it must be the key and nothing else")
    return key


class ExperimentServer:
    """The experiments of the server at a URL. key: its API key, if it asks for one.

    Raises:
        UsageError: the URL is none.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self._url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            self._is_here = is_loopback(parts.hostname or "")
        except ValueError:
            is_url = False
        if not is_url:
            raise UsageError(f"--url {url!r} is no URL of a server: write http://127.0.0.1:8000")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def all(self) -> dict[str, Any]:
        """Every experiment."""
        return self._ask("GET", "")[0]

    def create(self, document: Mapping[str, object]) -> dict[str, Any]:
        """Make a draft."""
        return self._ask("POST", "", document)[0]

    def show(self, name: str) -> dict[str, Any]:
        """One, as it is now."""
        return self._ask("GET", _path(name))[0]

    def versions(self, name: str) -> dict[str, Any]:
        """One, as it was at each version."""
        return self._ask("GET", _path(name) + "/versions")[0]

    def results(
        self, name: str, *, points: int = 0, version_from: int | None = None
    ) -> dict[str, Any]:
        """What is known of one. points: of effects over time."""
        since = f"&version_from={version_from}" if version_from else ""
        return self._ask("GET", f"{_path(name)}/results?points={points}{since}")[0]

    def change(self, name: str, verb: str, **body: str) -> dict[str, Any]:
        """Start, pause, conclude, promote or roll back."""
        return self._ask("POST", f"{_path(name)}/{verb}", body)[0]

    def ramp(self, name: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Change weights or traffic of the experiment as it is now: not of one that somebody else
        changes at the same moment.
        """
        _, etag = self._ask("GET", _path(name))
        return self._ask("PATCH", _path(name), body, {"if-match": etag})[0]

    def delete(self, name: str) -> None:
        """Take one away."""
        self._ask("DELETE", _path(name))

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] = {},
    ) -> tuple[dict[str, Any], str]:
        """The answer and its ETag.

        Raises:
            ServerError: there is none, or it is an error.
        """
        content = None if body is None else _encoded(body)
        try:
            # a proxy is no way to this machine, whatever the environment says
            with httpx.Client(timeout=_TIMEOUT_S, trust_env=not self._is_here) as client:
                response = client.request(
                    method,
                    f"{self._url}/v1/experiments{path}",
                    content=content,
                    headers={"content-type": "application/json", **self._headers, **headers},
                )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"{self._url} does not answer ({str(error) or type(error).__name__}): start the "
                "server, or name another with --url"
            ) from error
        return self._read(response), response.headers.get("etag", "")

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == 204:
            return {}
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.is_success and isinstance(document, dict):
            return document
        raise ServerError(self._said(response, document))

    def _said(self, response: httpx.Response, document: object) -> str:
        """The server's own words, where they are an error's."""
        error = document.get("error") if isinstance(document, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        if not isinstance(message, str):
            start = f"{self._url} answered {response.status_code}"
            return f"{start}, and not as this server does: {response.text[:_SHOWN]!r}"
        if response.status_code == 401 and not self._headers:
            return f"{message} (a key is taken from {KEY_VARIABLE}, or from --key-file)"
        return message


def _path(name: str) -> str:
    return "/" + quote(name, safe="")


def _encoded(body: Mapping[str, object]) -> bytes:
    """As JSON, which knows neither NaN nor dates.

    Raises:
        SettingsError: it holds such a thing.
    """
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"this cannot be sent as JSON: {error}") from error


def _first_of(path: Path) -> str:
    """So much of a file as a key can be, and a little more."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(2 * _MAX_KEY)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
