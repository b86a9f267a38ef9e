"""One sparse layer at a time: its experts grouped, merged or left out, and what that loses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import aligned
from .grouping import (
    adaptive_counts,
    dominants,
    fixed_counts,
    group_by_logits,
    group_by_outputs,
    random_groups,
)
from .layout import ExpertWeights, MoeCheckpoint, SparseLayer
from .merging import merged, usage_shares
from .pruning import kept_experts
from .recipe import ExpertSettings, MoeRecipe, ResidualSettings
from .residuals import packed, residual, unpacked
from .router import RouterGap, fitted_rows, mean_rows
from .stored import residuals_of
from .usage import LayerUsage, Usage

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """What became of a layer's experts.

    centres: the experts that are left, [G] of them. groups: [E], each expert's centre; -1 where it
    was left out. rows: [P, D], the router of the plain checkpoint over the first P centres.
    residuals: of gate_up and down as they are stored, by full name. centre_errors, errors: [E],
    |E - E'| / |E| without the residuals, and with them.
    """

    centres: ExpertWeights
    groups: Tensor
    rows: Tensor
    gap: RouterGap | None
    residuals: dict[str, Tensor]
    centre_errors: tuple[float, ...]
    errors: tuple[float, ...]


def planned_counts(settings: ExpertSettings, moe: MoeCheckpoint, usage: Usage) -> list[int]:
    """How many experts each layer is left with; adaptive allocation alone reads usage."""
    if settings.allocation == "adaptive":
        stated = [usage[layer.name] for layer in moe.layers]
        return adaptive_counts(stated, keep=settings.count, skipped=settings.skip_layers)
    layers = len(moe.layers)
    return fixed_counts(moe.experts, layers, keep=settings.count, skipped=settings.skip_layers)


@dataclass(frozen=True)
class LayerMerger:
    """Merges the experts of one layer after the other, as a recipe says.

    plain: experts of a layer of the plain checkpoint.
    """

    recipe: MoeRecipe
    plain: int
    moe: MoeCheckpoint
    device: torch.device

    @property
    def settings(self) -> ExpertSettings:
        """How experts are merged."""
        return self.recipe.experts

    def stored_dtype(self, layer: SparseLayer) -> torch.dtype:
        """In which a layer's centres are stored: residuals make up for its rounding."""
        return STORED[self.recipe.dtype] if self.recipe.dtype else layer.dtype

    def merge(self, layer: SparseLayer, count: int, usage: LayerUsage | None) -> MergedLayer:
        """Merge the experts of a layer into `count`, or leave all but these out.

        usage: where the recipe has calibration prompts.
        """
        weights, router = self.moe.read(layer), self.moe.router(layer)
        dtype = self.stored_dtype(layer)
        if self.settings.method == "reap":
            assert usage is not None
            return _pruned(weights, router, kept_experts(usage, count), dtype)
        groups = self._ordered(self._groups(layer, count, usage), usage)
        if self.settings.is_aligned:
            weights = aligned(weights, dominants(groups, _counts(usage, len(weights))))
        centres = merged(weights, groups, self._shares(len(weights), usage))
        centres = ExpertWeights(*(x.to(dtype).float() for x in centres.matrices))
        residuals = self._residuals(weights, centres, groups, usage)
        rows, gap = self._rows(router, groups, usage)
        stored = _restored(centres, groups, residuals)
        return MergedLayer(
            centres=centres,
            groups=groups,
            rows=rows,
            gap=gap,
            residuals=residuals,
            centre_errors=_errors(weights, centres.chosen(groups)),
            errors=_errors(weights, stored),
        )

    def _groups(self, layer: SparseLayer, count: int, usage: LayerUsage | None) -> Tensor:
        method = self.settings.method
        if count >= layer.experts:
            return torch.arange(layer.experts)
        if method == "shared":
            return torch.zeros(layer.experts, dtype=torch.long)
        if method == "random":
            seed = self.recipe.seed * len(self.moe.layers) + self.moe.layers.index(layer)
            return random_groups(layer.experts, count, seed=seed)
        assert usage is not None
        return (group_by_outputs if method == "hc-smoe" else group_by_logits)(usage, count)

    def _ordered(self, groups: Tensor, usage: LayerUsage | None) -> Tensor:
        """The same groups, the most used first: the plain checkpoint has room for those."""
        counts = _counts(usage, len(groups))
        totals = counts.new_zeros(int(groups.max()) + 1).index_add_(0, groups, counts)
        order = totals.argsort(descending=True, stable=True)
        return order.argsort()[groups]

    def _shares(self, experts: int, usage: LayerUsage | None) -> Tensor:
        if not self.settings.weighs_by_usage:
            return torch.ones(experts)
        assert usage is not None
        return usage_shares(usage, floor=self.settings.floor)

    def _rows(
        self, router: Tensor, groups: Tensor, usage: LayerUsage | None
    ) -> tuple[Tensor, RouterGap | None]:
        """The plain router: over the groups that the plain checkpoint has room for."""
        held = groups < self.plain
        router, groups = router[held], groups[held]
        if len(router) == self.plain:  # a row each, in the order of their groups
            return router[groups.argsort()], None
        if usage is None:
            return mean_rows(router, groups), None
        top_k = min(self.moe.top_k, self.plain)
        return fitted_rows(router, groups, usage.hidden, top_k=top_k)

    def _residuals(
        self,
        weights: ExpertWeights,
        centres: ExpertWeights,
        groups: Tensor,
        usage: LayerUsage | None,
    ) -> dict[str, Tensor]:
        settings = self.settings.residuals
        if settings is None or len(centres) == len(weights):
            return {}
        chosen = centres.chosen(groups)
        found: dict[str, Tensor] = {}
        for name in ("gate_up", "down"):
            moment = usage.moment if usage and self.settings.fits_outputs else None
            own, centre = getattr(weights, name), getattr(chosen, name)
            stored = self._packed(settings, own, centre, moment if name == "gate_up" else None)
            found |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        return found

    def _packed(
        self, settings: ResidualSettings, own: Tensor, centres: Tensor, moment: Tensor | None
    ) -> dict[str, Tensor]:
        """The residuals of one matrix of all experts [E, o, i] as they are stored."""
        moment = None if moment is None else moment.to(self.device)
        residuals = [
            residual(
                (mine - centre).to(self.device),
                rank=settings.rank,
                rows=settings.rows,
                moment=moment,
            )
            for mine, centre in zip(own, centres, strict=True)
        ]
        return packed(residuals, STORED[settings.dtype])


def _pruned(
    weights: ExpertWeights, router: Tensor, kept: Tensor, dtype: torch.dtype
) -> MergedLayer:
    groups = torch.full((len(weights),), -1)
    groups[kept] = torch.arange(len(kept))
    errors = tuple(1.0 if group < 0 else 0.0 for group in groups.tolist())
    return MergedLayer(
        centres=ExpertWeights(*(x.to(dtype).float() for x in weights.chosen(kept).matrices)),
        groups=groups,
        rows=router[kept],
        gap=None,
        residuals={},
        centre_errors=errors,
        errors=errors,
    )


def _counts(usage: LayerUsage | None, experts: int) -> Tensor:
    return torch.ones(experts, dtype=torch.long) if usage is None else usage.counts


def _restored(
    centres: ExpertWeights, groups: Tensor, residuals: dict[str, Tensor]
) -> ExpertWeights:
    """The experts as they will be served: centres plus residuals, rounded as they are stored."""
    restored = centres.chosen(groups)
    for name, matrix in zip(("gate_up", "down"), restored.matrices, strict=True):
        own = residuals_of(residuals, name)
        for expert, part in enumerate(unpacked(own) if own else ()):
            matrix[expert] += part.dense()
    return restored


def _errors(weights: ExpertWeights, served: ExpertWeights) -> tuple[float, ...]:
    """|E - E'| / |E| of each expert, over both matrices."""
    pairs = list(zip(weights.matrices, served.matrices, strict=True))
    missing = sum((own - other).flatten(1).square().sum(1) for own, other in pairs)
    norms = sum(own.flatten(1).square().sum(1) for own, _ in pairs)
    assert isinstance(missing, Tensor)
    assert isinstance(norms, Tensor)
    return tuple((missing / norms.clamp(min=1e-30)).sqrt().tolist())
