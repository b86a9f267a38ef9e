"""What it takes to call a route. What is not listed takes the most: a new route is shut until it is
put here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from starlette.routing import BaseRoute, Match
from starlette.types import Scope as Connection

Access = Literal["open", "any", "inference", "admin"]
"""open: nothing. any: a key, whatever its scopes. inference, admin: a key with that scope."""

ROUTES: Mapping[str, Access] = {
    "/health": "open",
    "/live": "open",
    "/ready": "open",
    "/version": "open",
    "/metrics": "any",
    "/openapi.json": "any",
    "/docs": "any",
    "/docs/oauth2-redirect": "any",
    "/redoc": "any",
    "/v1/models": "inference",
    "/v1/models/{name:path}": "inference",
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/v1/embeddings": "inference",
    "/v1/route": "inference",
    "/tokenize": "inference",
    "/detokenize": "inference",
    "/lora-adapters": "inference",
    "/v1/feedback": "inference",
    "/v1/replay": "any",
    "/v1/experiments": "admin",
    "/v1/experiments/{name}": "admin",
    "/v1/experiments/{name}/versions": "admin",
    "/v1/experiments/{name}/results": "admin",
    "/v1/experiments/{name}/start": "admin",
    "/v1/experiments/{name}/pause": "admin",
    "/v1/experiments/{name}/conclude": "admin",
    "/v1/experiments/{name}/promote": "admin",
    "/v1/experiments/{name}/rollback": "admin",
    "/v1/modules": "admin",
    "/v1/modules/{name:path}": "admin",
    "/v1/modules/upload": "admin",
    "/load_lora_adapter": "admin",
    "/unload_lora_adapter": "admin",
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
}


def access_to(path: str) -> Access:
    """What it takes to call the route of this path, as the application writes it."""
    return ROUTES.get(path, "admin")


def route_path(connection: Connection, routes: Iterable[BaseRoute]) -> str | None:
    """The path, as the application writes it, of the route that will be called; None: of none."""
    for route in routes:
        if route.matches(connection)[0] is not Match.NONE:
            return str(getattr(route, "path", ""))
    return None
