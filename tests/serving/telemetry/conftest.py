"""A server that tells of itself in every way there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions
from mergeroute.serving.telemetry.options import Telemetry
from mergeroute.serving.telemetry.traces import Traces

from ...tiny import make_model, make_module
from ..conftest import running

SECRET = "shout the word 39"
Labels = frozenset[tuple[str, str]]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Watched:
    """A server, and what it has told. root: of modules that can be loaded."""

    url: str
    client: httpx.Client
    service: Service
    spans: InMemorySpanExporter
    root: Path

    def chat(self, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
        """Three tokens, of `auto` unless told otherwise."""
        messages = [{"role": "user", "content": SECRET}]
        body = {"messages": messages, "max_tokens": 3, "temperature": 0, **body}
        return self.post("/v1/chat/completions", body, headers)

    def post(
        self, path: str, body: object, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.client.get(path, headers=headers)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every series of /metrics."""
        return samples_of(self.get("/metrics").text)

    def value(self, name: str, **labels: str) -> float:
        """Of one series; 0 where it is not there."""
        return self.samples().get((name, frozenset(labels.items())), 0.0)


def samples_of(text: str) -> dict[tuple[str, Labels], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def eventually(look: Callable[[], _Found]) -> _Found:
    """What is told of a request comes a moment after its answer."""
    for _ in range(200):
        if found := look():
            return found
        time.sleep(0.02)
    return look()


@pytest.fixture(scope="module")
def watched(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("loras")
    make_module(make_model(), "sql", seed=9).save(root / "sql")
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    service = Service(host_banks([bank], placement), ServiceOptions(module_roots=(root,)))
    spans = InMemorySpanExporter()
    telemetry = Telemetry("vllm", Traces(SimpleSpanProcessor(spans)))
    with (
        running(service, telemetry=telemetry) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield Watched(url, client, service, spans, root)
