"""Layers: experiments of one layer share no unit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from ..errors import ApiError
from .allocation import whole_buckets
from .definition import Experiment
from .hashing import BUCKETS, bucket

Ranges = tuple[tuple[int, int], ...]
"""Buckets of a layer: the first of each range, and the one after its last; ascending."""


def layer_bucket(layer: str, key: str) -> int:
    """The bucket of a key in a layer. Salts of experiments have no colon, so none is hashed alike
    and what an experiment does with its units is independent of which units it has.
    """
    return bucket(f"layer:{layer}", key)


def holds(ranges: Ranges, bucket: int) -> bool:
    """Whether a bucket is in the ranges."""
    return any(start <= bucket < end for start, end in ranges)


def claim(taken: Iterable[Ranges], traffic: float, *, held: Ranges = ()) -> Ranges:
    """The buckets of an experiment in its layer. More traffic keeps all it has, less gives up the
    highest: those who stay keep their variant.

    taken: by the other experiments of the layer that run or are paused. held: what this one has.

    Raises:
        ApiError: 409, so much is not free.
    """
    count = whole_buckets("traffic", traffic)
    own = _members(held)
    others = set().union(*map(_members, taken))
    free = [bucket for bucket in range(BUCKETS) if bucket not in others]
    if len(free) < count:
        raise ApiError(
            f"traffic {traffic:g} is asked for, {len(free) / BUCKETS:g} of the layer is free: "
            "lower traffic, conclude another experiment of the layer, or choose another layer",
            status=409,
            param="traffic",
            code="layer_full",
        )
    kept = [bucket for bucket in free if bucket in own][:count]
    fresh = [bucket for bucket in free if bucket not in own][: count - len(kept)]
    return _ranges(sorted(kept + fresh))


def check_together(experiment: Experiment, others: Iterable[Experiment]) -> None:
    """Refuse what cannot run at once.

    others: those that run or are paused.

    Raises:
        ApiError: 409, it says with which one, and why.
    """
    for other in others:
        is_same_layer = other.layer == experiment.layer
        if is_same_layer and other.unit != experiment.unit:
            raise _conflict(
                f"{experiment.name!r} assigns by {', '.join(experiment.unit)} and {other.name!r}, "
                f"in the same layer {other.layer!r}, by {', '.join(other.unit)}: state the same "
                "unit, or choose another layer"
            )
        if other.attach_to and other.attach_to == experiment.attach_to and not is_same_layer:
            raise _conflict(
                f"{experiment.name!r} and {other.name!r} are both attached to "
                f"{other.attach_to!r}, where a request has one answer: put them into one layer "
                f"({other.layer!r}), or attach one of them only"
            )


def _conflict(message: str) -> ApiError:
    return ApiError(message, status=409, code="experiment_conflict")


def _members(ranges: Ranges) -> set[int]:
    return {bucket for start, end in ranges for bucket in range(start, end)}


def _ranges(buckets: Iterable[int]) -> Ranges:
    """Of ascending buckets: those that follow each other are as far from their positions."""
    groups = groupby(enumerate(buckets), key=lambda pair: pair[1] - pair[0])
    runs = [[bucket for _, bucket in group] for _, group in groups]
    return tuple((run[0], run[-1] + 1) for run in runs)
