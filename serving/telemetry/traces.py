"""OpenTelemetry spans of requests, by the conventions for generative AI. Nothing of a body is in
them but the model's name. Imported only where traces are asked for.

Spans are made when a request is over, with the times of its record: nothing is traced meanwhile.

Source: OpenTelemetry semantic conventions, gen-ai spans (status: development) and http spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from ..responses.decisions import blend_text
from .record import RequestRecord
from .request_log import escaped

_NAME = "mergeroute"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_UNTRACED = frozenset(("/health", "/live", "/ready", "/metrics"))
_NANOSECONDS = 1_000_000_000


class Traces:
    """Where spans go. processor: takes them, and is shut down by `close`."""

    def __init__(self, processor: SpanProcessor) -> None:
        named = Resource({SERVICE_NAME: _NAME, SERVICE_VERSION: version(_NAME)})
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_NAME, version(_NAME))

    def tell(self, record: RequestRecord) -> None:
        """Make the spans of a request that is over, below the client's if it has one."""
        if record.route in _UNTRACED:
            return
        clock = _Clock(record)
        span = self._tracer.start_span(
            _span_name(record),
            context=extract(record.headers),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(record)),
            start_time=clock.at(record.arrived),
        )
        if record.status >= 500 or (record.error and record.status < 400):
            span.set_status(Status(StatusCode.ERROR, record.error))
        for name, begin, end in _stages(record):
            self._child(span, name, clock.at(begin), clock.at(end))
        span.end(clock.at(record.ended))
        record.trace_id = format_trace_id(span.get_span_context().trace_id)

    def _child(self, parent: Span, name: str, begin: int, end: int) -> None:
        context = set_span_in_context(parent)
        self._tracer.start_span(name, context=context, start_time=begin).end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class _Clock:
    """From `time.perf_counter` to Unix nanoseconds."""

    def __init__(self, record: RequestRecord) -> None:
        self._offset = record.arrived_at - record.arrived

    def at(self, moment: float) -> int:
        return round((moment + self._offset) * _NANOSECONDS)


def _span_name(record: RequestRecord) -> str:
    """Of low cardinality: a model's name is in it only where it was found to exist."""
    operation = _OPERATIONS.get(record.route)
    is_found = operation and record.model and record.status < 400
    return f"{operation} {record.model}" if is_found else f"{record.method} {record.route}"


def _stages(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """What a generation went through.

    route: finding the target, the prompt's tokens, the router, and modules that had to be read.
    queue: until all choices had a slot. generate: from the first of them to the end.
    """
    if record.assigned is None:
        return
    yield "route", record.assigned, record.served or record.ended
    if not record.progress:
        return
    generations = [progress.choice.generation for progress in record.progress]
    admitted = [g.admitted_at for g in generations if g.admitted_at is not None]
    submitted = min(g.submitted_at for g in generations)
    yield "queue", submitted, max(admitted, default=record.ended)
    if admitted:
        yield "generate", min(admitted), record.ended


def _attributes(record: RequestRecord) -> Iterator[tuple[str, AttributeValue]]:
    yield "http.request.method", record.method
    yield "http.route", record.route
    yield "http.response.status_code", record.status
    yield "mergeroute.request_id", record.request_id
    if record.server:
        yield "server.address", record.server[0]
        if record.server[1] is not None:
            yield "server.port", record.server[1]
    if record.error:
        yield "error.type", record.error
    if operation := _OPERATIONS.get(record.route):
        yield "gen_ai.operation.name", operation
        yield "gen_ai.provider.name", _NAME
    if record.model is not None:
        yield "gen_ai.request.model", escaped(record.model)
    if record.conversation:
        yield "gen_ai.conversation.id", escaped(record.conversation)
    yield from _answered(record)


def _answered(record: RequestRecord) -> Iterator[tuple[str, AttributeValue]]:
    if record.progress or record.prompt_tokens:
        used = record.usage
        yield "gen_ai.usage.input_tokens", used["prompt"]
        yield "gen_ai.usage.output_tokens", used["completion"]
        yield "gen_ai.usage.cache_read.input_tokens", used["cached"]
    if record.progress:
        decision = record.assignments[0].decision
        yield "gen_ai.response.model", record.bank or ""
        yield "gen_ai.response.finish_reasons", record.finish_reasons
        yield "mergeroute.blend", blend_text(decision)
        yield "mergeroute.router", decision.router
        yield "mergeroute.confidence", decision.confidence
        yield "mergeroute.routing_milliseconds", decision.milliseconds
        yield "mergeroute.cold", record.cold
    if record.first_token is not None:
        yield "mergeroute.time_to_first_token", record.first_token - record.arrived
