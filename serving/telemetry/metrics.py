"""Prometheus metrics of a service. Labels are banks, modules, routes and status codes alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..hosting import HostedBank
from ..responses import Progress
from ..service import Assignment

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_COUNTERS = {
    "steps": "Forward passes",
    "prompt_tokens": "Tokens of prompts that were admitted",
    "reused_tokens": "Prompt tokens whose keys and values were reused",
    "generated_tokens": "Tokens generated",
}
_GAUGES = {
    "running": "Requests in the batch",
    "waiting": "Requests that wait for a slot",
    "modules": "Modules that are resident",
}


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self, hosted: Sequence[HostedBank]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Engines(hosted))
        self.requests = Counter(
            "mergeroute_requests",
            "Answers by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.decisions = Counter(
            "mergeroute_decisions",
            "Prompts by bank and router",
            ["bank", "router"],
            registry=registry,
        )
        self.weights = Counter(
            "mergeroute_module_weight",
            "Weight that blends gave to modules, in absolute value",
            ["bank", "module"],
            registry=registry,
        )
        self.abstained = Counter(
            "mergeroute_abstained",
            "Weight that stayed on the backbone",
            ["bank"],
            registry=registry,
        )
        self.routing = Histogram(
            "mergeroute_routing_seconds",
            "Time to route",
            ["bank"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "mergeroute_time_to_first_token_seconds",
            "From the request's arrival",
            ["bank"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "mergeroute_request_seconds",
            "From the request's arrival to its last token",
            ["bank"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.finished = Counter(
            "mergeroute_choices", "Choices by finish reason", ["bank", "reason"], registry=registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def decided(self, assignments: Sequence[Assignment]) -> None:
        """Count what prompts were assigned to."""
        for assignment in assignments:
            bank, decision = assignment.hosted.bank.name, assignment.decision
            self.decisions.labels(bank, decision.router).inc()
            self.abstained.labels(bank).inc(decision.abstained)
            self.routing.labels(bank).observe(decision.milliseconds / 1000)
            for module, weight in decision.blend.items():
                self.weights.labels(bank, module).inc(abs(weight))


@dataclass
class Stopwatch:
    """Times one request from its arrival, and tells the metrics."""

    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)

    def finish(self, progress: Sequence[Progress]) -> None:
        """The answer is whole, or failed, or its reader is gone."""
        bank = progress[0].choice.assignment.hosted.bank.name
        self.metrics.latency.labels(bank).observe(time.perf_counter() - self.started)
        firsts = [p.first_token_at for p in progress if p.first_token_at is not None]
        if firsts:
            self.metrics.first_token.labels(bank).observe(min(firsts) - self.started)
        for choice in progress:
            self.metrics.finished.labels(bank, choice.finish_reason or "cancelled").inc()


class _Engines(Collector):
    """Counters and load of the engines, read when asked for."""

    def __init__(self, hosted: Sequence[HostedBank]) -> None:
        by_engine = {id(h.engine): h for h in reversed(hosted)}
        self._engines = {h.bank.backbone.name: h.engine for h in by_engine.values()}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for field_name, text in names.items():
                family = kind(f"mergeroute_engine_{field_name}", text, labels=["backbone"])
                for backbone, values in stats.items():
                    family.add_metric([backbone], getattr(values, field_name))
                yield family
