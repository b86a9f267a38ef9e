"""Which variant owns each of an experiment's buckets, and how that changes when weights do."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any

from ..errors import ApiError
from .hashing import BUCKETS

Run = tuple[str, int, int]
"""A variant and the buckets it owns: the first, and the one after the last."""


@dataclass(frozen=True)
class Allocation:
    """Who owns every bucket.

    runs: in the order of the buckets, without gaps; neighbours belong to different variants.

    Raises:
        ApiError: they are not so; only a damaged database holds such an allocation.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        ends = (0, *(end for _, _, end in self.runs))
        starts = (*(start for _, start, _ in self.runs), BUCKETS)
        if ends != starts or any(start >= end for _, start, end in self.runs):
            raise ApiError(
                f"the allocation {str(self.runs)[:200]} does not own each of {BUCKETS:,} buckets "
                "once: the stored experiment is damaged, restore the database",
                status=500,
                code="experiment_damaged",
            )

    @classmethod
    def parse(cls, document: Sequence[Sequence[Any]]) -> Allocation:
        """What `as_lists` wrote.

        Raises:
            ApiError: it is damaged.
        """
        return cls(tuple((str(variant), int(start), int(end)) for variant, start, end in document))

    def as_lists(self) -> list[list[Any]]:
        """As JSON holds it."""
        return [list(run) for run in self.runs]

    def variant_of(self, bucket: int) -> str:
        """Who owns a bucket in [0, BUCKETS)."""
        return self.runs[bisect_right(self._starts, bucket) - 1][0]

    def owners(self) -> list[str]:
        """Who owns each bucket, [BUCKETS]."""
        return [variant for variant, start, end in self.runs for _ in range(start, end)]

    def counts(self) -> dict[str, int]:
        """Buckets by variant, of those that own any."""
        found: dict[str, int] = {}
        for variant, start, end in self.runs:
            found[variant] = found.get(variant, 0) + end - start
        return found

    @cached_property
    def _starts(self) -> list[int]:
        return [start for _, start, _ in self.runs]


def shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Buckets by variant, which sum to BUCKETS.

    Raises:
        ValueError: a weight is no share in whole buckets, or they do not sum to 1.
    """
    found = {name: whole_buckets(f"the weight of {name!r}", w) for name, w in weights.items()}
    if sum(found.values()) != BUCKETS:
        total = sum(found.values()) / BUCKETS
        raise ValueError(
            f"the weights sum to {total:g}, they must sum to 1 (thirds: 0.3333, 0.3333, 0.3334)"
        )
    return found


def whole_buckets(what: str, share: float) -> int:
    """A share of all buckets as their number.

    Raises:
        ValueError: it is not in [0, 1], or no multiple of 1/BUCKETS.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{what} is {share:g}, it must be from 0 to 1")
    count = round(share * BUCKETS)
    if abs(share * BUCKETS - count) > 1e-6:
        raise ValueError(
            f"{what} is {share!r}, it must be a multiple of 1/{BUCKETS}: write {count / BUCKETS:g}"
        )
    return count


def least_buckets(share: float) -> int:
    """The fewest buckets that are no less than a share."""
    return math.ceil(share * BUCKETS - 1e-9)


def allocate(weights: Mapping[str, float]) -> Allocation:
    """One run per variant, in the order of the weights.

    Raises:
        ValueError: as `shares`.
    """
    return _allocation(name for name, count in shares(weights).items() for _ in range(count))


def ramped(allocation: Allocation, weights: Mapping[str, float]) -> Allocation:
    """The allocation after the weights changed. As few buckets move as can be, half the sum of all
    absolute changes; nobody moves between two variants that both gain, or both lose.

    weights: of all variants there are now; one that is not among them gives up all it has.

    Losses are matched with gains in the order of the variants; what goes to an earlier variant is
    taken from a loser's lowest buckets, what goes to a later one from its highest. So a ramp from
    where `allocate` puts the variants is undone exactly, and two variants never have more than
    one run each.

    Raises:
        ValueError: as `shares`.
    """
    wanted, had = shares(weights), allocation.counts()
    names = list(dict.fromkeys((*wanted, *had)))
    change = {name: wanted.get(name, 0) - had.get(name, 0) for name in names}
    gained = iter([name for name in names for _ in range(change[name])])
    owners = allocation.owners()
    for loser in (name for name in names if change[name] < 0):
        takers = list(islice(gained, -change[loser]))
        owned = [bucket for bucket, owner in enumerate(owners) if owner == loser]
        low = sum(names.index(taker) < names.index(loser) for taker in takers)
        given = owned[:low] + owned[len(owned) - len(takers) + low :]
        for bucket, taker in zip(given, takers, strict=True):
            owners[bucket] = taker
    return _allocation(owners)


def _allocation(owners: Iterable[str]) -> Allocation:
    """From the owner of each bucket."""
    runs, end = [], 0
    for variant, run in groupby(owners):
        start, end = end, end + sum(1 for _ in run)
        runs.append((variant, start, end))
    return Allocation(tuple(runs))
