"""Prometheus metrics of a service. Labels are of what there is: never what a client wrote."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from ..access.callers import ANYBODY
from ..access.guard import Policy
from ..assigning import Assignment
from ..service import Service
from .catalogue import PREFIX, RECORDED
from .labels import Names
from .options import QUIET, Telemetry
from .readings import Readings
from .record import RequestRecord
from .vllm_metrics import VllmMetrics


class Metrics:
    """The metrics of one app, in a registry of their own. Of one thread, but for `text`."""

    def __init__(self, service: Service, policy: Policy, telemetry: Telemetry = QUIET) -> None:
        self._service = service
        self._policy = policy
        self._registry = registry = CollectorRegistry()
        registry.register(Readings(service))
        self._counters = {
            spec.name: Counter(PREFIX + spec.name, spec.text, spec.labels, registry=registry)
            for spec in RECORDED
            if spec.kind == "counter"
        }
        self._histograms = {
            spec.name: Histogram(
                PREFIX + spec.name, spec.text, spec.labels, buckets=spec.buckets, registry=registry
            )
            for spec in RECORDED
            if spec.kind == "histogram"
        }
        if telemetry.metrics_compat == "vllm":
            registry.register(VllmMetrics(service, self._histograms, self._counters["choices"]))
        self._begin_at_zero()
        counters = self._counters
        by_module = [counters["module_weight"], counters["module_hits"]]
        by_key = [counters["key_requests"], counters["key_tokens"]]
        self._variants = Names([counters["exposures"]], self._known_variants)
        self._modules = Names(by_module, self._served_modules)
        self._keys = Names(by_key, self._valid_keys)

    def _begin_at_zero(self) -> None:
        """A rate needs a series before its first event."""
        for spec in RECORDED:
            if spec.labels == ("bank",):
                metric = (self._counters | self._histograms)[spec.name]
                for host in self._service.hosted:
                    metric.labels(host.bank.name)

    def text(self) -> bytes:
        """The exposition format. Any thread."""
        return generate_latest(self._registry)

    def prune(self) -> None:
        """Drop the series of modules and keys that have gone."""
        self._modules.prune()
        self._keys.prune()
        self._variants.prune()

    def count(self, record: RequestRecord) -> None:
        """A request is over."""
        counters = self._counters
        counters["requests"].labels(record.route, str(record.status)).inc()
        if record.error:
            counters["refused_requests"].labels(record.error).inc()
        if record.enrolment and record.enrolment.is_exposed:
            told = self._variants.of(record.enrolment.experiment, record.enrolment.variant)
            counters["exposures"].labels(*told).inc()
        if not record.key:
            return
        key, used = self._keys.of(record.key), record.usage
        counters["key_requests"].labels(*key).inc()
        counters["key_tokens"].labels(*key).inc(used["prompt"] + used["completion"])
        if record.bank is not None:
            self._count_answer(record, record.bank, used)

    def _count_answer(self, record: RequestRecord, bank: str, used: dict[str, int]) -> None:
        for kind in ("prompt", "cached", "completion"):
            self._counters[f"{kind}_tokens"].labels(bank).inc(used[kind])
        for assignment in record.assignments:
            self._count_decision(assignment, bank)
        for reason in record.finish_reasons:
            self._counters["choices"].labels(bank, reason).inc()
        self._time(record, bank)

    def _count_decision(self, assignment: Assignment, bank: str) -> None:
        decision, counters = assignment.decision, self._counters
        counters["decisions"].labels(bank, decision.router).inc()
        counters["abstained"].labels(bank).inc(decision.abstained)
        is_routed = assignment.target.blend is None and decision.router != "none"
        if is_routed and not decision.blend and not decision.token_routing:
            counters["abstentions"].labels(bank).inc()
        self._histograms["routing_seconds"].labels(bank).observe(decision.milliseconds / 1000)
        self._histograms["blend_modules"].labels(bank).observe(len(decision.blend))
        for module, weight in decision.blend.items():
            labels = self._modules.of(bank, module)
            counters["module_weight"].labels(*labels).inc(abs(weight))
            counters["module_hits"].labels(*labels).inc()

    def _time(self, record: RequestRecord, bank: str) -> None:
        timed = {name: histogram.labels(bank) for name, histogram in self._histograms.items()}
        timed["request_seconds"].observe(record.ended - record.arrived)
        if record.first_token is not None:
            timed["time_to_first_token_seconds"].observe(record.first_token - record.arrived)
        for seconds in record.queued:
            timed["queue_seconds"].observe(seconds)
        gaps = timed["inter_token_seconds"]
        for progress in record.progress:
            for before, after in zip(progress.arrivals, progress.arrivals[1:], strict=False):
                gaps.observe(after - before)

    def _served_modules(self) -> Collection[tuple[str, str]]:
        return {(host.bank.name, name) for host in self._service.hosted for name in host.digests}

    def _known_variants(self) -> Collection[tuple[str, str]]:
        live = self._service.experiments
        found = live.snapshot.experiments if live else ()
        return {(e.experiment.name, variant) for e in found for variant in e.experiment.weights}

    def _valid_keys(self) -> Collection[tuple[str]]:
        keys = self._policy.keys
        return {(ANYBODY.name,), *((key.name,) for key in (keys.keys if keys else ()))}
