"""vLLM's metrics that gateways and dashboards read, from the same counts as ours.

Source: vLLM, vllm/v1/metrics/loggers.py; the gateway API's inference extension reads
`vllm:num_requests_waiting`, `vllm:kv_cache_usage_perc` and `vllm:lora_requests_info`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ...runtime.engine import EngineStats
from ...runtime.residency import Residency
from ...runtime.resident_set import ResidencyStats
from ..service import Service
from .readings import residencies

_LABELS = ("model_name", "engine")
_ENGINE = "0"
_COUNTERS = {
    "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache", "prompt_tokens"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache", "reused_tokens"),
    "prompt_tokens": ("Prompt tokens processed", "prompt_tokens"),
    "generation_tokens": ("Tokens generated", "generated_tokens"),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("To the first token", "time_to_first_token_seconds"),
    "inter_token_latency_seconds": ("Between two tokens", "inter_token_seconds"),
    "e2e_request_latency_seconds": ("To the end of the answer", "request_seconds"),
    "request_queue_time_seconds": ("In the queue", "queue_seconds"),
}
_REASONS = {"cancelled": "abort", "timeout": "abort"}


class VllmMetrics(Collector):
    """A translation, read when asked for. model_name is the backbone's.

    histograms: ours by name. choices: our counter by bank and finish reason.
    """

    def __init__(
        self, service: Service, histograms: Mapping[str, Histogram], choices: Counter
    ) -> None:
        self._service = service
        self._histograms = histograms
        self._choices = choices

    def describe(self) -> list[Metric]:
        """Nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        hosts = residencies(self._service)
        stats = {name: (r.engine.stats(), r.stats()) for name, r in hosts.items()}
        yield from _gauges(stats)
        for name, (text, field) in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            for backbone, (engine, _) in stats.items():
                family.add_metric([backbone, _ENGINE], getattr(engine, field))
            yield family
        backbones = {h.bank.name: h.bank.backbone.name for h in self._service.hosted}
        yield self._successes(backbones)
        for name, (text, ours) in _HISTOGRAMS.items():
            yield _summed(f"vllm:{name}", text, self._histograms[ours], backbones)
        yield self._lora_info(hosts)

    def _successes(self, backbones: Mapping[str, str]) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that ended", labels=(*_LABELS, "finished_reason")
        )
        counts: defaultdict[tuple[str, str], float] = defaultdict(float)
        for sample in _samples(self._choices, "_total"):
            reason = sample.labels["reason"]
            key = backbones[sample.labels["bank"]], _REASONS.get(reason, reason)
            counts[key] += sample.value
        for (backbone, reason), count in counts.items():
            family.add_metric([backbone, _ENGINE, reason], count)
        return family

    def _lora_info(self, hosts: Mapping[str, Residency]) -> Metric:
        """A series per backbone with what runs and waits now; its value is the time."""
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Modules of running and waiting requests", labels=labels
        )
        names = {d: name for h in self._service.hosted for name, d in h.digests.items()}
        for residency in hosts.values():
            running, waiting = residency.engine.modules_asked()
            stats = residency.stats()
            shown = [
                ",".join(sorted(names[d] for d in digests if d in names))
                for digests in (running, waiting | stats.awaited)
            ]
            family.add_metric([str(_most_modules(stats)), *shown], time.time())
        return family


def _gauges(stats: Mapping[str, tuple[EngineStats, ResidencyStats]]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "vllm:num_requests_running", "Requests in the batch", labels=_LABELS
    )
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting", "Requests that wait for a slot or a module", labels=_LABELS
    )
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "Share of the slots that is in use, 0 to 1", labels=_LABELS
    )
    for backbone, (engine, modules) in stats.items():
        labels = [backbone, _ENGINE]
        running.add_metric(labels, engine.running)
        waiting.add_metric(labels, engine.waiting + modules.waiting)
        usage.add_metric(labels, engine.running / engine.slots)
    yield from (running, waiting, usage)


def _most_modules(stats: ResidencyStats) -> int:
    """How many modules fit into memory, reckoned from those that are there."""
    if stats.budget is None or not stats.bytes:
        return stats.registered
    return max(stats.resident, stats.budget * stats.resident // stats.bytes)


def _summed(
    name: str, text: str, ours: Histogram, backbones: Mapping[str, str]
) -> HistogramMetricFamily:
    """A histogram by bank as one by backbone."""
    buckets: dict[str, dict[str, float]] = {}
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in _samples(ours, "_bucket"):
        backbone = backbones[sample.labels["bank"]]
        counts = buckets.setdefault(backbone, defaultdict(float))
        counts[sample.labels["le"]] += sample.value
    for sample in _samples(ours, "_sum"):
        sums[backbones[sample.labels["bank"]]] += sample.value
    family = HistogramMetricFamily(name, text, labels=_LABELS)
    for backbone, counts in buckets.items():
        ordered = sorted(counts.items(), key=lambda item: float(item[0]))
        family.add_metric([backbone, _ENGINE], ordered, sums[backbone])
    return family


def _samples(metric: Counter | Histogram, suffix: str) -> Iterator[Sample]:
    for family in metric.collect():
        yield from (sample for sample in family.samples if sample.name.endswith(suffix))
