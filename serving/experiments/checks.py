"""What an experiment must be, so that it can answer, and stay, so that it can be judged."""

from __future__ import annotations

from typing import Any

from ...adapters.errors import MergerouteError
from ..errors import ApiError
from ..targets import Targets
from .definition import Experiment
from .scorers import check_scorer


def check_targets(document: Experiment, targets: Targets) -> None:
    """Refuse an experiment that could not answer.

    Raises:
        ApiError: it says which variant's target cannot be asked for.
    """
    if document.shadow and document.shadow.scorer is not None:
        check_scorer(document.shadow.scorer)
    for number, variant in enumerate(document.variants):
        check_target(variant.name, variant.target, targets, param=f"variants.{number}.target")


def check_target(variant: str, target: str, targets: Targets, *, param: str) -> None:
    """Refuse a target that cannot be asked for.

    Raises:
        ApiError: it says which, and why.
    """
    try:
        targets.resolve(target)
    except MergerouteError as error:
        raise ApiError(
            f"the variant {variant!r} cannot answer: {error}", param=param, code="target_not_found"
        ) from error


def with_traffic(document: Experiment, traffic: float) -> Experiment:
    """An experiment with another share of traffic.

    Raises:
        ApiError: it is no share.
    """
    values = document.model_dump() | {"traffic": traffic}
    try:
        return Experiment.model_validate(values)
    except ValueError as error:
        raise ApiError(
            f"traffic is {traffic}, it must be above 0, at most 1, and a multiple of 1/10,000",
            param="traffic",
        ) from error


def check_same_assignment(before: Experiment, after: Experiment) -> None:
    """Refuse to change under way what assignment goes by.

    Raises:
        ApiError: it says what would change.
    """
    told: dict[str, tuple[Any, Any]] = {
        name: (getattr(before, name), getattr(after, name))
        for name in ("salt", "layer", "unit", "attach_to")
    }
    told["variants"] = tuple(
        {variant.name: (variant.target, variant.control) for variant in each.variants}
        for each in (before, after)
    )  # type: ignore[assignment]
    if changed := [name for name, (old, new) in told.items() if old != new]:
        raise ApiError(
            f"{', '.join(changed)} of {before.name!r} cannot change once it is started: conclude "
            "it, and give the new one another name",
            status=409,
            param=changed[0],
            code="experiment_started",
        )
