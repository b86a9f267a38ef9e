"""The routes that load and unload modules, in the shape of vLLM's."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from ..schemas import LoadModuleRequest, UnloadModuleRequest
from ..service import Service
from ..validation import read_json, validate


def add_module_routes(app: FastAPI, service: Service) -> None:
    """Let clients of an application load and unload modules."""

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = validate(await read_json(request), LoadModuleRequest)
        basis = await service.load_module(body)
        return PlainTextResponse(
            f"Success: LoRA adapter '{body.lora_name}' added successfully.\n{basis}"
        )

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        body = validate(await read_json(request), UnloadModuleRequest)
        await service.unload_module(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
