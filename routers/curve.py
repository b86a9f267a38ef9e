"""How accuracy grows with the number of samples a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .report import Case, report
from .router import Router
from .training import Labelled

SIZES = (5, 10, 25, 50, 100, 200)
DRAWS = 3
"""Of each size: which samples are drawn matters most where there are few."""


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy with so many samples of each module, a value per draw, in [0, 1].

    samples: the mean over modules where all are taken. before: before the router could abstain.
    """

    samples: int
    is_all: bool
    accuracy: tuple[float, ...]
    before: tuple[float, ...]


def draws(labels: Sequence[str | None]) -> list[tuple[int, list[list[int]]]]:
    """What to fit on: samples a module, and places drawn, several times; all of them at last.
    Prompts of no module are always among them.
    """
    places = _places(labels)
    none = [place for place, label in enumerate(labels) if label is None]
    fewest = min(map(len, places.values()), default=0)
    found = [
        (size, [sorted(none + _drawn(places, size, seed)) for seed in range(DRAWS)])
        for size in SIZES
        if size < fewest
    ]
    own = len(labels) - len(none)
    return [*found, (round(own / max(1, len(places))), [list(range(len(labels)))])]


def learning_curve(
    fitted: Callable[[Sequence[int]], Router],
    labels: Sequence[str | None],
    held_out: Sequence[Labelled],
    *,
    step: Callable[[], None] = lambda: None,
) -> list[CurvePoint]:
    """Fit on draws of every size and measure each on the same prompts of modules.

    fitted: a router of the prompts at these places. labels: the module of each place. held_out:
    prompts; those of no module are not asked. step: called after each fit.
    """
    own = [example for example in held_out if example.module is not None]
    queries = [example.query for example in own]

    def figures(places: Sequence[int]) -> Iterator[float]:
        decisions = fitted(places).route_all(queries)
        cases = [Case(e.module, decision) for e, decision in zip(own, decisions, strict=True)]
        found = report(cases, modules=())
        step()
        yield from (found.accuracy or 0.0, found.before or 0.0)

    points = []
    plan = draws(labels)
    for samples, sets in plan:
        accuracy, before = zip(*(tuple(figures(places)) for places in sets), strict=True)
        points.append(CurvePoint(samples, samples == plan[-1][0], accuracy, before))
    return points


def _places(labels: Sequence[str | None]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label is not None:
            places.setdefault(label, []).append(place)
    return places


def _drawn(places: dict[str, list[int]], size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [
        own[k]
        for own in places.values()
        for k in torch.randperm(len(own), generator=generator)[:size].tolist()
    ]
