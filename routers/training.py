"""Fit a router from prompts, and measure one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .base import Encode, Query
from .prototype import Prototype
from .router import Router
from .signals import HiddenState
from .store import PrototypeSettings


@dataclass(frozen=True)
class Labelled:
    """A prompt and the module that serves it; None: no module does."""

    query: Query
    module: str | None


@dataclass(frozen=True)
class RoutingReport:
    """How often a router was right, shares in [0, 1].

    accuracy: prompts of a module that went to it with the largest weight.
    rejected: prompts of a module that were left to the backbone.
    kept: prompts of no module that were left to the backbone.
    """

    accuracy: float
    rejected: float
    kept: float


def fit_prototype(
    examples: Sequence[Labelled],
    settings: PrototypeSettings,
    *,
    encode: Encode,
    progress: Callable[[Iterable[Labelled]], Iterable[Labelled]] = lambda examples: examples,
) -> Prototype:
    """Read the signal of every example and fit class means.

    progress: wraps the loop over the examples, to show how far it is.

    Raises:
        RouterError: too few examples of a module, or one of another.
    """
    signal = HiddenState(encode, settings.signal.layer, settings.signal.pooling)
    features = torch.stack([signal.read(example.query) for example in progress(examples)])
    labels = [str(example.module) for example in examples]
    return Prototype.fit(features, labels, modules=settings.modules)


def evaluate(router: Router, examples: Iterable[Labelled]) -> RoutingReport:
    """Route every example and count."""
    right, rejected, kept = [], [], []
    for example in examples:
        blend = router.route(example.query).blend
        if example.module is None:
            kept.append(not blend)
        else:
            rejected.append(not blend)
            right.append(bool(blend) and max(blend, key=lambda m: blend[m]) == example.module)
    return RoutingReport(accuracy=_share(right), rejected=_share(rejected), kept=_share(kept))


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")
