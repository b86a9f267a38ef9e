"""The routes of experiments and of feedback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ..errors import ApiError
from ..schemas.body import Body
from ..service import Service
from ..validation import read_json, validate
from . import lifecycle
from .definition import Experiment
from .experiment_store import Experiments, StoredExperiment
from .feedback import IDEMPOTENCY_HEADER, give
from .lifecycle import Author
from .live import LiveExperiments
from .results import results
from .schemas import ChangeRequest, FeedbackRequest, PromoteRequest, RampRequest

_PATH = "/v1/experiments/{name}"
MAX_POINTS = 200
MAX_VERSION = 2**31 - 1
_Kind = TypeVar("_Kind", bound=Body)
_Change = Callable[[Experiments], StoredExperiment]


def add_experiment_routes(app: FastAPI, service: Service) -> None:
    """Let clients of an application experiment."""
    _add_reading(app, service)
    _add_changing(app, service)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> dict[str, Any]:
        live = live_of(service)
        body = validate(await read_json(request), FeedbackRequest)
        key = request.headers.get(IDEMPOTENCY_HEADER)
        return await give(live, body, request.state.caller, key)


def _add_reading(app: FastAPI, service: Service) -> None:
    @app.get("/v1/experiments")
    async def listed() -> dict[str, Any]:
        live = live_of(service)
        stored = await live.ask(live.store.list)
        return {"object": "list", "data": [document_of(each) for each in stored]}

    @app.get(_PATH)
    async def shown(name: str) -> Response:
        live = live_of(service)
        return _answer(await live.ask(lambda: live.store.get(name)))

    @app.get(_PATH + "/versions")
    async def versions(name: str) -> dict[str, Any]:
        live = live_of(service)
        stored = await live.ask(lambda: live.store.history(name))
        return {"object": "list", "data": [document_of(each) for each in stored]}

    @app.get(_PATH + "/results")
    async def judged(name: str, request: Request) -> dict[str, Any]:
        points = _number(request, "points", most=MAX_POINTS)
        since = _number(request, "version_from", most=MAX_VERSION)
        live = live_of(service)
        return await live.ask(
            lambda: results(live.store, name, points=points, version_from=since or None)
        )


def _add_changing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/experiments", status_code=201)
    async def created(request: Request) -> Response:
        document = validate(await read_json(request), Experiment)
        author = Author(request.state.caller.name)
        return await _changed(
            service, lambda e: lifecycle.create(e, document, service.targets, author), status=201
        )

    @app.post(_PATH + "/start")
    async def started(name: str, request: Request) -> Response:
        author = _author(request, await _read(request, ChangeRequest))
        return await _changed(service, lambda e: lifecycle.start(e, name, service.targets, author))

    @app.post(_PATH + "/pause")
    async def paused(name: str, request: Request) -> Response:
        author = _author(request, await _read(request, ChangeRequest))
        return await _changed(service, lambda e: lifecycle.pause(e, name, author))

    @app.post(_PATH + "/conclude")
    async def concluded(name: str, request: Request) -> Response:
        author = _author(request, await _read(request, ChangeRequest))
        return await _changed(service, lambda e: lifecycle.conclude(e, name, author))

    @app.post(_PATH + "/promote")
    async def promoted(name: str, request: Request) -> Response:
        body = await _read(request, PromoteRequest)
        author = _author(request, body)
        return await _changed(
            service,
            lambda e: lifecycle.promote(e, name, body.variant, service.targets, author),
        )

    @app.post(_PATH + "/rollback")
    async def rolled_back(name: str, request: Request) -> Response:
        author = _author(request, await _read(request, ChangeRequest))
        return await _changed(service, lambda e: lifecycle.rollback(e, name, author))

    @app.patch(_PATH)
    async def ramped(name: str, request: Request) -> Response:
        body = await _read(request, RampRequest)
        author = _author(request, body)
        if author.etag is None:
            raise ApiError(
                "If-Match is missing: send the ETag of the experiment that you looked at",
                status=428,
                param="If-Match",
                code="if_match_required",
            )
        return await _changed(
            service,
            lambda e: lifecycle.ramp(e, name, author, weights=body.weights, traffic=body.traffic),
        )

    @app.delete(_PATH, status_code=204)
    async def deleted(name: str, request: Request) -> Response:
        live, author = live_of(service), _author(request)

        def change() -> None:
            with live.changing() as experiments:
                lifecycle.delete(experiments, name, author)

        await live.ask(change)
        return Response(status_code=204)


def document_of(stored: StoredExperiment) -> dict[str, Any]:
    """An experiment as it is told of."""
    allocation = stored.allocation
    return {
        "object": "experiment",
        **stored.document.model_dump(mode="json"),
        "state": stored.state,
        "version": stored.version,
        "promoted": stored.promoted,
        "buckets": allocation.as_lists() if allocation else None,
        "layer_buckets": [list(each) for each in stored.ranges],
        "created_at": stored.created_at,
        "changed_at": stored.changed_at,
        "changed_by": stored.changed_by,
        "reason": stored.reason,
    }


async def _changed(service: Service, change: _Change, *, status: int = 200) -> Response:
    """Make a change; it waits for the database."""
    live = live_of(service)

    def make() -> StoredExperiment:
        with live.changing() as experiments:
            return change(experiments)

    return _answer(await live.ask(make), status=status)


def _answer(stored: StoredExperiment, *, status: int = 200) -> Response:
    return JSONResponse(document_of(stored), status_code=status, headers={"ETag": stored.etag})


def live_of(service: Service) -> LiveExperiments:
    """The experiments of a server.

    Raises:
        ApiError: it can have none.
    """
    if service.experiments is None:
        raise ApiError(
            "this server keeps no experiments, since it has no state folder: start it with "
            "--state DIR",
            status=403,
            code="no_experiments",
        )
    return service.experiments


async def _read(request: Request, kind: type[_Kind]) -> _Kind:
    """The body; one that is left out says nothing."""
    is_given = request.headers.get("content-length", "0") != "0" or (
        "transfer-encoding" in request.headers
    )
    return validate(await read_json(request) if is_given else {}, kind)


def _author(request: Request, body: ChangeRequest | None = None) -> Author:
    etags = request.headers.getlist("if-match")
    return Author(
        request.state.caller.name,
        body.reason if body else "",
        ",".join(etags) if etags else None,
    )


def _number(request: Request, name: str, *, most: int) -> int:
    """A whole number of the query; 0 where it is left out."""
    given = request.query_params.get(name, "0")
    if not (given.isascii() and given.isdigit() and len(given) < 20 and int(given) <= most):
        raise ApiError(
            f"{name} is {given[:60]!r}, it must be a whole number from 0 to {most}", param=name
        )
    return int(given)
