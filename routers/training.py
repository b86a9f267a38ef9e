"""Fit a router's scorer on prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Query, Signal, Turn
from .learned import Fitted, Learned
from .mlp import Mlp
from .prototype import Prototype
from .retriever import Retriever

SCORERS = ("prototype", "mlp", "retriever")
HELD_OUT_SHARE = 0.2
_CHUNK = 64
_SHOWN = 60


@dataclass(frozen=True)
class Labelled:
    """A prompt and the module that serves it; None: no module does."""

    query: Query
    module: str | None


@dataclass(frozen=True, eq=False)
class Readings:
    """Prompts that a signal has read.

    features: [n, d]. labels: the module of each; None: no module.
    """

    features: Tensor
    labels: tuple[str | None, ...]

    def rows(self, chosen: Sequence[int]) -> Readings:
        """Some of them."""
        return Readings(self.features[list(chosen)], tuple(self.labels[k] for k in chosen))


def fit(
    scorer: str,
    signal: Signal,
    examples: Sequence[Labelled],
    *,
    modules: Sequence[str],
    descriptions: Mapping[str, str] | None = None,
    step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Read every example's signal and fit a scorer on them.

    examples: of every module; those of no module teach it what to leave alone. Equal prompts
    count once. descriptions: of modules, for the retriever. step: called after each example is
    read.

    Raises:
        RouterError: too few examples of a module, one of another, contradictory ones, or one whose
            features are not finite.
    """
    readings = read(signal, without_duplicates(examples), step=step)
    return fit_readings(scorer, signal, readings, modules=modules, descriptions=descriptions)


def fit_readings(
    scorer: str,
    signal: Signal,
    readings: Readings,
    *,
    modules: Sequence[str],
    descriptions: Mapping[str, str] | None = None,
) -> Fitted:
    """Fit a scorer on prompts that were read already; see `fit`. The retriever looks at prompts of
    modules alone.
    """
    if not modules:
        raise RouterError("there are no modules to choose from: give at least one")
    labels = [label for label in readings.labels if label is not None]
    is_none = torch.tensor([label is None for label in readings.labels])
    if len(modules) < 2 and not is_none.any():
        raise RouterError(
            f"all prompts are of {modules[0]!r}: with nothing to tell it from, a router cannot be "
            "fitted; give prompts of a second module, or prompts that no module serves"
        )
    own = readings.features[~is_none]
    none = readings.features[is_none] if is_none.any() else None
    match scorer:
        case "prototype":
            return Learned(signal, Prototype.fit(own, labels, modules=modules, none=none))
        case "mlp":
            return Learned(signal, Mlp.fit(own, labels, modules=modules, none=none))
        case "retriever":
            return Retriever.fit(signal, own, labels, modules=modules, descriptions=descriptions)
    raise RouterError(f"scorer {scorer!r} is not fitted on prompts: {', '.join(SCORERS)} are")


def read(
    signal: Signal, examples: Sequence[Labelled], *, step: Callable[[], None] = lambda: None
) -> Readings:
    """Read many prompts, some at a time. step: called after each.

    Raises:
        RouterError: there are none, or the features of one are not finite.
    """
    if not examples:
        raise RouterError("there are no prompts to fit a router on: give some of every module")
    features = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        rows = signal.read([example.query for example in chunk])
        _check_finite(rows, chunk)
        features.append(rows)
        for _ in chunk:
            step()
    return Readings(torch.cat(features), tuple(example.module for example in examples))


def _check_finite(rows: Tensor, examples: Sequence[Labelled]) -> None:
    for is_finite, example in zip(rows.isfinite().all(1).tolist(), examples, strict=True):
        if not is_finite:
            raise RouterError(
                f"the prompt {_shown(example.query)} has features that are NaN or inf: check the "
                "backbone and its dtype (mergeroute doctor)"
            )


def without_duplicates(examples: Sequence[Labelled]) -> list[Labelled]:
    """Each prompt once.

    Raises:
        RouterError: one prompt is said to be served by two modules, or by one and by none.
    """
    found: dict[tuple[Turn, ...], Labelled] = {}
    for example in examples:
        earlier = found.setdefault(example.query.turns, example)
        if earlier.module != example.module:
            raise RouterError(
                f"the prompt {_shown(example.query)} is given for {called(earlier.module)} and "
                f"for {called(example.module)}: decide for one"
            )
    return list(found.values())


def split(examples: Sequence[Labelled]) -> tuple[list[int], list[int]]:
    """What to fit on, and a fifth to measure on, by their places: a prompt's digest decides, so
    that the same prompt is always on the same side."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, example in enumerate(examples):
        sides[_fraction(example.query) < HELD_OUT_SHARE].append(place)
    return sides


def _fraction(query: Query) -> float:
    """Of the turns' text and tokens, in [0, 1)."""
    said = repr([(turn.token_ids, turn.text) for turn in query.turns])
    digest = hashlib.sha256(said.encode("ascii", "backslashreplace")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def _shown(query: Query) -> str:
    return shortened(query.text)


def shortened(text: str) -> str:
    """How a prompt begins, in quotation marks, for messages."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def called(module: str | None) -> str:
    """What serves a prompt, for messages."""
    return "no module" if module is None else repr(module)
