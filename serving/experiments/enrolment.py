"""Who gets which variant: a pure decision, which serving and the preview share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ApiError
from .allocation import Allocation
from .definition import Experiment
from .hashing import bucket
from .layers import Ranges, holds, layer_bucket
from .units import Facts, Unit, unit_of

VARIANT_HEADER = "x-mergeroute-variant"
State = Literal["draft", "running", "paused", "concluded"]


@dataclass(frozen=True)
class Running:
    """An experiment as requests meet it.

    allocation: of the experiment's buckets. ranges: of its layer's; a draft and a concluded one
    hold none. promoted: the variant that became the default. first_version: earlier ones were of
    another experiment that had the name.
    """

    experiment: Experiment
    version: int
    allocation: Allocation
    ranges: Ranges
    state: State = "running"
    promoted: str | None = None
    first_version: int = 1


@dataclass(frozen=True)
class Enrolment:
    """What an experiment decided for a request.

    unit: digest of whom the request comes from; empty where that was not asked.
    is_forced: an administrator chose the variant: it is recorded and not counted.
    is_exposed: whether it takes part; else it only gets the target, and nothing is recorded.
    reason: in words.
    """

    experiment: str
    version: int
    variant: str
    target: str
    unit: str = ""
    unit_kind: str = ""
    is_forced: bool = False
    is_exposed: bool = True
    reason: str = ""


def enrol(
    experiments: Sequence[Running], model: str, facts: Facts, *, secret: str
) -> Enrolment | None:
    """What an experiment decides for a request; None: none has a say.

    experiments: in every state, drafts too. model: the body's, where it fixes no blend.
    secret: see `Unit.digest`.

    An experiment that is named answers whoever asks: those who take no part get its control. One
    that is attached answers those who take part; the others go on as if it were not there.

    Raises:
        ApiError: the experiment is a draft; or a variant is forced that is not there, not of what
            is asked for, or by a key without the scope.
    """
    if (forced := facts.headers.get(VARIANT_HEADER)) is not None:
        return _forced(experiments, model, facts, forced=forced, secret=secret)
    for each in experiments:
        if each.experiment.name == model:
            return _named(each, facts, secret)
    for each in experiments:
        is_attached = each.state == "running" and each.experiment.attach_to == model
        if is_attached and (found := _drawn(each, facts, secret)):
            return found
    return None


def _drawn(running: Running, facts: Facts, secret: str) -> Enrolment | None:
    """The variant of whom the request comes from; None: it takes no part."""
    experiment = running.experiment
    if not experiment.audience.admits(facts.headers, facts.caller):
        return None
    unit = unit_of(experiment.unit, facts)
    if unit is None or not holds(running.ranges, layer_bucket(experiment.layer, unit.key)):
        return None
    assert experiment.salt is not None, "an experiment is salted when it is created"
    variant = running.allocation.variant_of(bucket(experiment.salt, unit.key))
    return _enrolment(running, variant, f"drawn by {unit.kind}", unit=unit, secret=secret)


def _named(running: Running, facts: Facts, secret: str) -> Enrolment:
    """Of an experiment that the request asks for."""
    experiment, control = running.experiment, running.experiment.control.name
    if running.state == "draft":
        raise ApiError(
            f"the experiment {experiment.name!r} is a draft: start it with POST "
            f"/v1/experiments/{experiment.name}/start",
            status=409,
            param="model",
            code="experiment_not_started",
        )
    if running.state == "concluded":
        chosen = running.promoted or control
        return _enrolment(running, chosen, "the experiment is concluded")
    if running.state == "paused":
        return _enrolment(running, control, "the experiment is paused: the control answers")
    found = _drawn(running, facts, secret)
    return found or _enrolment(running, control, "it takes no part: the control answers")


def _forced(
    experiments: Sequence[Running], model: str, facts: Facts, *, forced: str, secret: str
) -> Enrolment:
    """The variant that an administrator asks for, whatever the experiment's state."""
    if "admin" not in facts.caller.scopes:
        raise ApiError(
            f"the key {facts.caller.name!r} may not send the header {VARIANT_HEADER}: it needs the "
            "scope admin",
            status=403,
            param=VARIANT_HEADER,
        )
    name, _, variant = forced.partition("=")
    running = {each.experiment.name: each for each in experiments}.get(name)
    if running is None or variant not in running.experiment.by_name:
        raise _cannot_force(forced, "is no EXPERIMENT=VARIANT of this server", experiments)
    if model not in (name, running.experiment.attach_to):
        raise _cannot_force(forced, f"does not go with model {model[:60]!r}", [running])
    unit = unit_of(running.experiment.unit, facts)
    found = _enrolment(running, variant, f"forced by {VARIANT_HEADER}", unit=unit, secret=secret)
    return replace(found, is_forced=True)


def _cannot_force(forced: str, why: str, experiments: Sequence[Running]) -> ApiError:
    known = [f"{e.experiment.name}={name}" for e in experiments for name in e.experiment.by_name]
    models = {m for e in experiments for m in (e.experiment.name, e.experiment.attach_to) if m}
    return ApiError(
        f"{VARIANT_HEADER}: {forced[:130]!r} {why}; there are: {', '.join(known) or 'none'}, for "
        f"the models {', '.join(sorted(models)) or 'none'}",
        param=VARIANT_HEADER,
    )


def _enrolment(
    running: Running, variant: str, reason: str, *, unit: Unit | None = None, secret: str = ""
) -> Enrolment:
    """It takes part where there is a unit."""
    return Enrolment(
        experiment=running.experiment.name,
        version=running.version,
        variant=variant,
        target=running.experiment.by_name[variant].target,
        unit=unit.digest(secret) if unit else "",
        unit_kind=unit.kind if unit else "",
        is_exposed=unit is not None,
        reason=reason,
    )
