"""The routes that list, load and unload modules: vLLM's, SGLang's without /v1, and our own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ...adapters.errors import MergerouteError
from ..errors import ApiError, describe, retry_headers
from ..service import Service
from ..validation import read_json, validate
from .changes import InvalidUserInput
from .schemas import LoadModuleRequest, UnloadModuleRequest
from .uploads import receive

_VLLM_TYPES = {400: "BadRequestError", 404: "NotFoundError", 409: "BadRequestError"}
_GENERATION = "x-mergeroute-generation"


def add_module_routes(app: FastAPI, service: Service) -> None:
    """Let clients of an application see, load and unload modules."""

    @app.post("/load_lora_adapter", include_in_schema=False)
    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        async def loaded() -> Response:
            body = validate(await read_json(request), LoadModuleRequest)
            if service.is_experiment(body.lora_name):
                raise ApiError(
                    f"{body.lora_name!r} is the name of an experiment: choose another",
                    status=409,
                    param="lora_name",
                    code="conflict",
                )
            change = await service.modules.load(body)
            text = f"Success: LoRA adapter '{body.lora_name}' added successfully.\n{change.basis}"
            return PlainTextResponse(text, headers={_GENERATION: str(change.generation)})

        return await _in_vllms_words(loaded)

    @app.post("/unload_lora_adapter", include_in_schema=False)
    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        async def unloaded() -> Response:
            body = validate(await read_json(request), UnloadModuleRequest)
            await service.modules.unload(body)
            return PlainTextResponse(
                f"Success: LoRA adapter '{body.lora_name}' removed successfully."
            )

        return await _in_vllms_words(unloaded)

    @app.get("/v1/modules")
    async def modules() -> dict[str, Any]:
        return {"object": "list", "data": service.modules.entries()}

    @app.get("/v1/modules/{name:path}")
    async def module(name: str) -> dict[str, Any]:
        return service.modules.entry(name)

    @app.post("/v1/modules/upload")
    async def upload(request: Request) -> dict[str, Any]:
        if service.modules.sources.uploads is None:
            raise ApiError(
                "this server takes no uploads: set 'module_sources: {uploads: true}' in "
                "serve.yaml, with a state folder to keep them in",
                status=403,
                code="uploads_disabled",
            )
        folder = await receive(request, service.modules.sources.uploads, service.limits)
        return {"object": "module.upload", "lora_path": folder.name}


async def _in_vllms_words(answer: Callable[[], Awaitable[Response]]) -> Response:
    """An answer, or an error whose `type` is what vLLM's clients know it by.

    Source: serve/lora/api_router.py and entrypoints/openai/models/serving.py of vLLM.
    """
    try:
        return await answer()
    except MergerouteError as error:
        status, body = describe(error)
        if status >= 500:
            raise
        kind = _VLLM_TYPES.get(status, body["error"]["type"])
        body["error"]["type"] = "InvalidUserInput" if isinstance(error, InvalidUserInput) else kind
        return JSONResponse(body, status_code=status, headers=retry_headers(status))
