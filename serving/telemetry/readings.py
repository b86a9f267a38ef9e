"""Counters and load of engines and their modules, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ...adapters.errors import UnknownModuleError
from ...runtime.residency import Residency
from ...runtime.resident_set import ResidentInfo
from ..hosted import HostedBank
from ..service import Service
from .catalogue import (
    COLD_LOADS,
    ENGINE,
    EXPERIMENTS,
    FEEDBACK,
    MODULE_RESIDENT,
    PAUSES,
    PREFIX,
    REPLICAS,
    RESIDENCY,
    SHADOWS,
    Spec,
)
from .labels import MOST, OTHER

if TYPE_CHECKING:
    from ..experiments.live import LiveExperiments

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class Readings(Collector):
    """The state of a service's engines and modules."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, with a value per backbone or module."""
        hosts = residencies(self._service)
        yield from _families(ENGINE, {name: r.engine.stats() for name, r in hosts.items()})
        kept = {name: residency.stats() for name, residency in hosts.items()}
        yield from _families(RESIDENCY, kept)
        loads = SummaryMetricFamily(
            PREFIX + COLD_LOADS.name, COLD_LOADS.text, labels=COLD_LOADS.labels
        )
        for backbone, stats in kept.items():
            loads.add_metric([backbone], stats.cold_loads, stats.cold_load_s)
        yield loads
        yield self._modules()
        yield from self._replicas()
        if self._service.experiments:
            yield from _of_experiments(self._service.experiments)

    def _replicas(self) -> Iterator[Metric]:
        """Of the servers of vLLM, where there are any."""
        engines = {h.bank.backbone.name: h.upstream for h in self._service.hosted if h.upstream}
        for field, spec in REPLICAS.items():
            family = _FAMILIES[spec.kind](PREFIX + spec.name, spec.text, labels=spec.labels)
            for backbone, engine in engines.items():
                for state in engine.states():
                    family.add_metric([backbone, state.name], getattr(state, field))
            yield family

    def _modules(self) -> GaugeMetricFamily:
        """Those in memory and those used last have series of their own."""
        spec = MODULE_RESIDENT
        family = GaugeMetricFamily(PREFIX + spec.name, spec.text, labels=spec.labels)
        found = [
            (info.is_resident, info.last_used, bank, name)
            for bank, name, info in _infos(self._service.hosted)
        ]
        found.sort(key=lambda one: (not one[0], -one[1]))
        for is_resident, _, bank, name in found[:MOST]:
            family.add_metric([bank, name], is_resident)
        rest: dict[str, int] = {}
        for is_resident, _, bank, _ in found[MOST:]:
            rest[bank] = rest.get(bank, 0) + is_resident
        for bank, count in rest.items():
            family.add_metric([bank, OTHER], count)
        return family


def _of_experiments(live: LiveExperiments) -> Iterator[Metric]:
    status = live.status()
    told = {**status, "database_up": int(status["database"] == "up")}
    for key, spec in EXPERIMENTS.items():
        yield _family(spec, {(): told[key]})
    feedback = dict(live.feedback_counts)  # it grows meanwhile
    yield _family(FEEDBACK, {(e, metric): n for (e, metric), n in feedback.items()})
    yield _family(PAUSES, {(name,): count for name, count in live.pauses.items()})
    shadows = dict(live.shadow_counts)
    yield _family(SHADOWS, {(e, result): n for (e, result), n in shadows.items()})


def _family(spec: Spec, values: Mapping[tuple[str, ...], float]) -> Metric:
    family: Metric = _FAMILIES[spec.kind](PREFIX + spec.name, spec.text, labels=spec.labels)
    for labels, value in dict(values).items():
        family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family


def residencies(service: Service) -> dict[str, Residency]:
    """What keeps the modules of each backbone, by its name."""
    by_id: dict[int, HostedBank] = {id(h.residency): h for h in reversed(service.hosted)}
    return {host.bank.backbone.name: host.residency for host in reversed(by_id.values())}


def _infos(hosted: Sequence[HostedBank]) -> Iterator[tuple[str, str, ResidentInfo]]:
    for host in hosted:
        for name, digest in host.digests.items():
            with suppress(UnknownModuleError):  # it is being taken away
                yield host.bank.name, name, host.residency.info(digest)


def _families(specs: Mapping[str, Spec], stats: Mapping[str, object]) -> Iterator[Metric]:
    for field, spec in specs.items():
        family = _FAMILIES[spec.kind](PREFIX + spec.name, spec.text, labels=spec.labels)
        for backbone, values in stats.items():
            if (value := getattr(values, field)) is not None:
                family.add_metric([backbone], value)
        yield family
