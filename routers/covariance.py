"""What class means are fitted with: features to scale, rows in clusters, their covariance."""

from __future__ import annotations

import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor

from ..adapters.errors import RouterError

_ROUNDING = 1e-6
"""A feature that varies by less, beside its own magnitude, is always the same but for rounding."""

_RARE_PROMPTS = 3
"""In how many more prompts a feature is taken to have been at its farthest."""


def feature_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What each feature of rows [n, d] is divided by, and what its variance then lacks to 1, [d].

    Each is taken by itself, whatever its unit: by its standard deviation as if it had been at its
    farthest in some prompts more. A feature that one prompt in a thousand has would otherwise lie
    thirty deviations out in the next prompt that has it, and decide alone. A feature that is always
    the same says nothing about others: it is divided by infinity.
    """
    deviations = rows - rows.mean(0)
    farthest = deviations.abs().amax(0)
    rare = _RARE_PROMPTS * farthest.square() / (len(rows) - 1)
    variance = deviations.square().sum(0) / (len(rows) - 1) + rare
    varies = farthest > _ROUNDING * rows.abs().amax(0)
    return variance.sqrt().where(varies, torch.inf), (rare / variance).where(varies, 0.0)


def clustered(rows: Tensor, count: int) -> list[Tensor]:
    """Rows [n, d] in at most `count` groups that are not empty, at least two rows to each mean on
    average, and no more than there are different rows; the same every time."""
    different = len(rows.unique(dim=0))  # type: ignore[no-untyped-call]
    for number in range(min(count, len(rows) // 2, different), 1, -1):
        try:
            _, labels = kmeans2(rows.numpy(), number, minit="++", seed=0, iter=50, missing="raise")
        except ClusterError:  # a group lost all its rows to others
            continue
        groups = torch.from_numpy(labels)
        return [rows[groups == k] for k in range(number)]
    return [rows] if len(rows) else []


def whitening_of(covariance: Tensor) -> Tensor:
    """[d, d] after which rows with this covariance have the identity.

    Raises:
        RouterError: it is zero.
    """
    values, vectors = torch.linalg.eigh(covariance)
    if not values.max() > 0:
        raise RouterError("the prompts of each module are all alike: give different ones")
    floor = values.max() * 1e-10
    whitening: Tensor = vectors / values.clamp_min(floor).sqrt()  # columns scaled
    return whitening


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
