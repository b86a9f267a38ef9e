"""Twin-Merging: what is exclusive to an expert, and its compression into a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .compressors import MASKS, OWN_DELTA
from .delta import LowRank, concat
from .errors import RecipeError
from .experts import Base, Expert, LoraExpert
from .kinds import Kind, Parameter
from .lego import lego
from .lora import Module
from .ranks import fixed_rank, spend
from .recipe import KindSettings, ModuleSettings
from .truncation import distance, on, spectrum, truncated

_ROUNDING = 2e-7
"""What is left between two equal changes in float32, as a share of them: nothing of its own."""

Change = Tensor | LowRank
"""A delta of a matrix, [o, i], dense or in factors."""


@dataclass(frozen=True)
class Source:
    """What exclusive parts are taken against.

    base, backbone: before and after the merge. shared: the merged change of each linear layer in
    factors, when all experts are LoRAs and the merge keeps them so: their exclusive parts are then
    found without any dense matrix.
    """

    base: Base
    backbone: Checkpoint
    shared: Mapping[str, LowRank] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Extracted:
    """A module and what it lost.

    error: |E - M| / |E|, Frobenius, over all its matrices, before rounding to the module's dtype.
    compressor_error: the same for what the compressor kept, before its conversion to low rank.
    """

    module: Module
    error: float
    compressor_error: float | None = None


def extract(
    expert: Expert,
    source: Source,
    settings: ModuleSettings,
    kinds: KindSettings,
    *,
    moments: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Extracted:
    """Compress an expert's exclusive part, expert minus backbone, into a module.

    moments: mean of x xᵀ of the inputs [i, i] of each linear layer on the expert's prompts, for
    `fit: outputs`. on_layer: called after each matrix.

    Raises:
        RecipeError: the byte budget is too small, or nothing is left to keep.

    Source: Lu et al. 2024, Twin-Merging, arXiv:2406.15479, section 3: the exclusive part is taken
    against the merged backbone.
    """
    reader = _Reader(expert, source, settings, moments or {})
    parameters = matrices(expert, source, kinds)
    vectors = reader.vectors(kinds)
    ranks = _ranks(reader, parameters, vectors)
    deltas: dict[str, LowRank] = {}
    total = lost = lost_before = 0.0
    for parameter in parameters:
        exclusive = reader.exclusive(parameter)
        kept = reader.compressed(parameter, exclusive)
        nearest = reader.low_rank(parameter, kept, ranks.get(parameter.layer))
        delta = nearest.scaled(settings.scale)
        total += distance(exclusive) ** 2
        lost += distance(exclusive, delta) ** 2
        lost_before += distance(exclusive, kept) ** 2
        if delta.norm() > 0:
            deltas[parameter.layer] = on(delta, "cpu")
        on_layer()
    if not deltas and not vectors:
        raise RecipeError(
            f"nothing is exclusive to expert {expert.name!r}: the backbone already equals it, "
            "leave it out or use another merge"
        )
    relative = (total or 1.0) ** -0.5
    return Extracted(
        Module(
            expert.name, deltas, vectors, frozenset(source.base.shapes.embeddings) & set(deltas)
        ),
        error=lost**0.5 * relative,
        compressor_error=lost_before**0.5 * relative if settings.is_converted else None,
    )


def matrices(expert: Expert, source: Source, kinds: KindSettings) -> list[Parameter]:
    """The parameters that an expert's module holds a delta of."""
    is_kept = {
        Kind.LINEAR: True,
        Kind.EMBEDDING: kinds.embedding == "svd",
        Kind.HEAD: kinds.head == "svd",
    }

    def may_differ(name: str, parameter: Parameter) -> bool:
        if source.shared is None or parameter.kind is not Kind.LINEAR:
            return True
        return parameter.layer in source.shared or expert.changes(name)

    return [
        parameter
        for name, parameter in source.base.parameters.items()
        if is_kept.get(parameter.kind, False) and may_differ(name, parameter)
    ]


def own_factors(expert: Expert) -> Extracted:
    """A LoRA expert's own factors as its module.

    Raises:
        RecipeError: the expert is a full checkpoint.
    """
    if not isinstance(expert, LoraExpert):
        raise RecipeError(
            f"expert {expert.name!r} is a full checkpoint, which has no factors of its own: "
            "use modules: {method: svd}"
        )
    return Extracted(expert.module, error=0.0)


@dataclass(frozen=True)
class _Reader:
    """Reads one expert's exclusive parts, a matrix at a time."""

    expert: Expert
    source: Source
    settings: ModuleSettings
    moments: Mapping[str, Tensor]

    def shape(self, parameter: Parameter) -> tuple[int, int]:
        """(out, in), also where it is stored transposed."""
        o, i = self.source.base.checkpoint.tensors[parameter.name].shape
        return (i, o) if parameter.is_transposed else (o, i)

    def exclusive(self, parameter: Parameter) -> Change:
        """Expert minus backbone, [o, i]."""
        shared = self.source.shared
        if shared is None or parameter.kind is not Kind.LINEAR:
            return self._dense(parameter, self.source.backbone)
        assert isinstance(self.expert, LoraExpert)
        own, common = self.expert.factors(parameter.name), shared.get(parameter.layer)
        minus = common.scaled(-1) if common is not None else None
        parts = [part for part in (own, minus) if part is not None]
        whole = concat(parts)
        return whole if whole.norm() > _ROUNDING * parts[0].norm() else whole.scaled(0)

    def compressed(self, parameter: Parameter, exclusive: Change) -> Change:
        """What the compressor keeps of it."""
        method = self.settings.method
        if method in OWN_DELTA:
            dense = exclusive.dense() if isinstance(exclusive, LowRank) else exclusive
            return OWN_DELTA[method](dense, **self.settings.compressor_parameters).dense
        if method in MASKS:
            own = self._dense(parameter, self.source.base.checkpoint)
            merged = own - self._dense(parameter, self.source.backbone)
            return MASKS[method](own, merged).dense - merged
        return exclusive

    def low_rank(self, parameter: Parameter, change: Change, rank: int | None) -> LowRank:
        """The nearest delta of a rank, or of the energy that the settings name."""
        if self.settings.method == "lego":
            assert rank is not None
            units = truncated(change, rank=min(self.shape(parameter)))
            return lego([units], rank=rank)
        return truncated(
            change,
            rank=rank,
            energy=self.settings.energy,
            moment=self.moments.get(parameter.layer),
        )

    def spectrum(self, parameter: Parameter) -> Tensor:
        """The singular values that a budget is spent on, descending."""
        change = self.compressed(parameter, self.exclusive(parameter))
        return spectrum(change, moment=self.moments.get(parameter.layer))

    def vectors(self, kinds: KindSettings) -> dict[str, Tensor]:
        """Exact changes of norm weights and biases, by parameter."""
        kept = {k for k, v in ((Kind.NORM, kinds.norm), (Kind.BIAS, kinds.bias)) if v == "exact"}
        found = {}
        for name, parameter in self.source.base.parameters.items():
            if parameter.kind in kept:
                change = self._dense(parameter, self.source.backbone).flatten().cpu()
                if change.any():
                    found[name] = change
        return found

    def _dense(self, parameter: Parameter, against: Checkpoint) -> Tensor:
        """Expert minus `against` as a dense matrix, (out, in)."""
        name, base = parameter.name, self.source.base.checkpoint
        rows = base.tensors[name].rows
        before = base.read_rows(name, 0, rows).to(self.source.device, torch.float32)
        change = self.expert.delta_rows(name, 0, rows, before)
        if against is not base:
            after = against.read_rows(name, 0, rows).to(change)
            change += before
            change -= after
            change *= change.norm() > _ROUNDING * after.norm()
        return change.T if parameter.is_transposed else change


def _ranks(
    reader: _Reader, parameters: list[Parameter], vectors: Mapping[str, Tensor]
) -> Mapping[str, int]:
    """The rank of each layer; empty when the energy decides it.

    vectors: kept in float32; what they take of a byte budget is not there for factors.
    """
    settings = reader.settings
    shapes = {p.layer: reader.shape(p) for p in parameters}
    if settings.energy is not None:
        return {}
    if settings.bytes is None:
        return dict.fromkeys(shapes, settings.fixed_rank or 1)
    budget = settings.bytes - 4 * sum(vector.numel() for vector in vectors.values())
    if settings.allocation == "fixed":
        return fixed_rank(shapes, budget, dtype=settings.dtype)
    spectra = {p.layer: reader.spectrum(p) for p in parameters}
    return spend(spectra, shapes, budget, dtype=settings.dtype)
