"""Survey: how experts differ from their base, a parameter at a time, without merging them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import LowRank
from .energy import Spectrum, cosines, gram
from .errors import CheckpointError
from .experts import Base, Expert, LoraExpert
from .kinds import Kind, Parameter
from .lora import Module
from .merging.stack import rows_per_block


@dataclass(frozen=True, eq=False)
class Surveyed:
    """How one parameter is changed.

    shape: as (out, in) of a linear layer, as it is stored otherwise.
    inner: inner products of all experts' deltas, [T, T], float64; zeros for who leaves it as it is.
    base_norm: Frobenius norm of the base's own; zero where there is no base.
    spectra: of a linear layer, by expert; who leaves it as it is has none.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    inner: Tensor
    base_norm: float
    spectra: Mapping[str, Spectrum]

    @property
    def cosine(self) -> Tensor:
        """Cosines between the deltas, [T, T]; NaN where one of the two is zero."""
        return cosines(self.inner)


@dataclass(frozen=True)
class Survey:
    """How the experts, or modules, of those names change each parameter."""

    names: tuple[str, ...]
    parameters: tuple[Surveyed, ...]

    @property
    def linear(self) -> list[Surveyed]:
        """The linear layers that any of them changes."""
        return [p for p in self.parameters if p.kind is Kind.LINEAR and p.inner.any()]

    def cosine(self) -> Tensor:
        """Cosines between their deltas over all linear layers together, [T, T]; NaN where one of
        the two changes none.
        """
        size = len(self.names)
        return cosines(sum((p.inner for p in self.linear), torch.zeros(size, size).double()))

    def relative_norms(self, expert: str) -> dict[Kind, float | None]:
        """|delta| / |base| of all parameters of a kind together; None where the base is zero."""
        index, found = self.names.index(expert), {}
        for kind in Kind:
            own = [p for p in self.parameters if p.kind is kind]
            change = sum(float(p.inner[index, index]) for p in own)
            base = sum(p.base_norm**2 for p in own)
            if own:
                found[kind] = (max(change, 0.0) / base) ** 0.5 if base else None
        return found

    def changed(self, expert: str) -> list[str]:
        """The parameters that differ from the base."""
        index = self.names.index(expert)
        return [p.name for p in self.parameters if p.inner[index, index] > 0]


def survey_experts(
    base: Base, experts: Sequence[Expert], *, on_parameter: Callable[[], None] = lambda: None
) -> Survey:
    """Read base and experts once or twice, a few rows or one matrix at a time.

    on_parameter: called after each of `surveyed_names`.

    Raises:
        CheckpointError: the base or an expert holds NaN or inf.
    """
    found = []
    for name in surveyed_names(base):
        found.append(_surveyed(base, experts, base.parameters[name]))
        on_parameter()
    return Survey(tuple(expert.name for expert in experts), tuple(found))


def survey_modules(modules: Sequence[Module], layers: Iterable[str]) -> Survey:
    """How modules of one backbone change its layers of those names.

    Raises:
        ValueError: two of them change a layer of different shapes.
    """
    changed = {layer for module in modules for layer in module.deltas}
    return Survey(
        tuple(module.name for module in modules),
        tuple(_surveyed_layer(modules, layer) for layer in layers if layer in changed),
    )


def surveyed_names(base: Base) -> list[str]:
    """The base's parameters, block after block; buffers are none."""
    depths = {n: p.depth for n, p in base.parameters.items() if p.kind is not Kind.BUFFER}
    return sorted(depths, key=lambda name: -1.0 if (depth := depths[name]) is None else depth)


def _surveyed_layer(modules: Sequence[Module], layer: str) -> Surveyed:
    deltas = {m.name: m.deltas[layer] for m in modules if layer in m.deltas}
    spectra = {name: Spectrum.of(delta) for name, delta in deltas.items()}
    owners = [k for k, module in enumerate(modules) if layer in module.deltas]
    return Surveyed(
        name=layer,
        kind=Kind.LINEAR,
        shape=next(iter(deltas.values())).shape,
        inner=_among(owners, gram(list(deltas.values())), len(modules)),
        base_norm=0.0,
        spectra={name: found for name, found in spectra.items() if found is not None},
    )


def _surveyed(base: Base, experts: Sequence[Expert], parameter: Parameter) -> Surveyed:
    name = parameter.name
    shape = base.checkpoint.tensors[name].shape
    changed = [k for k, expert in enumerate(experts) if expert.changes(name)]
    base_norm = _base_norm(base, name)
    inner = _inner(base, [experts[k] for k in changed], name)
    spectra: dict[str, Spectrum] = {}
    for k in changed if parameter.kind is Kind.LINEAR else ():
        found = Spectrum.of(_change(base, experts[k], name))
        if found is not None:
            spectra[experts[k].name] = found
    return Surveyed(
        name=name,
        kind=parameter.kind,
        shape=shape[::-1] if parameter.is_transposed else shape,
        inner=_among(changed, inner, len(experts)),
        base_norm=base_norm,
        spectra=spectra,
    )


def _inner(base: Base, experts: Sequence[Expert], name: str) -> Tensor:
    """Inner products of the deltas of one parameter, in factor space where all have factors."""
    factors = [_factors(expert, name) for expert in experts]
    known = [factor for factor in factors if factor is not None]
    if known and len(known) == len(experts):
        return gram(known)
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for start, before in _blocks(base, name) if experts else ():
        stop = start + len(before)
        rows = [expert.delta_rows(name, start, stop, before).flatten() for expert in experts]
        stacked = torch.stack(rows).double()  # [T, b * i]
        total += stacked @ stacked.T
    return total


def _factors(expert: Expert, name: str) -> LowRank | None:
    return expert.factors(name) if isinstance(expert, LoraExpert) else None


def _change(base: Base, expert: Expert, name: str) -> Tensor | LowRank:
    """A delta of a matrix, in factors or as it is stored: the transpose has the same spectrum."""
    factors = _factors(expert, name)
    if factors is not None:
        return factors
    rows = base.checkpoint.tensors[name].rows
    return expert.delta_rows(name, 0, rows, base.checkpoint.read_rows(name, 0, rows).float())


def _base_norm(base: Base, name: str) -> float:
    total = sum(float(block.double().square().sum()) for _, block in _blocks(base, name))
    if not math.isfinite(total):
        raise CheckpointError(
            f"the base {base.path} holds NaN or inf in {name!r}: fetch it again, or choose another"
        )
    return math.sqrt(total)


def _blocks(base: Base, name: str) -> Iterator[tuple[int, Tensor]]:
    """The base's rows in float32, block by block, with the index of the first."""
    info = base.checkpoint.tensors[name]
    rows = rows_per_block(info.columns)
    for start in range(0, info.rows, rows):
        yield start, base.checkpoint.read_rows(name, start, start + rows).float()


def _among(owners: Sequence[int], inner: Tensor, size: int) -> Tensor:
    """Inner products of some experts, placed among those of all, [T, T]."""
    whole = torch.zeros(size, size, dtype=torch.float64)
    if owners:
        index = torch.tensor(owners)
        whole[index[:, None], index] = inner
    return whole
