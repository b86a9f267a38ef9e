"""Twin-Merging: what is exclusive to an expert, and its compression into a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

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
from .recipe import KindSettings, ModuleSettings, Recipe
from .truncation import distance, on, spectrum, truncated

_ROUNDING = 2e-7
"""What is left between two equal changes in float32, as a share of them: nothing of its own."""

Change = Tensor | LowRank
"""A delta of a matrix, [o, i], dense or in factors."""


@dataclass(frozen=True)
class Source:
    """What exclusive parts are taken against.

    base, backbone: before and after the merge. changed: the parameters in which they may differ by
    more than the backbone's dtype. shared: the merged change of each linear layer in factors, when
    all experts are LoRAs and the merge keeps them so: their exclusive parts are then found without
    any dense matrix.
    """

    base: Base
    backbone: Checkpoint
    changed: frozenset[str]
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
    recipe: Recipe,
    *,
    moments: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Extracted:
    """Compress an expert's exclusive part, expert minus backbone, into a module.

    recipe: how the modules and kinds are kept, and the seed of what is random.
    moments: mean of x xᵀ of the inputs [i, i] of each linear layer on the expert's prompts, for
    `fit: outputs`. on_layer: called after each matrix.

    Raises:
        RecipeError: the byte budget is too small, or nothing is left to keep.

    Source: Lu et al. 2024, Twin-Merging, arXiv:2406.15479, section 3: the exclusive part is taken
    against the merged backbone.
    """
    settings = recipe.modules
    reader = _Reader(expert, source, settings, moments or {}, recipe.seed)
    parameters = matrices(expert, source, recipe.kinds)
    vectors = reader.vectors(recipe.kinds)
    ranks = _ranks(reader, parameters, vectors) if parameters else {}
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
    """The parameters that an expert's module holds a delta of: those that the merge or the expert
    itself may have changed.
    """
    kept = {Kind.LINEAR, *_kept(kinds, "svd")}
    return [p for p in _differing(expert, source) if p.kind in kept]


def own_factors(expert: Expert, kinds: KindSettings) -> Extracted:
    """A LoRA expert's own factors as its module, without the kinds that are dropped.

    kinds: no merge takes the expert's other changes, so that one of them cannot be `shared`.

    Raises:
        RecipeError: the expert is a full checkpoint, changes a kind that the recipe shares, or
            nothing else than what it drops.
    """
    if not isinstance(expert, LoraExpert):
        raise RecipeError(
            f"expert {expert.name!r} is a full checkpoint, which has no factors of its own: "
            "use modules: {method: svd}"
        )
    kept = {
        name: _is_own(expert, name, kinds)
        for name in (*expert.module.deltas, *expert.module.vectors)
    }
    if not any(kept.values()):
        raise RecipeError(
            f"nothing is left of expert {expert.name!r}: kinds drops all that it changes, as "
            f"{min(kept)!r}; leave the expert out, or keep the kind"
        )
    if all(kept.values()):
        return Extracted(expert.module, error=0.0)
    deltas = {name: delta for name, delta in expert.module.deltas.items() if kept[name]}
    vectors = {name: vector for name, vector in expert.module.vectors.items() if kept[name]}
    embeddings = expert.module.embeddings & deltas.keys()
    gates = {name: gate for name, gate in expert.module.gates.items() if name in deltas}
    module = replace(
        expert.module, deltas=deltas, vectors=vectors, embeddings=embeddings, gates=gates
    )
    return Extracted(module, error=0.0)


def _is_own(expert: LoraExpert, name: str, kinds: KindSettings) -> bool:
    """Whether a module of the expert's own factors keeps the change of a layer or vector.

    Raises:
        RecipeError: the recipe neither keeps nor drops it.
    """
    parameter = expert.parameters.get(name) or expert.parameters.get(f"{name}.weight")
    kind = Kind.EMBEDDING if parameter is None else parameter.kind  # a tied head has none
    if kind is Kind.LINEAR:
        return True
    setting = kinds.model_dump()[kind]
    if setting == "shared":
        remedy = "svd" if kind in (Kind.EMBEDDING, Kind.HEAD) else "exact"
        raise RecipeError(
            f"expert {expert.name!r} changes {name!r}, and kinds.{kind} is shared: without a merge "
            f"nobody would get the change, set kinds: {{{kind}: {remedy}}} to keep it or "
            f"{{{kind}: drop}} to leave it out"
        )
    return bool(setting != "drop")


def _kept(kinds: KindSettings, setting: str) -> set[Kind]:
    """The kinds that modules keep by `svd`, or by `exact`."""
    return {Kind(kind) for kind, value in kinds.model_dump().items() if value == setting}


def _differing(expert: Expert, source: Source) -> Iterator[Parameter]:
    """The parameters in which an expert may differ from the backbone by more than its dtype."""
    for name, parameter in source.base.parameters.items():
        if name in source.changed or expert.changes(name):
            yield parameter


@dataclass(frozen=True)
class _Reader:
    """Reads one expert's exclusive parts, a matrix at a time."""

    expert: Expert
    source: Source
    settings: ModuleSettings
    moments: Mapping[str, Tensor]
    seed: int

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
            return lego([units], rank=rank, reweight="parameter", seed=self.seed)
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
        kept = _kept(kinds, "exact")
        found = {}
        for parameter in _differing(self.expert, self.source):
            if parameter.kind in kept:
                change = self._dense(parameter, self.source.backbone).flatten().cpu()
                if change.any():
                    found[parameter.name] = change
        return found

    def _dense(self, parameter: Parameter, against: Checkpoint) -> Tensor:
        """Expert minus `against` as a dense matrix, (out, in)."""
        name, base = parameter.name, self.source.base.checkpoint
        rows = base.tensors[name].rows
        stored = base.read_rows(name, 0, rows)
        before = stored.to(self.source.device, torch.float32)
        change = self.expert.delta_rows(name, 0, rows, before)
        if against is not base:
            merged = against.read_rows(name, 0, rows)
            if not change.any() and torch.equal(merged, stored.to(merged.dtype)):
                return change.T if parameter.is_transposed else change
            after = merged.to(change)
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
