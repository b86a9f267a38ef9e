"""Whether an experiment's statistics keep their promises, by simulation with clustered users.

Users differ in how much they ask and in how they score; the totals of each user are what the
statistics see. What is judged is what the server calls. Exit status 1 when looking early finds more
than 5 % in experiments without a difference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mergeroute.serving.experiments.statistics.effect import Effect, effect
from mergeroute.serving.experiments.statistics.guardrail import guardrail
from mergeroute.serving.experiments.statistics.power import (
    Design,
    deviation_of,
    minimum_detectable_effect,
    units_needed,
)
from mergeroute.serving.experiments.statistics.srm import sample_ratio
from mergeroute.serving.experiments.statistics.units import Sums
from mergeroute.serving.experiments.statistics.verdict import Metric, judge
from mergeroute.serving.experiments.statistics.verdict import Table as Measured

from .experiment_worlds import (
    BINARY,
    LOOKS,
    RARE,
    SCORE,
    Array,
    World,
    arrivals,
    one_side,
    returning,
    thirds,
    true_rate,
)
from .machine import describe_machine

ALPHA = 0.05


@dataclass(frozen=True)
class FalsePositives:
    """Percent of A/A experiments with a difference at any look."""

    metric: str
    users: str
    experiments: int
    looks: int
    always_valid: float
    always_valid_lift: float
    fixed_at_every_look: float
    requests_at_every_look: float
    fixed_at_the_last: float


@dataclass(frozen=True)
class Verdicts:
    """Percent of A/A experiments whose verdict names a winner at any look. adjusted: with an
    adjusted p-value of alpha or less on any metric.
    """

    variants: int
    metrics: int
    users: int
    experiments: int
    looks: int
    winner: float
    adjusted: float


@dataclass(frozen=True)
class Coverage:
    """Percent of experiments whose 95 % interval holds the truth, at one look.

    always_valid: of those with one (100 effective units); None without. width_kept: by CUPED.
    """

    metric: str
    users_a_variant: int
    cuped: bool
    fixed: float | None
    fixed_lift: float | None
    always_valid: float | None
    always_valid_lift: float | None
    requests: float | None
    width_kept: float | None


@dataclass(frozen=True)
class SampleRatios:
    """Percent of splits at which the alarm goes."""

    leak: str
    units: int
    looks: int
    alarms: float


@dataclass(frozen=True)
class Power:
    """Percent found of an effect that the calculator says is found in 80 %, at its units."""

    metric: str
    method: str
    effect: float
    units: int
    found: float
    mean_units_when_found: float


@dataclass(frozen=True)
class Guardrails:
    """Percent of experiments that the guardrail pauses at some look."""

    worsening: float
    allowed: float
    units: int
    paused: float
    median_units_at_pause: float | None


def by_requests(world: World, control: Sums, variant: Sums) -> bool:
    """Whether a test that takes requests for independent finds a difference."""
    if min(control.x, variant.x) == 0:
        return False
    error = np.sqrt(world.request_variance() * (1 / control.x + 1 / variant.x))
    return bool(abs(variant.y / variant.x - control.y / control.x) > 1.96 * error)


def excludes(interval: Any, value: float) -> bool:
    """Whether there is an interval, without the value."""
    return interval is not None and not interval.low <= value <= interval.high


def false_positives(experiments: int) -> Iterator[FalsePositives]:
    """A/A experiments, with a look after every batch."""
    regimes: tuple[tuple[str, Callable[..., Iterator[tuple[Sums, Sums]]], int], ...] = (
        ("come once", arrivals, 5_000),
        ("come once, CUPED", partial(arrivals, cuped=True), 5_000),
        ("return", returning, 1_000),
    )
    for world in (BINARY, RARE, SCORE):
        for users, simulate, count in regimes:
            random = np.random.default_rng(1)
            hits = np.zeros(5)
            for _ in range(experiments):
                hits += looked_at(world, simulate(world, count, random))
            yield FalsePositives(
                world.name, users, experiments, LOOKS, *map(float, 100 * hits / experiments)
            )


def looked_at(world: World, looks: Iterator[tuple[Sums, Sums]]) -> Array:
    """[5] what was found at any look, in the order of FalsePositives; at the last, the last."""
    rows = []
    for control, variant in looks:
        seen = effect(control, variant, kind=world.kind, alpha=ALPHA)
        always = seen.always_valid
        fixed = seen.p_value is not None and seen.p_value <= ALPHA
        rows.append(
            (
                always is not None and always.p_value <= ALPHA,
                always is not None and excludes(always.lift_interval, 0.0),
                fixed,
                by_requests(world, control, variant),
                fixed,
            )
        )
    found = np.array(rows, dtype=np.float64)
    return np.append(found[:, :4].max(axis=0), found[-1, 4])


def verdicts(experiments: int) -> Iterator[Verdicts]:
    """A/A experiments of three variants, judged by three metrics after every batch."""
    users, random = 7_500, np.random.default_rng(7)
    hits = np.zeros(2)
    for _ in range(experiments):
        hits += judged_at(thirds(users, random))
    yield Verdicts(3, 3, users, experiments, LOOKS, *map(float, 100 * hits / experiments))


def judged_at(looks: Iterator[Measured]) -> Array:
    """[2] what was found at any look, in the order of Verdicts."""
    metrics = [Metric(world.name, world.kind, "up") for world in (SCORE, BINARY, RARE)]
    found = np.zeros(2)
    for measured in looks:
        units = {name: sums.n for name, sums in measured[SCORE.name].items()}
        ratio = sample_ratio(units, dict.fromkeys(units, 1))
        verdict = judge(metrics, measured, control="a", sample_ratio=ratio, alpha=ALPHA)
        arms = [arm for each in verdict.arms.values() for arm in each.values()]
        least = min(1.0 if arm.adjusted_p_value is None else arm.adjusted_p_value for arm in arms)
        found = np.maximum(found, [verdict.winner is not None, least <= ALPHA])
    return found


def coverage(experiments: int) -> Iterator[Coverage]:
    """Intervals of a true difference, users as units, with and without a pre-period."""
    for world, change in ((BINARY, 0.03), (SCORE, 0.1)):
        for count in (100, 300, 2_000):
            random = np.random.default_rng(2)
            found: dict[bool, list[Array]] = {False: [], True: []}
            for _ in range(experiments):
                sides = [one_side(world, count, random, move) for move in (0.0, change)]
                for cuped in found:
                    sums = [Sums.of(y, x, z if cuped else None) for y, x, z in sides]
                    found[cuped].append(covered(world, sums[0], sums[1], change))
            plain = np.mean(found[False], axis=0)
            for cuped, rows in found.items():
                row = np.array(rows)
                figures = [share(column) for column in row[:, :5].T]
                figures.append(100 * float(row[:, 5].mean() / plain[5]))
                yield Coverage(world.name, count, cuped, *figures)


def share(held: Array) -> float | None:
    """In percent, of those that can tell."""
    known = held[~np.isnan(held)]
    return 100 * float(known.mean()) if len(known) else None


def covered(world: World, control: Sums, variant: Sums, change: float) -> Array:
    """[6] what holds the truth, in the order of Coverage, and the standard error."""
    seen = effect(control, variant, kind=world.kind, alpha=ALPHA)
    lift = change / true_rate(world)
    always = seen.always_valid
    shift = Sums(n=variant.n, x=variant.x, y=variant.y - change * variant.x)
    return np.array(
        [
            not excludes(seen.interval, change),
            not excludes(seen.lift_interval, lift),
            np.nan if always is None else not excludes(always.interval, change),
            np.nan if always is None else not excludes(always.lift_interval, lift),
            not by_requests(world, control, shift),
            seen.standard_error,
        ],
        dtype=np.float64,
    )


def sample_ratios(experiments: int) -> Iterator[SampleRatios]:
    """Alarms at 10^5 units, by what leaks."""
    leaks = (
        ("none", 0.5, 1.0, 100_000),
        ("1 point of all units answered by the other variant (51 : 49)", 0.51, 1.0, 100_000),
        ("1 point of all units lost, of one variant (50 : 49)", 0.5, 0.98, 100_000),
        ("1 % of one variant's units lost (50 : 49.5)", 0.5, 0.99, 100_000),
        ("1 % of one variant's units lost (50 : 49.5)", 0.5, 0.99, 1_000_000),
    )
    random = np.random.default_rng(3)
    even = {"a": 0.5, "b": 0.5}
    for name, share, kept, units in leaks:
        first = random.binomial(units, share, experiments)
        second = random.binomial(units - first, kept)
        alarms = [
            sample_ratio({"a": int(a), "b": int(b)}, even).is_mismatch
            for a, b in zip(first, second, strict=True)
        ]
        yield SampleRatios(name, units, 1, 100 * float(np.mean(alarms)))
    firsts = random.binomial(100_000 // LOOKS, 0.5, (experiments // 5, LOOKS)).cumsum(axis=1)
    ever = [
        any(
            sample_ratio({"a": int(a), "b": 2_000 * (i + 1) - int(a)}, even).is_mismatch
            for i, a in enumerate(row)
        )
        for row in firsts
    ]
    yield SampleRatios("none", 100_000, LOOKS, 100 * float(np.mean(ever)))


def power(experiments: int) -> Iterator[Power]:
    """Effects at the calculator's units: 80 % of them should be found."""
    for world, change in ((BINARY, 0.02), (SCORE, 0.08)):
        random = np.random.default_rng(4)
        *_, (pilot, _) = arrivals(world, 100_000, random)
        deviation = deviation_of(pilot, world.kind) or 0.0
        for always in (False, True):
            design = Design(deviation, pilot.x / pilot.n, alpha=ALPHA, always_valid=always)
            units = units_needed(design, change) or 0
            ends = [
                found_at(world, arrivals(world, units, random, change=change), always)
                for _ in range(experiments)
            ]
            found = [end for end in ends if end is not None]
            yield Power(
                world.name,
                f"always valid, {LOOKS} looks" if always else "one look",
                minimum_detectable_effect(design, units) or 0.0,
                units,
                100 * len(found) / experiments,
                float(np.mean(found)),
            )


def found_at(world: World, looks: Iterator[tuple[Sums, Sums]], always: bool) -> int | None:
    """Units at the look that found the effect."""
    seen: Effect | None = None
    units = 0
    for control, variant in looks:
        seen, units = effect(control, variant, kind=world.kind), control.n + variant.n
        if always and seen.always_valid and seen.always_valid.p_value <= ALPHA:
            return units
    return units if not always and seen and (seen.p_value or 1) <= ALPHA else None


def guardrails(experiments: int) -> Iterator[Guardrails]:
    """Error rates of 1 % that rise, beside a guardrail of one point."""
    for worsening in (0.0, 0.01, 0.02, 0.03, 0.05):
        random = np.random.default_rng(5)
        ends = [
            paused_at(arrivals(RARE, 5_000, random, change=worsening)) for _ in range(experiments)
        ]
        paused = [end for end in ends if end is not None]
        median = float(np.median(paused)) if paused else None
        yield Guardrails(worsening, 0.01, 5_000, 100 * len(paused) / experiments, median)


def paused_at(looks: Iterator[tuple[Sums, Sums]]) -> int | None:
    """Units at the look that breached."""
    for control, variant in looks:
        if guardrail(control, variant, kind="binary", max_increase=0.01).breached:
            return control.n + variant.n
    return None


SECTIONS: dict[str, Callable[[int], Iterator[Any]]] = {
    "false positives": false_positives,
    "verdicts": lambda experiments: verdicts(experiments // 5),
    "coverage": coverage,
    "sample ratio": lambda experiments: sample_ratios(10 * experiments),
    "power": power,
    "guardrails": guardrails,
}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """One section's table."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console(width=140).print(table)


def cell(value: object) -> str:
    """As the tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main(
    experiments: Annotated[int, typer.Option(min=10, help="simulated for every line")] = 1_000,
    section: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
) -> None:
    """Simulate and print."""
    started = time.perf_counter()
    document: dict[str, Any] = {"machine": describe_machine()}
    for name, simulate in SECTIONS.items():
        if not section or name in section:
            rows = [asdict(row) for row in simulate(experiments)]
            show(name, rows)
            document[name.replace(" ", "_")] = rows
    document["seconds"] = round(time.perf_counter() - started, 1)
    Console().print(f"{document['seconds']} s")
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    found = [row["always_valid"] for row in document.get("false_positives", [])]
    found += [row["winner"] for row in document.get("verdicts", [])]
    raise SystemExit(max(found, default=0) > 100 * ALPHA)


if __name__ == "__main__":
    typer.run(main)
