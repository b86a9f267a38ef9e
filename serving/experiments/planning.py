"""From a body to the plan that experiments have for it."""

from __future__ import annotations

import secrets

from ..access.permissions import check_named, may_name
from ..context import Context
from ..dialects import fields_that_fix
from ..errors import ApiError
from ..schemas.completions import GenerationBody
from ..targets import AUTO
from .definition import Experiment
from .enrolment import VARIANT_HEADER, enrol
from .plan import NO_PLAN, Plan
from .snapshots import Snapshot
from .units import facts_of

_SEED_BITS = 48
"""Leaves room to count choices from there."""


def plan_of(body: GenerationBody, context: Context, snapshot: Snapshot) -> Plan:
    """What experiments make of a request. One for `auto` takes part where its key may name `auto`:
    a key that may only name a bank keeps the server's own default.

    Raises:
        ApiError: it asks for an experiment in a way that it cannot be asked for.
    """
    is_named, is_forced = body.model in snapshot.by_name, VARIANT_HEADER in context.headers
    if is_named or is_forced:
        check_named(context.caller, body.model)
    elif body.model != AUTO or not may_name(context.caller, AUTO):
        return NO_PLAN
    if fixed := _fixing(body):
        if is_named or is_forced:
            raise ApiError(
                f"{fixed} fixes what an experiment decides: leave it out, or ask for a bank",
                param=fixed,
            )
        return NO_PLAN
    facts = facts_of(body, context)
    found = enrol(snapshot.experiments, body.model, facts, secret=snapshot.secret)
    default = snapshot.default
    if found is not None:
        experiment = snapshot.by_name[found.experiment].experiment
        return Plan(
            snapshot.target_of(found.target),
            found,
            promoted_by=default.experiment if default and found.target == AUTO else None,
            seed=secrets.randbits(_SEED_BITS) if found.is_exposed and _keeps(experiment) else None,
        )
    if default is not None:
        return Plan(default.target, promoted_by=default.experiment)
    return NO_PLAN


def _keeps(experiment: Experiment) -> bool:
    """Whether its requests may be answered again."""
    return experiment.store_requests or experiment.shadow is not None


def _fixing(body: GenerationBody) -> str | None:
    """The field that leaves nothing to decide, if any."""
    given = [*fields_that_fix(body), *(["routing"] if body.routing is not None else [])]
    return given[0] if given else None
