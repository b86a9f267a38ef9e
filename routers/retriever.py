"""Retriever scorer: modules that are known by a few sample prompts, or by a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.errors import RouterError
from .base import Card, Query, Scores, Signal
from .calibration import fit_temperature
from .entries import BY_DESCRIPTION, Entry, handicap_of_descriptions

_TEMPERATURE = 0.01
"""The sharpest there is, and what a retriever has that nothing can be learned from."""

_FLOATS = (torch.float32, torch.float64)
_KINDS = {
    "vectors": ((torch.float32,), 2),
    "counts": ((torch.int64,), 1),
    "described": ((torch.bool,), 1),
    "left_out": (_FLOATS, 1),
    "handicaps": (_FLOATS, 1),
    "scale": (_FLOATS, 1),
}
"""Dtypes and number of dimensions of what is saved."""


@dataclass(frozen=True, eq=False)
class Retriever:
    """Compares a prompt's features with those of each module's samples.

    A module's similarity is the cosine of the prompt and the mean direction of the module's 10
    samples nearest to it: of few samples the mean of all, which the paper takes and which is surer
    than any single sample; of many a mean of its own for each kind of prompt that the module takes.
    The logit is the similarity by a temperature; the distance is 1 less the best similarity.

    A prompt is less similar to few samples than to many, and least to a description. So that a
    module which has just come is not overlooked, it is given the difference, as measured on the
    modules that have more: on some of their samples, and on their own descriptions.

    The search is exact, one product of matrix and vector a module, and no index is kept: 8 modules
    of 200 samples take about a millisecond on one core, less than reading the prompt.

    signal: what is compared. entries: by module. temperature: of the logits, above 0.
    description_handicap: what a module is given that is known by its description.

    Source: Zhao et al. 2024, LoraRetriever, arXiv:2402.09997, section 3.2 (modules embedded as
    their samples' mean).
    """

    signal: Signal
    entries: Mapping[str, Entry]
    temperature: float = _TEMPERATURE
    description_handicap: float = 0.0
    name: str = "retriever"

    @classmethod
    def fit(
        cls,
        signal: Signal,
        features: Tensor,
        labels: Sequence[str],
        *,
        modules: Sequence[str],
        descriptions: Mapping[str, str] | None = None,
    ) -> Retriever:
        """Take features [n, d] that the signal read, with a module name each, as samples.

        descriptions: of modules, in a sentence; those without samples are known by it, those with
        samples tell how prompts and descriptions compare.

        Raises:
            RouterError: a label is no module, or a module has neither samples nor a description.
        """
        if unknown := set(labels) - set(modules):
            raise RouterError(f"prompts name {min(unknown)!r}, no module: {', '.join(modules)}")
        texts = {name: text for name, text in (descriptions or {}).items() if text}
        described = {n: signal.read([Query.of(text=text)])[0] for n, text in texts.items()}
        rows = {name: features[[label == name for label in labels]] for name in modules}
        entries: dict[str, Entry] = {}
        for name in sorted(modules, key=lambda name: -len(rows[name])):
            if len(rows[name]):
                entries[name] = Entry.of_samples(rows[name], among=entries.values())
        handicap = handicap_of_descriptions(entries, described)
        for name in modules:
            if name not in entries and name not in described:
                raise RouterError(
                    f"module {name!r} has neither samples nor a description: give one"
                )
            if name not in entries:
                entries[name] = Entry.of_description(described[name], handicap)
        in_order = {name: entries[name] for name in modules}
        return cls(signal, in_order, _fitted_temperature(in_order.values()), handicap)

    @property
    def modules(self) -> tuple[str, ...]:
        """Those with an entry."""
        return tuple(self.entries)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The one."""
        return (self.signal,)

    @cached_property
    def calibration(self) -> tuple[float, ...]:
        """Ascending distances of all samples, each to the others of its module: one distance for
        all would shrink with every module that joins.
        """
        return tuple(sorted(1 - s - e.handicap for e in self.entries.values() for s in e.left_out))

    def score(self, query: Query) -> Scores:
        """Similarity by temperature per module, and the distance to the most similar one."""
        prompt = normalize(self.signal.read([query]).float())
        found = {name: float(e.similarities(prompt)[0]) for name, e in self.entries.items()}
        return Scores(
            logits={name: similarity / self.temperature for name, similarity in found.items()},
            distance=1 - max(found.values()) if found else None,
            calibration=self.calibration,
            basis={name: e.basis for name, e in self.entries.items() if e.basis},
        )

    def with_module(self, card: Card) -> Retriever:
        """Known by the card's samples, else by its description; with neither nothing changes."""
        if card.samples:
            count = len(card.samples)
            basis = f"{count} sample{'s' if count > 1 else ''}"
            features = self.signal.read(card.samples)
            entry = Entry.of_samples(features, basis, among=self._without(card.name).values())
        elif card.description:
            features = self.signal.read([card.description])[0]
            entry = Entry.of_description(features, self.description_handicap)
        else:
            return self
        return replace(self, entries={**self.entries, card.name: entry})

    def without_module(self, name: str) -> Retriever:
        """Without the module's entry."""
        return replace(self, entries=self._without(name))

    def _without(self, name: str) -> dict[str, Entry]:
        return {known: entry for known, entry in self.entries.items() if known != name}

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        entries = self.entries.values()
        return {
            "vectors": torch.cat([entry.vectors for entry in entries]),
            "counts": torch.tensor([len(entry.vectors) for entry in entries]),
            "described": torch.tensor([entry.is_described for entry in entries]),
            "left_out": _doubles(s for entry in entries for s in entry.left_out),
            "handicaps": _doubles(entry.handicap for entry in entries),
            "scale": _doubles((self.temperature, self.description_handicap)),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], modules: Sequence[str], *, signal: Signal
    ) -> Retriever:
        """Undo `state`.

        Raises:
            RouterError: tensors are missing, of another dtype, not finite, or do not belong
                together.
        """
        _check_kinds(state)
        counts = state["counts"].tolist()
        samples = [n if n > 1 else 0 for n in counts]
        _check_lengths(state, counts, samples, modules=len(modules))
        vectors = torch.split(state["vectors"], counts)
        left_out = torch.split(state["left_out"], samples)
        handicaps, described = state["handicaps"].tolist(), state["described"].tolist()
        temperature, handicap = state["scale"].tolist()
        if not (all(map(_is_finite, state.values())) and temperature > 0):
            raise RouterError(
                "the retriever holds NaN or inf, or a temperature of 0 or below: fit it again"
            )
        entries = {
            name: Entry(
                rows, tuple(own.tolist()), given, by_text, BY_DESCRIPTION if by_text else ""
            )
            for name, rows, own, given, by_text in zip(
                modules, vectors, left_out, handicaps, described, strict=True
            )
        }
        return cls(signal, entries, temperature, handicap)


def _check_kinds(state: Mapping[str, Tensor]) -> None:
    for name, (dtypes, dimensions) in _KINDS.items():
        tensor = state.get(name)
        if tensor is None or tensor.dtype not in dtypes or tensor.ndim != dimensions:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise RouterError(
                f"the retriever's tensors are damaged ({name} is {found}): fit it again"
            )


def _check_lengths(
    state: Mapping[str, Tensor], counts: Sequence[int], samples: Sequence[int], *, modules: int
) -> None:
    known = {len(counts), len(state["described"]), len(state["handicaps"]), modules}
    if len(known) > 1 or min(counts, default=1) < 1:
        raise RouterError(f"the retriever knows {len(counts)} modules, not {modules}: fit it again")
    expected = {"vectors": sum(counts), "left_out": sum(samples), "scale": 2}
    found = {name: len(state[name]) for name in expected}
    if found != expected:
        raise RouterError(
            f"the retriever's tensors are damaged (lengths {found}, not {expected}): fit it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _fitted_temperature(entries: Iterable[Entry]) -> float:
    """At which a softmax over the modules with samples tells how often the best is right."""
    known = [entry for entry in entries if entry.left_out]
    if len(known) < 2:
        return _TEMPERATURE
    logits = torch.cat([_left_out_rows(entry, known) for entry in known]).double()
    counts = torch.tensor([len(entry.left_out) for entry in known])
    targets = torch.arange(len(known)).repeat_interleave(counts)
    return _TEMPERATURE * fit_temperature(logits / _TEMPERATURE, targets)


def _left_out_rows(entry: Entry, known: Sequence[Entry]) -> Tensor:
    """Similarities of an entry's samples to every module, [n, m]; left out of their own."""
    own = torch.tensor(entry.left_out) + entry.handicap
    columns = [own if other is entry else other.similarities(entry.vectors) for other in known]
    return torch.stack(columns, 1)


def _doubles(values: Iterable[float]) -> Tensor:
    return torch.tensor([*values], dtype=torch.float64)
