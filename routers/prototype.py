"""Prototype scorer: class means with one shared, shrunk covariance; its distance tells outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Scores

_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Prototype:
    """Linear discriminant analysis.

    modules: names, in the order of the means. means: whitened class means, [m, d].
    whitening: [d, d]; distances are Euclidean after it. calibration: ascending squared distances
    of held-out prompts to the nearest mean.
    """

    modules: tuple[str, ...]
    means: Tensor
    whitening: Tensor
    calibration: tuple[float, ...]
    name: str = "prototype"

    @classmethod
    def fit(cls, features: Tensor, labels: Sequence[str], *, modules: Sequence[str]) -> Prototype:
        """Fit on features [n, d] with a module name each.

        The distances of held-out prompts come from 5-fold cross-validation, so that the policy can
        turn a rate of false rejections into a threshold.

        Raises:
            RouterError: a module has fewer than 5 prompts, or a label is no module.
        """
        index = {name: k for k, name in enumerate(modules)}
        if unknown := set(labels) - index.keys():
            raise RouterError(f"prompts name {min(unknown)!r}, no module: {', '.join(modules)}")
        targets = torch.tensor([index[label] for label in labels])
        counts = targets.bincount(minlength=len(modules))
        if counts.min() < _FOLDS:
            poorest = modules[int(counts.argmin())]
            raise RouterError(
                f"module {poorest!r} has {int(counts.min())} prompts, at least {_FOLDS} are needed"
            )
        features = features.double()
        means, whitening = _fit(features, targets, len(modules))
        distances = _held_out_distances(features, targets, len(modules))
        return cls(
            modules=tuple(modules),
            means=means.float(),
            whitening=whitening.float(),
            calibration=tuple(distances.sort().values.tolist()),
        )

    def score(self, features: Tensor) -> Scores:
        """Half the negative squared Mahalanobis distance per module."""
        distances = _squared_distances(features[None], means=self.means, whitening=self.whitening)[
            0
        ]
        logits = (-0.5 * distances).tolist()
        return Scores(
            logits=dict(zip(self.modules, logits, strict=True)),
            distance=float(distances.min()),
            calibration=self.calibration,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        return {
            "means": self.means,
            "whitening": self.whitening.contiguous(),
            "calibration": torch.tensor(self.calibration, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], modules: Sequence[str]) -> Prototype:
        """Undo `state`.

        Raises:
            RouterError: tensors are missing or their shapes do not belong together.
        """
        try:
            means, whitening = state["means"], state["whitening"]
            calibration = tuple(state["calibration"].tolist())
        except KeyError as error:
            raise RouterError(f"the prototype router lacks tensor {error}: fit it again") from error
        size = means.shape[-1]
        if means.shape != (len(modules), size) or whitening.shape != (size, size):
            raise RouterError(
                f"prototype means {tuple(means.shape)} and whitening {tuple(whitening.shape)} do "
                f"not fit {len(modules)} modules: fit the router again"
            )
        if not (means.isfinite().all() and whitening.isfinite().all()):
            raise RouterError("the prototype router holds NaN or inf: fit it again")
        return cls(tuple(modules), means, whitening, calibration)


def _fit(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whitened means [m, d] and the whitening [d, d]."""
    means = torch.stack([features[targets == k].mean(0) for k in range(classes)])
    covariance = ledoit_wolf(features - means[targets])
    values, vectors = torch.linalg.eigh(covariance)
    if not values.max() > 0:
        raise RouterError("the prompts of each module are all alike: give different ones")
    floor = values.max() * 1e-10
    whitening = vectors / values.clamp_min(floor).sqrt()  # [d, d], columns scaled
    return means @ whitening, whitening


def ledoit_wolf(residuals: Tensor) -> Tensor:
    """Covariance [d, d] of centred rows [n, d], shrunk towards a multiple of the identity.

    Source: Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance
    matrices, Journal of Multivariate Analysis 88, section 3.
    """
    count, size = residuals.shape
    covariance = residuals.T @ residuals / count
    mean_variance = covariance.diagonal().mean()
    identity = torch.eye(size, dtype=residuals.dtype)
    dispersion = (covariance - mean_variance * identity).square().sum()
    squared_norms = residuals.square().sum(1)
    noise = (squared_norms.square().sum() / count - covariance.square().sum()) / count
    shrinkage = (noise / dispersion).clamp(0, 1) if dispersion > 0 else torch.tensor(1.0)
    return (1 - shrinkage) * covariance + shrinkage * mean_variance * identity


def _squared_distances(features: Tensor, *, means: Tensor, whitening: Tensor) -> Tensor:
    """[n, d] to [n, m], float64: far from the origin, float32 and cdist's products lose digits."""
    whitened = features.double() @ whitening.double()
    return (whitened[:, None] - means.double()).square().sum(-1)


def _held_out_distances(features: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Squared distance of every row to the nearest mean, fitted without the row's fold, [n]."""
    folds = _stratified_folds(targets)
    distances = torch.empty(len(targets), dtype=features.dtype)
    for fold in range(_FOLDS):
        is_held_out = folds == fold
        means, whitening = _fit(features[~is_held_out], targets[~is_held_out], classes)
        held_out = _squared_distances(features[is_held_out], means=means, whitening=whitening)
        distances[is_held_out] = held_out.min(1).values
    return distances


def _stratified_folds(targets: Tensor) -> Tensor:
    """A fold per row: every class is dealt out in a fixed shuffled order."""
    generator = torch.Generator().manual_seed(0)
    folds = torch.empty_like(targets)
    for k in targets.unique().tolist():  # type: ignore[no-untyped-call]
        rows = (targets == k).nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        folds[shuffled] = torch.arange(len(rows)) % _FOLDS
    return folds
