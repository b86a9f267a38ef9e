"""Cross-validation, from which every fitted scorer has its temperature and its distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .calibration import Calibration, fit_temperature

FOLDS = 5
_MORE_FOLDS = 10
"""Of few prompts, which each fold would miss too much."""

_FEW = 50
_FEWEST_OF_NONE = 10
_ACCEPTED_OF_NONE = 0.1


def targets_of(labels: Sequence[str], modules: Sequence[str], *, none: int = 0) -> Tensor:
    """The class of each prompt: the module's index, and their number for the `none` last prompts
    that no module serves, [n + none].

    Raises:
        RouterError: a module has fewer than 5 prompts, a label is no module, or there are less than
            10 prompts of no module, but some.
    """
    index = {name: k for k, name in enumerate(modules)}
    if unknown := set(labels) - index.keys():
        raise RouterError(f"prompts name {min(unknown)!r}, no module: {', '.join(modules)}")
    targets = torch.tensor([index[label] for label in labels], dtype=torch.long)
    counts = targets.bincount(minlength=len(modules))
    if counts.min() < FOLDS:
        poorest = modules[int(counts.argmin())]
        raise RouterError(
            f"module {poorest!r} has {int(counts.min())} prompts, at least {FOLDS} are needed"
        )
    if 0 < none < _FEWEST_OF_NONE:
        raise RouterError(
            f"{none} prompts that no module serves were given, at least {_FEWEST_OF_NONE} are "
            "needed, and some hundred different ones are better: give more, or leave them out"
        )
    return torch.cat([targets, torch.full((none,), len(modules))])


def calibrate(
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], targets: Tensor, *, modules: int
) -> Calibration:
    """Temperature, and the distances of the modules' prompts, from cross-validation.

    score: takes which rows to fit on and which to score, [n] bool each, and gives the latter's
    logits [k, classes] and distances [k]. targets: classes [n]; those from `modules` on are of
    prompts that no module serves. Where there are such, a distance is the log odds of them: it is
    raised to 0, since nothing is unlike the modules' prompts that fits one better than any other
    prompts, and lowered to where a tenth of those lie, since few prompts cannot tell how far their
    module reaches. Raised, fewer of the modules' prompts are given up than the rate that a policy
    states; lowered, it may be more: where modules and none overlap, the rate is no bound.
    """
    logits, distances = _held_out(score, targets)
    is_own = targets < modules
    own, others = distances[is_own].sort().values, distances[~is_own]
    if len(others):
        own = own.clamp(0.0, max(0.0, float(others.quantile(_ACCEPTED_OF_NONE))))
    return Calibration(fit_temperature(logits, targets), tuple(own.tolist()))


def _held_out(
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and distances of every prompt, each scored without its own fold."""
    folds = stratified_folds(targets)
    found = []
    order = []
    for fold in folds.unique():  # type: ignore[no-untyped-call]
        left = folds == fold
        found.append(score(~left, left))
        order.append(left.nonzero()[:, 0])
    back = torch.cat(order).argsort()
    logits, distances = zip(*found, strict=True)
    return torch.cat(logits)[back], torch.cat(distances)[back]


def stratified_folds(targets: Tensor) -> Tensor:
    """A fold per row: every class is dealt out in a fixed shuffled order."""
    generator = torch.Generator().manual_seed(0)
    folds = torch.empty_like(targets)
    smallest = int(targets.bincount().min())
    count = FOLDS if smallest >= _FEW else min(_MORE_FOLDS, smallest)
    for k in targets.unique().tolist():  # type: ignore[no-untyped-call]
        rows = (targets == k).nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        folds[shuffled] = torch.arange(len(rows)) % count
    return folds
