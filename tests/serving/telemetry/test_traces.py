from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from mergeroute.adapters.bank import Bank
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service
from mergeroute.serving.settings_file import read_settings

from ..conftest import running
from .conftest import SECRET, Watched, eventually

_SERVING = Path(__file__).parents[3] / "serving"
_TRACE, _PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def traced(watched: Watched, **asked: object) -> tuple[httpx.Response, dict[str, ReadableSpan]]:
    """A request, and its spans by name."""
    watched.spans.clear()
    headers = {"traceparent": f"00-{_TRACE}-{_PARENT}-01", "x-session-id": "conv-1"}
    response = watched.chat(headers, **asked)
    spans = eventually(
        lambda: [
            span for span in watched.spans.get_finished_spans() if span.kind is SpanKind.SERVER
        ]
    )
    assert len(spans) == 1
    return response, {span.name: span for span in watched.spans.get_finished_spans()}


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_a_request_is_a_span_with_its_stages_below_the_clients(watched: Watched) -> None:
    response, spans = traced(watched)
    assert spans.keys() == {"chat auto", "route", "queue", "generate"}
    server = spans["chat auto"]
    assert format_trace_id(server.context.trace_id) == _TRACE
    assert server.parent is not None
    assert format_span_id(server.parent.span_id) == _PARENT
    usage = response.json()["usage"]
    found = attributes(server)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "mergeroute"
    assert found["gen_ai.request.model"] == "auto"
    assert found["gen_ai.response.model"] == "zoo"
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert found["gen_ai.conversation.id"] == "conv-1"
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert found["mergeroute.request_id"] == response.headers["x-request-id"]
    assert found["server.address"] == "127.0.0.1"
    assert found["server.port"] == int(watched.url.rpartition(":")[2])
    assert "error.type" not in found
    for name in ("route", "queue", "generate"):
        child = spans[name]
        assert child.parent is not None
        assert child.parent.span_id == server.context.span_id
        assert _times(server)[0] <= _times(child)[0] <= _times(child)[1] <= _times(server)[1]
    assert _times(spans["queue"])[1] == _times(spans["generate"])[0]


def _times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_an_error_is_named_and_its_model_is_no_span_name(watched: Watched) -> None:
    _, spans = traced(watched, model="nothing")
    assert spans.keys() == {"POST /v1/chat/completions", "route"}
    span = spans["POST /v1/chat/completions"]
    assert attributes(span)["error.type"] == "model_not_found"
    assert attributes(span)["http.response.status_code"] == 404
    assert span.status.status_code is StatusCode.UNSET  # the client's fault


def test_embeddings_are_told_of_too(watched: Watched) -> None:
    watched.spans.clear()
    watched.post("/v1/embeddings", {"model": "tiny", "input": "abc"})
    [span] = eventually(watched.spans.get_finished_spans)
    assert span.name == "embeddings tiny"
    assert attributes(span)["gen_ai.usage.input_tokens"]


def test_no_text_is_in_a_span(watched: Watched) -> None:
    response, spans = traced(watched)
    said = response.json()["choices"][0]["message"]["content"]
    told = " ".join(span.to_json() for span in spans.values())
    assert SECRET not in told
    assert said not in told


def test_nothing_is_imported_where_traces_are_off() -> None:
    """Only two files import OpenTelemetry, and no other one imports these but in a function.
    FastAPI imports the API on its own.
    """
    sources = {path: path.read_text() for path in _SERVING.rglob("*.py")}
    importing = [path.name for path, text in sources.items() if "from opentelemetry" in text]
    assert sorted(importing) == ["exporting.py", "traces.py"]
    unguarded = re.compile(r"^from \.[\w.]* import .*\b(Traces|open_traces)\b", re.MULTILINE)
    found = [path.name for path, text in sources.items() if unguarded.search(text)]
    assert found == ["exporting.py"]
    script = (
        "import sys; from mergeroute.serving.settings_file import read_settings;"
        "read_settings(None, {'banks': ('x',)}).telemetry;"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector of OTLP over HTTP."""
    got: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join()


def test_spans_reach_a_collector(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (endpoint, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "zoo-server")
        settings = read_settings(None, {"banks": ("zoo",), "otel": True})
        service = Service(host_banks([bank], Placement(dtype="float32")))
        with running(service, telemetry=settings.telemetry) as url:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    [request] = got  # sent as the server stopped
    [resource] = request.resource_spans
    named = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert named["service.name"] == "zoo-server"
    spans = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(spans) == ["generate", "queue", "route", "text_completion tiny"]
