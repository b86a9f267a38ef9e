"""Other servers' own routes about modules: llama.cpp's `/lora-adapters`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from .access.permissions import listing_for
from .dialects import numbered
from .errors import ApiError
from .service import Service


def add_native_routes(app: FastAPI, service: Service) -> None:
    """Let clients of llama.cpp look modules' numbers up."""

    @app.get("/lora-adapters")
    async def adapters(request: Request) -> list[dict[str, Any]]:
        """The modules that a key may ask for. Every scale is 0: no request changes another's."""
        targets = service.targets
        names = {entry["id"] for entry in listing_for(request.state.caller, targets)}
        return [
            {"id": number, "path": full, "scale": 0.0}
            for number, (full, _, bare) in enumerate(numbered(targets))
            if names & {full, bare}
        ]

    @app.post("/lora-adapters")
    async def scale_all() -> None:
        raise ApiError(
            "scales are not set for all requests at once: give each request its own, as "
            '"lora": [{"id": 0, "scale": 0.5}]',
            status=405,
            code="unsupported_parameter",
        )
