"""What a retriever knows of one module: samples or a description, and how alike prompts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .signals import check_width

BY_DESCRIPTION = "its description"
_NEAREST = 10
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of one module.

    vectors: of its samples, or the one of its description, each of length 1, [n, d].
    left_out: the similarity of each sample to the others; none with a single vector.
    handicap: what every similarity is given, since the module is known by little.
    is_described: the vector is that of a description.
    basis: how the module is known, where it was not fitted.
    """

    vectors: Tensor
    left_out: tuple[float, ...] = ()
    handicap: float = 0.0
    is_described: bool = False
    basis: str = ""

    @classmethod
    def of_samples(cls, features: Tensor, basis: str = "", *, among: Iterable[Entry] = ()) -> Entry:
        """Known by prompts with features [n, d]. among: the entries it competes with."""
        vectors = normalize(features.float())
        left_out = left_out_similarities(vectors) if len(vectors) > 1 else torch.empty(0)
        handicap = handicap_of_few(len(vectors), among)
        return cls(vectors, tuple(left_out.tolist()), handicap, basis=basis)

    @classmethod
    def of_description(cls, features: Tensor, handicap: float = 0.0) -> Entry:
        """Known by a sentence with features [d]."""
        vectors = normalize(features.float()[None])
        return cls(vectors, handicap=handicap, is_described=True, basis=BY_DESCRIPTION)

    @property
    def level(self) -> float:
        """How similar a prompt of the module is to it, on average."""
        return sum(self.left_out) / len(self.left_out) + self.handicap

    def similarities(self, prompts: Tensor) -> Tensor:
        """Of prompts [p, d], each of length 1; [p]."""
        check_width(prompts, self.vectors.shape[1])
        starts = range(0, len(prompts), _ROWS_AT_ONCE)
        parts = (prompts[start : start + _ROWS_AT_ONCE] for start in starts)
        return torch.cat([similarities(part, self.vectors) for part in parts]) + self.handicap


def similarities(prompts: Tensor, samples: Tensor) -> Tensor:
    """Cosine of each prompt and the mean direction of the samples nearest to it, [p].

    prompts: [p, d]. samples: [n, d]. All of length 1.
    """
    return _to_nearest(prompts, samples, prompts @ samples.T)


def left_out_similarities(samples: Tensor) -> Tensor:
    """The same of each sample to the others, [n]; n at least 2."""
    found = []
    for start in range(0, len(samples), _ROWS_AT_ONCE):
        part = samples[start : start + _ROWS_AT_ONCE]
        cosines = part @ samples.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(_to_nearest(part, samples, cosines, among=len(samples) - 1))
    return torch.cat(found)


def _to_nearest(
    prompts: Tensor, samples: Tensor, cosines: Tensor, among: int | None = None
) -> Tensor:
    """cosines: [p, n]. among: how many samples may be taken."""
    count = min(_NEAREST, len(samples) if among is None else among)
    nearest = samples[cosines.topk(count).indices]  # [p, count, d]
    return (prompts * normalize(nearest.mean(1))).sum(1)


def handicap_of_few(count: int, entries: Iterable[Entry]) -> float:
    """How much less similar a prompt is to so many samples of its module than to all it has, on
    average over the entries with at least twice as many.
    """
    gaps = []
    for entry in entries:
        if len(entry.left_out) >= 2 * count:
            taken = torch.zeros(len(entry.vectors), dtype=torch.bool)
            taken[torch.arange(count) * len(taken) // count] = True  # evenly: they may be in order
            few = Entry(entry.vectors[taken])
            gaps.append(entry.level - float(few.similarities(entry.vectors[~taken]).mean()))
    return sum(gaps) / len(gaps) if gaps else 0.0


def handicap_of_descriptions(
    entries: Mapping[str, Entry], described: Mapping[str, Tensor]
) -> float:
    """How much less similar a prompt is to its module's description than to its samples."""
    gaps = [
        entry.level
        - float(Entry.of_description(described[name]).similarities(entry.vectors).mean())
        for name, entry in entries.items()
        if entry.left_out and name in described
    ]
    return sum(gaps) / len(gaps) if gaps else 0.0
