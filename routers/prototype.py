"""Prototype head: class means with one shared, shrunk covariance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Scores
from .calibration import Calibration
from .covariance import clustered, feature_scale, ledoit_wolf, whitening_of
from .folds import calibrate, targets_of
from .signals import check_width

_NONE = -1
_PROMPTS_PER_NONE_CENTROID = 24
_MOST_NONE_CENTROIDS = 64
_TENSORS = ("means", "owners", "bias", "allowance", "spread", "center", "whitening")
_FEWEST_FOR_ALLOWANCE = 3
_DEVIATIONS = 4.0
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Prototype:
    """Linear discriminant analysis in which a class may have several means.

    A module's logit is half the negative squared Mahalanobis distance to its nearest mean, divided
    by a temperature, so that a softmax tells how often the best is right. Where prompts that no
    module serves were given, they have means of their own, and `distance` is how much better the
    nearest of these fits than the best module: log odds. Otherwise it is the squared distance to
    the nearest mean.

    A mean of few prompts lies beside the true one, by which every distance to it is too large:
    what is expected of that, the spread of the prompts over their number, is taken off.

    modules: names. means: whitened, [c, d]. owners: module of each mean by index; -1: of none.
    bias: [c], what is taken off squared distances. spread: of whitened prompts around their mean.
    allowance: [modules], taken off `distance` where the module is the best: 0 for those that were
    fitted; the few samples of one that was added since say less about where its prompts end.
    center: [d], taken from features before the whitening [d, d]; distances are Euclidean after it.
    calibration: from cross-validation.
    basis: how modules are known that were added since the fit.

    Source: Lee et al. 2018, arXiv:1807.03888, section 2.1 (Mahalanobis distance to class means
    with a tied covariance).
    """

    modules: tuple[str, ...]
    means: Tensor
    owners: Tensor
    bias: Tensor
    allowance: Tensor
    spread: Tensor
    center: Tensor
    whitening: Tensor
    calibration: Calibration = field(default_factory=Calibration)
    basis: Mapping[str, str] = field(default_factory=dict)
    name: str = "prototype"

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Sequence[str],
        *,
        modules: Sequence[str],
        none: Tensor | None = None,
        centroids: int = 1,
    ) -> Prototype:
        """Fit on features [n, d] with a module name each.

        none: features of prompts that no module serves, [k, d]; they are clustered, since one mean
        cannot stand for all that users may ask. centroids: means of a module, at most one per two
        prompts. The distances of held-out prompts come from 5-fold cross-validation, so that the
        policy can turn a rate of false rejections into a threshold.

        Raises:
            RouterError: a module has fewer than 5 prompts, or a label is no module.
        """
        others = features.new_zeros(0, features.shape[1]) if none is None else none
        rows = torch.cat([features, others]).double()
        targets = targets_of(labels, modules, none=len(others))

        def fitted(kept: Tensor) -> Prototype:
            return _fit(rows[kept], targets[kept], modules, centroids)

        calibration = calibrate(
            lambda kept, left: fitted(kept).logits(rows[left]), targets, modules=len(modules)
        )
        whole = fitted(torch.ones_like(targets, dtype=torch.bool))
        return replace(whole, calibration=calibration)

    def score(self, features: Tensor) -> Scores:
        """Logits of a prompt's features [d], and how unlike the modules' prompts it is."""
        if not self.modules:
            return Scores({})
        logits, distance = self.logits(features[None])
        return self.calibration.scores(self.modules, logits[0], distance[0], self.basis)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the modules and then of none, [n, modules + 1], or without it, not divided
        yet, and distances [n], of features [n, d]; float64.
        """
        check_width(features, len(self.center))
        squares = self._squares((features.double() - self.center) @ self.whitening)
        owners = [*range(len(self.modules)), *([_NONE] if self._knows_none else [])]
        nearest = [squares[:, self.owners == owner].min(1).values for owner in owners]
        logits = -0.5 * torch.stack(nearest, 1)
        if not self._knows_none:
            return logits, squares.min(1).values
        best = logits[:, :-1].max(1)
        return logits, logits[:, -1] - best.values - self.allowance[best.indices]

    @property
    def _knows_none(self) -> bool:
        return bool((self.owners == _NONE).any())

    def with_module(self, name: str, features: Tensor) -> Prototype:
        """This scorer and the mean of features [n, d]; see `Head.with_module`.

        Its allowance lets in all but what lies four standard deviations from its samples, as far
        as each is told from other prompts by a mean of the rest.
        """
        check_width(features, len(self.center))
        without = self.without_module(name)
        rows = (features.double() - self.center) @ self.whitening
        count = len(rows)
        return replace(
            without,
            modules=(*without.modules, name),
            means=torch.cat([without.means, rows.mean(0, keepdim=True)]),
            owners=torch.cat([without.owners, torch.tensor([len(without.modules)])]),
            bias=torch.cat([without.bias, self.spread.reshape(1) / count]),
            allowance=torch.cat([without.allowance, self._allowance(rows).reshape(1)]),
            basis={**without.basis, name: f"{count} sample{'s'[: count != 1]}"},
        )

    def _allowance(self, rows: Tensor) -> Tensor:
        """Of a module with whitened samples [n, d]."""
        count = len(rows)
        if count < _FEWEST_FOR_ALLOWANCE or not self._knows_none:
            return torch.zeros((), dtype=torch.float64)
        others = (rows.sum(0) - rows) / (count - 1)
        own = (rows - others).square().sum(1) - self.spread / (count - 1)
        none = self._squares(rows)[:, self.owners == _NONE].min(1).values
        distances = 0.5 * (own - none)
        return (distances.mean() + _DEVIATIONS * distances.std()).clamp_min(0)

    def _squares(self, rows: Tensor) -> Tensor:
        """Squared distances of whitened rows [n, d] to the means, [n, c]; a formula with products
        loses digits far from the origin."""
        parts = [rows[k : k + _ROWS_AT_ONCE, None] for k in range(0, len(rows), _ROWS_AT_ONCE)]
        squares = [(part - self.means).square().sum(-1) for part in parts]  # [rows, c] each
        return torch.cat(squares) - self.bias

    def without_module(self, name: str) -> Prototype:
        """This scorer without a module; see `Head.without_module`."""
        if name not in self.modules:
            return self
        gone = self.modules.index(name)
        kept = self.owners != gone
        owners = self.owners[kept]
        return replace(
            self,
            modules=tuple(n for n in self.modules if n != name),
            means=self.means[kept],
            owners=owners - (owners > gone).long(),
            bias=self.bias[kept],
            allowance=self.allowance[[k for k in range(len(self.modules)) if k != gone]],
            basis={n: basis for n, basis in self.basis.items() if n != name},
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        return {
            "means": self.means.float(),
            "owners": self.owners,
            "bias": self.bias,
            "allowance": self.allowance,
            "spread": self.spread,
            "center": self.center.float(),
            "whitening": self.whitening.float().contiguous(),
            **self.calibration.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], modules: Sequence[str]) -> Prototype:
        """Undo `state`.

        Raises:
            RouterError: tensors are missing, of another dtype, not finite, or do not belong
                together.
        """
        try:
            tensors = {key: state[key] for key in _TENSORS}
        except KeyError as error:
            raise RouterError(f"the prototype router lacks tensor {error}: fit it again") from error
        _check_state(tensors, len(modules))
        exact = {key: tensor.double() for key, tensor in tensors.items()}
        return cls(
            modules=tuple(modules),
            means=exact["means"],
            owners=tensors["owners"],
            bias=exact["bias"],
            allowance=exact["allowance"],
            spread=exact["spread"],
            center=exact["center"],
            whitening=exact["whitening"],
            calibration=Calibration.from_state(state),
        )


def _check_state(tensors: Mapping[str, Tensor], modules: int) -> None:
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    if dtypes.pop("owners") != torch.int64 or set(dtypes.values()) - {torch.float32, torch.float64}:
        raise RouterError(
            "the prototype router's tensors are of other dtypes than int64 for owners and float32 "
            "or float64 for the rest: fit it again"
        )
    count, size = tensors["bias"].numel(), tensors["center"].numel()
    expected = {
        "means": (count, size),
        "owners": (count,),
        "bias": (count,),
        "allowance": (modules,),
        "spread": (),
        "center": (size,),
        "whitening": (size, size),
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != expected or set(tensors["owners"].tolist()) - {_NONE} != set(range(modules)):
        raise RouterError(
            f"the prototype router's shapes {shapes} do not fit {modules} modules: fit it again"
        )
    if not all(map(_is_finite, tensors.values())):
        raise RouterError("the prototype router holds NaN or inf: fit it again")


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _fit(rows: Tensor, targets: Tensor, modules: Sequence[str], centroids: int) -> Prototype:
    """Means and whitening, not calibrated yet; the class after the modules is none."""
    center, (scale, rare) = rows.mean(0), feature_scale(rows)
    scaled = (rows - center) / scale
    none = scaled[targets == len(modules)]
    clusters = [
        (k, group)
        for k in range(len(modules))
        for group in clustered(scaled[targets == k], centroids)
    ]
    wanted = min(_MOST_NONE_CENTROIDS, -(-len(none) // _PROMPTS_PER_NONE_CENTROID))
    clusters += [(_NONE, group) for group in clustered(none, wanted)]
    means = torch.stack([group.mean(0) for _, group in clusters])
    residuals = torch.cat([group - group.mean(0) for _, group in clusters])
    whitening = whitening_of(ledoit_wolf(residuals) + rare.diag())
    spread = (residuals @ whitening).square().sum() / max(1, len(residuals) - len(clusters))
    sizes = torch.tensor([len(group) for _, group in clusters])
    return Prototype(
        modules=tuple(modules),
        means=means @ whitening,
        owners=torch.tensor([owner for owner, _ in clusters]),
        bias=spread / sizes,
        allowance=torch.zeros(len(modules), dtype=torch.float64),
        spread=spread,
        center=center,
        whitening=whitening / scale[:, None],
    )
