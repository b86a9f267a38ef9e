"""The rows of `benchmarks.smoe`: what is built of the zoo's mixture and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Group = Literal["reference", "quantised", "merged", "grouped", "shared", "recovered"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    experts: the section of a recipe; None: the model as it is, or `bits` of every expert.
    centre_bits: of the centres, beside what the recipe stores. recovery: steps of distillation.
    """

    label: str
    group: Group
    experts: Mapping[str, Any] | None = None
    bits: int | None = None
    centre_bits: int | None = None
    recovery: int = 0
    keep: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What tells it from every other row."""
        return f"{self.group}: {self.label}"


MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("average of M-SMoE's groups", {"method": "average"}),
    ("average of random groups", {"method": "random"}),
    ("M-SMoE", {"method": "m-smoe"}),
    ("HC-SMoE", {"method": "hc-smoe"}),
)
RECOVERY_STEPS = 60

RECOVERED = (
    *(f"{name}, {keep}" for keep in (6, 4, 2) for name in (*(name for name, _ in MERGES), "REAP")),
    *(f"M-SMoE, {keep} + rank {rank}" for keep, rank in ((6, 8), (4, 8), (2, 16))),
    "shared alone",
    "shared + rank 8",
)
"""The rows that stand there a second time, trained."""


def rows() -> list[Row]:
    """The rows in the order in which they are printed."""
    merged = [
        *(row for keep in (6, 4, 2) for row in _merged_rows(keep)),
        *_grouped_rows(),
        *_shared_rows(),
    ]
    by_label = {row.label: row for row in merged}
    return [
        Row("all 8 experts, bfloat16", "reference"),
        *(Row(f"all 8 experts, int{bits}", "quantised", bits=bits) for bits in (8, 4, 3)),
        *merged,
        *(replace(by_label[x], group="recovered", recovery=RECOVERY_STEPS) for x in RECOVERED),
    ]


def _merged_rows(keep: int) -> Iterator[Row]:
    for label, settings in MERGES:
        experts = {**settings, "keep": keep, "router": "exact"}
        yield Row(f"{label}, {keep}", "merged", experts, keep=keep)
    adaptive = {"method": "m-smoe", "keep": keep, "router": "exact", "allocation": "adaptive"}
    yield Row(f"M-SMoE adaptive, {keep}", "merged", adaptive, keep=keep)
    for router in ("groups", "compact"):
        routed = {"method": "m-smoe", "keep": keep, "router": router}
        yield Row(f"M-SMoE, router {router}, {keep}", "merged", routed, keep=keep)
    yield Row(f"REAP, {keep}", "merged", {"method": "reap", "keep": keep}, keep=keep)


def _grouped_rows() -> Iterator[Row]:
    """Groups with a residual for each of their experts: MC-SMoE's form."""
    for keep, ranks in ((6, (8,)), (4, (4, 8, 16)), (2, (8, 16, 24))):
        for rank in ranks:
            experts = {"method": "m-smoe", "keep": keep, "residuals": {"rank": rank}}
            yield Row(f"M-SMoE, {keep} + rank {rank}", "grouped", experts, keep=keep)
    for keep, rank in ((4, 8), (2, 16)):
        experts = {"method": "random", "keep": keep, "residuals": {"rank": rank}}
        yield Row(f"random groups, {keep} + rank {rank}", "grouped", experts, keep=keep)


def _shared_rows() -> Iterator[Row]:
    def shared(label: str, /, centre_bits: int | None = None, **residuals: Any) -> Row:
        experts = {"method": "shared", **({"residuals": residuals} if residuals else {})}
        if not residuals:
            experts["router"] = "exact"
        return Row(f"shared{label}", "shared", experts, centre_bits=centre_bits, keep=1)

    yield shared(" alone")
    for rank in (8, 16, 24, 32):
        yield shared(f" + rank {rank}", rank=rank)
    for rank in (8, 15, 24, 32):
        yield shared(f" + rank {rank}, int8", rank=rank, dtype="int8")
    yield shared(" + rank 16 and 5 % of the rows", rank=16, rows=0.05)
    yield shared(" + rank 24, closest outputs", rank=24, fit="outputs")
    yield shared(" + rank 15, int8, closest outputs", rank=15, dtype="int8", fit="outputs")
    yield shared(" in int8 + rank 28, int8", 8, rank=28, dtype="int8")
