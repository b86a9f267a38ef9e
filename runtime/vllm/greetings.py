"""What a server is asked beside requests: whether it is well, what it serves, to load a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import httpx

from ...adapters.blend import Blend
from ...adapters.errors import EngineError
from .blends import lora_name
from .refusals import Refusal
from .replicas import Served

Health = Literal["well", "ill", "silent"]
"""ill: it says so, or takes no connection. silent: it does not answer, in time or at all."""

_ANY_TOKEN = 0


def look(client: httpx.Client) -> Health:
    """Whether the server says that its engine works."""
    try:
        return "well" if client.get("/health").status_code == 200 else "ill"
    except httpx.ConnectError:
        return "ill"
    except httpx.HTTPError:  # one look that fails tells little of the streams that run
        return "silent"


def greet(client: httpx.Client) -> Served:
    """What the server tells of itself.

    Raises:
        EngineError: it does not speak as vLLM does.
    """
    try:
        response = client.get("/v1/models")
        if response.status_code != 200:
            raise EngineError(Refusal.read(response.status_code, response.content).message)
        model = response.json()["data"][0]
        return Served(str(model["id"]), int(model["max_model_len"]), _fields(client))
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise EngineError(f"GET /v1/models was not answered as by vLLM: {error!r}") from error


def warm_up(client: httpx.Client, model: str) -> None:
    """Have the server compile what it compiles when log-probabilities are first asked for: it would
    stop every stream for up to half a minute.
    """
    body = {"model": model, "prompt": [_ANY_TOKEN], "max_tokens": 1, "logprobs": 1}
    _ask(client, body)


def load(client: httpx.Client, module: str) -> Refusal | None:
    """Have the server load a module, by its digest; None where it serves it now.

    Raises:
        EngineError: the server does not answer.
    """
    name = lora_name(Blend({module: 1.0}))
    response = _ask(client, {"model": name, "prompt": [_ANY_TOKEN], "max_tokens": 1})
    if response.status_code == 200:
        return None
    return Refusal.read(response.status_code, response.content)


def _ask(client: httpx.Client, body: Mapping[str, Any]) -> httpx.Response:
    try:
        return client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        raise EngineError(f"the vLLM server does not answer: {error!r}") from error


def _fields(client: httpx.Client) -> dict[str, frozenset[str]]:
    """The fields of bodies by path, as far as the server's OpenAPI document states them."""
    response = client.get("/openapi.json")
    if response.status_code != 200:
        return {}
    try:
        return _stated(response.json())
    except (ValueError, AttributeError, TypeError):  # it is none, or of another form
        return {}


def _stated(document: Any) -> dict[str, frozenset[str]]:  # noqa: ANN401 - any JSON value
    schemas = document.get("components", {}).get("schemas", {})
    found: dict[str, frozenset[str]] = {}
    for path, methods in document.get("paths", {}).items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        name = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        if properties := schemas.get(name.rpartition("/")[2], {}).get("properties"):
            found[path] = frozenset(properties)
    return found
