"""The OpenAPI document. Routes read their bodies themselves, so it is told here what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from . import answers
from .access.scopes import access_to
from .experiments import answers as experiment_answers
from .experiments.definition import Experiment
from .experiments.schemas import (
    ChangeRequest,
    FeedbackRequest,
    PromoteRequest,
    RampRequest,
    ReplayRequest,
)
from .modules.schemas import LoadModuleRequest, UnloadModuleRequest
from .schemas.completions import ChatRequest, CompletionRequest
from .schemas.texts import DetokenizeRequest, EmbeddingRequest, TokenizeRequest

_JSON, _TEXT, _EVENTS = "application/json", "text/plain", "text/event-stream"
_SECURITY = "key"
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Call:
    """What a route takes and gives; answer None: it answers with errors alone. as_text: the answer
    is plain text. streams: it may come as server-sent events. reads_file: the body is an archive.
    status: of the answer; 204 has none.
    """

    body: Any = None
    answer: Any = None
    as_text: bool = False
    streams: bool = False
    reads_file: bool = False
    status: int = 200


CALLS: Mapping[tuple[str, str], Call] = {
    ("get", "/live"): Call(answer=answers.Status),
    ("get", "/ready"): Call(answer=answers.Status),
    ("get", "/health"): Call(answer=answers.Status),
    ("get", "/version"): Call(answer=answers.Version),
    ("get", "/metrics"): Call(answer=str, as_text=True),
    ("post", "/v1/chat/completions"): Call(ChatRequest, answers.ChatCompletion, streams=True),
    ("post", "/v1/completions"): Call(CompletionRequest, answers.TextCompletion, streams=True),
    ("post", "/v1/embeddings"): Call(EmbeddingRequest, answers.Embeddings),
    ("post", "/v1/route"): Call(ChatRequest | CompletionRequest, answers.Route),
    ("post", "/tokenize"): Call(TokenizeRequest, answers.Tokens),
    ("post", "/detokenize"): Call(DetokenizeRequest, answers.Text),
    ("get", "/v1/models"): Call(answer=answers.ModelList),
    ("get", "/v1/models/{name}"): Call(answer=answers.Model),
    ("post", "/v1/feedback"): Call(FeedbackRequest, experiment_answers.Feedback),
    ("post", "/v1/replay"): Call(ReplayRequest, experiment_answers.Replay),
    ("get", "/v1/experiments"): Call(answer=experiment_answers.ExperimentList),
    ("post", "/v1/experiments"): Call(Experiment, experiment_answers.Experiment, status=201),
    ("get", "/v1/experiments/{name}"): Call(answer=experiment_answers.Experiment),
    ("patch", "/v1/experiments/{name}"): Call(RampRequest, experiment_answers.Experiment),
    ("delete", "/v1/experiments/{name}"): Call(status=204),
    ("get", "/v1/experiments/{name}/versions"): Call(answer=experiment_answers.ExperimentList),
    ("get", "/v1/experiments/{name}/results"): Call(answer=experiment_answers.ExperimentResults),
    ("post", "/v1/experiments/{name}/start"): Call(ChangeRequest, experiment_answers.Experiment),
    ("post", "/v1/experiments/{name}/pause"): Call(ChangeRequest, experiment_answers.Experiment),
    ("post", "/v1/experiments/{name}/conclude"): Call(ChangeRequest, experiment_answers.Experiment),
    ("post", "/v1/experiments/{name}/promote"): Call(PromoteRequest, experiment_answers.Experiment),
    ("post", "/v1/experiments/{name}/rollback"): Call(ChangeRequest, experiment_answers.Experiment),
    ("get", "/v1/modules"): Call(answer=answers.ModuleList),
    ("get", "/v1/modules/{name}"): Call(answer=answers.Module),
    ("post", "/v1/load_lora_adapter"): Call(LoadModuleRequest, str, as_text=True),
    ("post", "/v1/unload_lora_adapter"): Call(UnloadModuleRequest, str, as_text=True),
    ("post", "/v1/modules/upload"): Call(answer=answers.Uploaded, reads_file=True),
    ("get", "/lora-adapters"): Call(answer=list[answers.LoraAdapter]),
    ("post", "/lora-adapters"): Call(),
}
"""By method and path, as the document writes them."""


def describe_routes(app: FastAPI, *, has_keys: bool) -> None:
    """Have an application tell of its routes, as they are when it is first asked.

    has_keys: whether it asks for API keys.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, has_keys=has_keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    document: dict[str, Any] = get_openapi(
        title=app.title, version=metadata.version("mergeroute"), routes=app.routes
    )
    schemas, definitions = _schemas()
    document["components"] = {"schemas": definitions}
    if has_keys:
        document["components"]["securitySchemes"] = {
            _SECURITY: {"type": "http", "scheme": "bearer"}
        }
    original = {
        getattr(route, "path_format", ""): getattr(route, "path", "") for route in app.routes
    }
    for method, path, operation in _operations(document):
        call = CALLS.get((method, path), Call(answer=Any))
        operation |= _described(method, path, call, schemas)
        access = access_to(original.get(path, path))
        if has_keys and access != "open":
            operation["security"] = [{_SECURITY: [] if access == "any" else [access]}]
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


_Key = tuple[str, str, Literal["body", "answer"]]


def _schemas() -> tuple[dict[_Key, Any], dict[str, Any]]:
    """Of every body and answer, by method, path and which of them; and what they refer to."""
    adapters: list[tuple[_Key, Literal["validation"], TypeAdapter[Any]]] = [
        ((*key, "body"), "validation", TypeAdapter(call.body))
        for key, call in CALLS.items()
        if call.body
    ]
    adapters += [
        ((*key, "answer"), "validation", TypeAdapter(call.answer))
        for key, call in CALLS.items()
        if call.answer
    ]
    adapters.append((("", "", "answer"), "validation", TypeAdapter(answers.Error)))
    found, told = TypeAdapter.json_schemas(adapters, ref_template=_REF)
    return {key: schema for (key, _), schema in found.items()}, told["$defs"]


def _described(method: str, path: str, call: Call, schemas: Mapping[_Key, Any]) -> dict[str, Any]:
    """What is said of a route beside its name and parameters."""
    error = {"content": {_JSON: {"schema": schemas["", "", "answer"]}}}
    answered: dict[str, Any] = {}
    if call.answer is not None:
        kind = _TEXT if call.as_text else _JSON
        content = {kind: {"schema": schemas.get((method, path, "answer"), {})}}
        if call.streams:
            content[_EVENTS] = {}  # OpenAPI 3.1 has no words for what an event holds
        answered = {str(call.status): {"description": "Success", "content": content}}
    elif call.status == 204:
        answered = {"204": {"description": "Success"}}
    refused = {
        "4XX": {"description": "The request is at fault, or there are too many", **error},
        "5XX": {"description": "The server is at fault, or not ready", **error},
    }
    said: dict[str, Any] = {"responses": answered | refused}
    if call.body:
        content = {_JSON: {"schema": schemas[method, path, "body"]}}
        said["requestBody"] = {"required": True, "content": content}
    elif call.reads_file:
        said["requestBody"] = {"required": True, "content": _FILE}
    return said


_BYTES = {"type": "string", "format": "binary"}
_FILE = {
    "application/octet-stream": {"schema": _BYTES},
    "multipart/form-data": {
        "schema": {"type": "object", "required": ["file"], "properties": {"file": _BYTES}}
    },
}
