"""Whether assignment keeps its weights, what a ramp moves, and what an enrolment costs.

Everything but the cost is a pure function of the keys below: it comes out alike on every machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import chi2_contingency, chisquare, kstest

from mergeroute.serving.access.callers import ANYBODY
from mergeroute.serving.experiments.allocation import Allocation, allocate, ramped
from mergeroute.serving.experiments.definition import Experiment
from mergeroute.serving.experiments.enrolment import Running, enrol
from mergeroute.serving.experiments.hashing import BUCKETS, bucket
from mergeroute.serving.experiments.layers import layer_bucket
from mergeroute.serving.experiments.units import Facts

from .machine import describe_machine

SALT = "2f1c9a7be0d34c58"
FORMS = ("user-{}", "{:032x}", "{:08d}@example.org")
Buckets = NDArray[np.int16]
Weights = dict[str, float]


def named(*weights: float) -> Weights:
    """Variants a, b, c and so on."""
    return {chr(ord("a") + n): weight for n, weight in enumerate(weights)}


SPLITS = {
    "50/50": named(0.5, 0.5),
    "90/10": named(0.9, 0.1),
    "99/1": named(0.99, 0.01),
    "99.9/0.1": named(0.999, 0.001),
    "thirds": named(0.3333, 0.3333, 0.3334),
    "70/20/10": named(0.7, 0.2, 0.1),
    "20 variants": named(*[0.05] * 20),
}
RAMPS = {
    "1 % to 50 %": (named(0.99, 0.01), named(0.5, 0.5)),
    "50 % to 1 %": (named(0.5, 0.5), named(0.99, 0.01)),
    "50 % to all": (named(0.5, 0.5), named(0, 1)),
    "thirds to 50/25/25": (named(0.3334, 0.3333, 0.3333), named(0.5, 0.25, 0.25)),
    "thirds to 80/10/10": (named(0.3334, 0.3333, 0.3333), named(0.8, 0.1, 0.1)),
    "a fourth variant, from all": (
        named(0.3334, 0.3333, 0.3333),
        named(0.25, 0.25, 0.25, 0.25),
    ),
    "20 variants, one to 24 %": (named(*[0.05] * 20), named(0.24, *[0.04] * 19)),
}


@dataclass(frozen=True)
class Split:
    """Keys by weights. p: of the chi-square test that the shares are the weights. worst: the
    largest deviation of a variant, in its standard deviations. below: share of tests with other
    salts and fewer keys whose p is below 0.05. uniform: p of the test that all their p are uniform.
    """

    split: str
    p: float
    worst: float
    below: float
    uniform: float


@dataclass(frozen=True)
class Ramp:
    """Who moves. needed: half the sum of the changes. cumulative: buckets that would have moved if
    each variant stood where the ones before it end, which is what most do. keys_against: keys that
    moved to a variant that did not gain, or away from one that did not lose.
    """

    ramp: str
    needed: int
    moved: int
    cumulative: int
    keys_moved: float
    keys_against: int


@dataclass(frozen=True)
class Cost:
    """Microseconds of one enrolment."""

    case: str
    p50: float
    p99: float


@dataclass
class Report:
    """Everything measured. every_bucket: p of the test that all buckets are equally likely, by form
    of the keys. independence: p of chi-square tests.
    """

    every_bucket: dict[str, float] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    ramps: list[Ramp] = field(default_factory=list)
    independence: dict[str, float] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)


def hashed(salt: str, count: int, form: str = FORMS[0]) -> Buckets:
    """Buckets of `count` keys."""
    found = (bucket(salt, form.format(n)) for n in range(count))
    return np.fromiter(found, np.int16, count)


def drawn(allocation: Allocation, weights: Weights, buckets: Buckets) -> NDArray[np.int64]:
    """The number of each key's variant, in the order of the weights."""
    numbers = {name: n for n, name in enumerate(weights)}
    return np.array([numbers[owner] for owner in allocation.owners()])[buckets]


def counts(weights: Weights, buckets: Buckets) -> NDArray[np.int64]:
    """Keys of each variant."""
    return np.bincount(drawn(allocate(weights), weights, buckets), minlength=len(weights))


def p_of(weights: Weights, buckets: Buckets) -> float:
    """Of the test that shares are weights."""
    expected = np.array(list(weights.values())) * len(buckets)
    return float(chisquare(counts(weights, buckets), expected).pvalue)


def split(name: str, weights: Weights, buckets: Buckets, others: Sequence[Buckets]) -> Split:
    """Keys against weights."""
    shares = np.array(list(weights.values()))
    expected = shares * len(buckets)
    away = np.abs(counts(weights, buckets) - expected) / np.sqrt(expected * (1 - shares))
    found = np.array([p_of(weights, other) for other in others])
    return Split(
        split=name,
        p=p_of(weights, buckets),
        worst=float(away.max()),
        below=float(np.mean(found < 0.05)),
        uniform=float(kstest(found, "uniform").pvalue),
    )


def measure_splits(report: Report, buckets: Buckets, salts: int, keys: int) -> None:
    """At one salt with all keys, and at many with fewer."""
    for form in FORMS:
        found = np.bincount(hashed(SALT, len(buckets), form), minlength=BUCKETS)
        report.every_bucket[form] = float(chisquare(found).pvalue)
    names = track([f"salt-{n}" for n in range(salts)], "salts", console=Console(stderr=True))
    others = [hashed(name, keys) for name in names]
    report.splits = [split(name, weights, buckets, others) for name, weights in SPLITS.items()]


def ramp(name: str, before: Weights, after: Weights, buckets: Buckets) -> Ramp:
    """Buckets and keys that move."""
    start = allocate(before)
    end = ramped(start, after)
    change = np.array([round((after[v] - before.get(v, 0)) * BUCKETS) for v in after])
    keys = counted(drawn(start, after, buckets), drawn(end, after, buckets), len(after))
    np.fill_diagonal(keys, 0)
    is_against = ~((change[:, None] < 0) & (change[None, :] > 0))
    return Ramp(
        ramp=name,
        needed=int(np.abs(change).sum()) // 2,
        moved=moved(start, end),
        cumulative=moved(start, allocate(after)),
        keys_moved=float(keys.sum()) / len(buckets),
        keys_against=int(keys[is_against].sum()),
    )


def moved(before: Allocation, after: Allocation) -> int:
    """How many buckets have another owner."""
    pairs = zip(before.owners(), after.owners(), strict=True)
    return sum(old != new for old, new in pairs)


def counted(left: NDArray[Any], right: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Pairs of numbers below size, [size, size]."""
    pairs = left.astype(np.int64) * size + right
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def contingency(left: NDArray[Any], right: NDArray[Any]) -> float:
    """p of the test that two numberings of the keys are independent."""
    size = int(max(left.max(), right.max())) + 1
    return float(chi2_contingency(counted(left, right, size)).pvalue)


def measure_independence(report: Report, buckets: Buckets) -> None:
    """Tenths against tenths."""
    count = len(buckets)
    layers = {
        name: np.fromiter((layer_bucket(name, f"user-{n}") for n in range(count)), np.int16, count)
        for name in ("default", "prompts")
    }
    tenths = {name: found // 1000 for name, found in layers.items()}
    other = hashed("another", count)
    report.independence = {
        "two layers": contingency(tenths["default"], tenths["prompts"]),
        "a layer and its experiment's variants": contingency(tenths["default"], buckets // 1000),
        "variants of two experiments": contingency(buckets // 1000, other // 1000),
        "hundredths of two experiments": contingency(buckets // 100, other // 100),
    }


def experiment(number: int, traffic: float) -> Running:
    """One of several in one layer, attached to auto."""
    variants = [
        {"name": "control", "target": "a", "weight": 0.5, "control": True},
        {"name": "routed", "target": "b", "weight": 0.5},
    ]
    document = Experiment.model_validate(
        {"name": f"e{number}", "salt": f"s{number}", "attach_to": "auto", "variants": variants}
    )
    first = round(number * traffic * BUCKETS)
    ranges = ((first, first + round(traffic * BUCKETS)),)
    return Running(document, 1, allocate(document.weights), ranges)


def durations(experiments: Sequence[Running], model: str, count: int) -> Iterator[int]:
    """Nanoseconds of each enrolment."""
    for n in range(count):
        facts = Facts({}, ANYBODY, f"r-{n}", user=f"user-{n}")
        start = time.perf_counter_ns()
        enrol(experiments, model, facts, secret=SALT)
        yield time.perf_counter_ns() - start


def measure_costs(report: Report, count: int) -> None:
    """One enrolment after another, in one thread."""
    one, ten = [experiment(0, 1)], [experiment(n, 0.1) for n in range(10)]
    cases = {
        "no experiment": ([], "auto"),
        "one, named": (one, "e0"),
        "one, attached": (one, "auto"),
        "ten in a layer, attached": (ten, "auto"),
        "ten, another model": (ten, "zoo"),
    }
    for case, (experiments, model) in cases.items():
        micros = np.fromiter(durations(experiments, model, count), float) / 1000
        p50, p99 = np.percentile(micros, [50, 99])
        report.costs.append(Cost(case, float(p50), float(p99)))


def show(report: Report) -> None:
    """The tables."""
    console = Console()
    for title, rows in (
        ("splits", report.splits),
        ("ramps", report.ramps),
        ("enrolment, microseconds", report.costs),
    ):
        table = Table(title=title)
        for column in asdict(rows[0]):
            table.add_column(column.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*map(cell, asdict(row).values()))
        console.print(table)
    for title, figures in (
        ("every bucket", report.every_bucket),
        ("independence", report.independence),
    ):
        console.print(f"{title}: " + ", ".join(f"{k} {cell(v)}" for k, v in figures.items()))
    console.print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))


def cell(value: object) -> str:
    """As the tables show it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(
    keys: Annotated[int, typer.Option(min=1000)] = 1_000_000,
    salts: Annotated[int, typer.Option(min=1, help="tried with a tenth of the keys each")] = 100,
    enrolments: Annotated[int, typer.Option(min=100, help="timed, per case")] = 100_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
) -> None:
    """Measure and print."""
    report = Report()
    buckets = hashed(SALT, keys)
    measure_splits(report, buckets, salts, keys // 10)
    report.ramps = [ramp(name, *weights, buckets) for name, weights in RAMPS.items()]
    measure_independence(report, buckets)
    measure_costs(report, enrolments)
    show(report)
    document = {"machine": describe_machine(), "keys": keys, "salt": SALT, **asdict(report)}
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
