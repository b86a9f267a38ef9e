"""The HTTP application: OpenAI's routes, the preview, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..adapters.errors import MergerouteError
from .access.guard import EVERYBODY, Guard, Policy, add_cors
from .access.permissions import describe_for, listing_for
from .assigning import Assignment
from .choices import Choice
from .context import Context
from .errors import CLIENT_CLOSED, ApiError, describe, error_body, retry_headers
from .experiments.replay import replay
from .experiments.routes import add_experiment_routes, live_of
from .experiments.schemas import ReplayRequest
from .health import Draining, add_health_routes
from .modules.routes import add_module_routes
from .native_routes import add_native_routes
from .openapi import describe_routes
from .relay.bodies import read_relayed
from .relay.relays import Relay
from .responses.chat import ChatShape
from .responses.completions import CompletionShape
from .responses.decisions import blend_text
from .responses.progress import Progress, usage
from .schemas.completions import ChatRequest, CompletionRequest, GenerationBody
from .service import Service
from .streaming import collect, server_sent_events
from .telemetry.metrics import Metrics
from .telemetry.middleware import Observed
from .telemetry.options import QUIET, Telemetry
from .telemetry.record import RequestRecord
from .text_routes import add_text_routes
from .validation import read_body, read_json, validate

if TYPE_CHECKING:  # vLLM 0.32 pins a FastAPI of before it had telemetry
    from fastapi.telemetry import TelemetryConfig

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}
"""FastAPI's own would send queries and tracebacks wherever the environment says."""

_HEADER_SAFE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""Printable ASCII; a header holds other characters percent-encoded."""


def create_app(
    service: Service, policy: Policy = EVERYBODY, telemetry: Telemetry = QUIET
) -> FastAPI:
    """An application over a service, which is closed with it.

    policy: who is let in. telemetry: what is told of it, whose traces end with it.
    """
    metrics = Metrics(service, policy, telemetry)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)
        if telemetry.traces:
            await asyncio.to_thread(telemetry.traces.close)

    app = FastAPI(title="mergeroute", lifespan=lifespan, telemetry=_NO_TELEMETRY)
    started = int(time.time())
    _handle_errors(app)
    add_health_routes(app, service)
    add_module_routes(app, service)
    add_text_routes(app, service)
    add_native_routes(app, service)
    add_experiment_routes(app, service)
    app.add_middleware(Guard, policy=policy, limits=service.limits, routes=app.router.routes)
    add_cors(app, policy.cors_origins)
    app.add_middleware(Draining, service=service)
    app.add_middleware(
        Observed,
        metrics=metrics,
        telemetry=telemetry,
        routes=app.router.routes,
        on_end=service.finish,
    )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, await _read(request, ChatRequest, service), service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, await _read(request, CompletionRequest, service), service)

    @app.post("/v1/route")
    async def route(request: Request) -> dict[str, Any]:
        body = await _read(request, CompletionRequest, service, chat=ChatRequest)
        return await service.preview(body, context_of(request))

    @app.post("/v1/replay")
    async def replayed(request: Request) -> dict[str, Any]:
        asked = validate(await read_json(request), ReplayRequest)
        work = replay(service, live_of(service), asked.request_id, context_of(request))
        found = await _unless_disconnected(request, work)
        if request.state.account:
            request.state.account.charge(found.tokens)
        return found.document

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        entries = listing_for(request.state.caller, service.targets)
        entries += service.listed_experiments(request.state.caller)
        by_id = {entry["id"]: entry for entry in entries}  # an experiment answers for its name
        return {"object": "list", "data": [_model(entry, started) for entry in by_id.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        caller = request.state.caller
        listed = {entry["id"]: entry for entry in service.listed_experiments(caller)}
        return _model(listed.get(name) or describe_for(caller, service.targets, name), started)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": metadata.version("mergeroute")}

    @app.get("/metrics")
    async def exposition() -> Response:
        metrics.prune()
        text = await asyncio.to_thread(metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    describe_routes(app, has_keys=policy.keys is not None)
    return app


async def _read(
    request: Request,
    kind: type[GenerationBody],
    service: Service,
    *,
    chat: type[GenerationBody] | None = None,
) -> GenerationBody:
    """A body, all of it ours to understand or passed on as it is."""
    if service.relays:
        return await read_relayed(request, service)
    return await read_body(request, kind, chat=chat)


async def _answer(request: Request, body: GenerationBody, service: Service) -> Response:
    """Assign, submit, and answer whole or as a stream."""
    record: RequestRecord = request.state.record
    context = context_of(request)
    record.ask(body, context)
    plan = service.plan(body, context)
    record.enrolment = plan.enrolment
    try:
        choices = await _unless_disconnected(request, service.start(body, context, plan))
    except BaseException:
        _expose(request, service)  # what fails counts too
        raise
    assignments = list({id(c.assignment): c.assignment for c in choices}.values())
    headers = _headers(assignments) | _cold_header(choices)
    shape_kind = ChatShape if isinstance(body, ChatRequest) else CompletionShape
    shape = shape_kind(model=body.model, choices=choices, includes_usage=body.includes_usage)
    progress = [Progress(choice) for choice in choices]
    record.serve(progress)
    _expose(request, service)

    def finish() -> None:
        if request.state.account:
            request.state.account.charge(usage(progress)["total_tokens"])

    if relay := choices[0].relay:
        return await _relayed(request, relay, progress, on_end=finish, headers=headers)
    if body.stream:
        lines = server_sent_events(progress, shape, includes_usage=body.includes_usage)
        return _Stream(lines, choices, on_end=finish, headers=headers)
    try:
        await _unless_disconnected(request, collect(progress))
    finally:
        finish()
    if all(choice.top_logprobs is None for choice in choices) and body.prompt_logprobs is None:
        return JSONResponse(shape.body(progress), headers=headers)
    return await asyncio.to_thread(  # log-probabilities may be many
        lambda: JSONResponse(shape.body(progress), headers=headers)
    )


async def _relayed(
    request: Request,
    relay: Relay,
    progress: Sequence[Progress],
    *,
    on_end: Callable[[], None],
    headers: dict[str, str],
) -> Response:
    """The answer of an engine that the body is passed on to."""

    def end() -> None:
        relay.release()
        on_end()

    try:
        await _unless_disconnected(request, relay.open())
        if progress[0].choice.body.stream:
            choices = [p.choice for p in progress]
            return _Stream(relay.lines(progress), choices, on_end=end, headers=headers)
        whole = json.dumps(relay.whole(progress), ensure_ascii=False)
    except BaseException:
        end()
        raise
    end()
    return Response(whole, media_type="application/json", headers=headers)


def _expose(request: Request, service: Service) -> None:
    """Before the first byte of an answer: keep what it takes part in."""
    record: RequestRecord = request.state.record
    if service.experiments and record.enrolment:
        service.experiments.expose(record, record.enrolment, request.state.caller.name)


class _Stream(StreamingResponse):
    """Server-sent events of running choices, which end with the response however it ends."""

    def __init__(
        self,
        lines: AsyncIterator[str],
        choices: Sequence[Choice],
        *,
        on_end: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._choices = choices
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for choice in self._choices:
                choice.generation.cancel()
            self._on_end()


async def _unless_disconnected(request: Request, work: Awaitable[_Result]) -> _Result:
    """Wait for the work, and give it up, cancelling its generations, when the client is gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError("the client closed the connection", status=CLIENT_CLOSED)
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError, MergerouteError):
            await working


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def context_of(request: Request) -> Context:
    """What comes with a request beside its body."""
    return Context(request.headers, request.state.caller, request.state.request_id)


def _headers(assignments: Sequence[Assignment]) -> dict[str, str]:
    """What served the request; one value per prompt where several differ."""

    def each(value: Callable[[Assignment], str]) -> str:
        values = [value(assignment) for assignment in assignments]
        joined = values[0] if len(set(values)) == 1 else "; ".join(values)
        return quote(joined, safe=_HEADER_SAFE)

    return {
        "x-mergeroute-target": each(lambda a: a.target.name),
        "x-mergeroute-bank": each(lambda a: a.hosted.bank.digest),
        "x-mergeroute-blend": each(lambda a: blend_text(a.decision)),
        "x-mergeroute-abstained": each(lambda a: f"{a.decision.abstained:g}"),
        "x-mergeroute-router": each(lambda a: a.decision.router),
        "x-mergeroute-confidence": each(lambda a: f"{a.decision.confidence:.4f}"),
        **_experiment_headers(assignments[0]),
    }


def _experiment_headers(assignment: Assignment) -> dict[str, str]:
    """What a request takes part in; all its prompts do alike."""
    told = {}
    if enrolment := assignment.enrolment:
        told["x-mergeroute-experiment"] = enrolment.experiment
        told["x-mergeroute-variant"] = enrolment.variant
    if warning := assignment.target.warning:
        told["x-mergeroute-warnings"] = quote(warning, safe=_HEADER_SAFE)
    return told


def _cold_header(choices: Sequence[Choice]) -> dict[str, str]:
    """The modules that had to be read from disk, if any."""
    names = sorted({name for choice in choices for name in choice.cold})
    return {"x-mergeroute-cold": quote(",".join(names), safe=_HEADER_SAFE)} if names else {}


def _model(entry: dict[str, Any], created: int) -> dict[str, Any]:
    common = {"object": "model", "created": created, "owned_by": "mergeroute"}
    return {"id": entry["id"], **common, **entry}


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(MergerouteError)
    async def ours(request: Request, error: Exception) -> Response:
        status, body = describe(error)
        if status == 500:
            logger.error("request %s failed", request.state.request_id, exc_info=error)
        return JSONResponse(body, status_code=status, headers=retry_headers(status, error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(str(error), status=400), status_code=400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, status=error.status_code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        status, body = describe(error)  # uvicorn logs the traceback
        logger.error("request %s failed: %s", request.state.request_id, type(error).__name__)
        headers = {"x-request-id": request.state.request_id}
        return JSONResponse(body, status_code=status, headers=headers)
