"""Which targets a key may ask for. Serving, preview and listing all ask here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...adapters.errors import UnknownTargetError
from ..errors import ApiError
from ..targets import AUTO, Target, Targets
from .callers import Caller


def resolve_for(
    caller: Caller,
    targets: Targets,
    model: str,
    weights: Mapping[str, float] | None = None,
    *,
    param: str = "blend",
) -> Target:
    """What a request asks for, if its key may ask for it; see `Targets.resolve`.

    Raises:
        MergerouteError: as `Targets.resolve`.
        ApiError: the key may not ask for it.
    """
    with names_hidden(caller, model):
        target = targets.resolve(model, weights, param=param)
    if caller.targets is None or _is_allowed(caller.targets, targets, target, model):
        return target
    raise _not_allowed(caller, model)


def may_name(caller: Caller, name: str) -> bool:
    """Whether a key's list of targets has this very name, or the key has no such list."""
    return caller.targets is None or name in caller.targets


def check_named(caller: Caller, name: str) -> None:
    """Refuse what a key's list of targets does not name, as if it were not there. An experiment is
    allowed by its own name: who may ask for it gets whatever its variants answer from.

    Raises:
        ApiError: the key may not ask for it.
    """
    if not may_name(caller, name):
        raise _not_allowed(caller, name)


@contextmanager
def names_hidden(caller: Caller, model: str) -> Iterator[None]:
    """A name that is not allowed is answered as one that is not there, and no error tells a key of
    names beside its own.

    Raises:
        ApiError: instead of any error of a target, where the key may not ask for everything.
    """
    try:
        yield
    except (UnknownTargetError, ApiError):
        if caller.targets is None:
            raise
        raise _not_allowed(caller, model) from None


def listing_for(caller: Caller, targets: Targets) -> list[dict[str, Any]]:
    """Every name that a key may ask for, in the shape of /v1/models."""
    allowed = caller.targets
    entries = targets.listing()
    if allowed is None:
        return entries
    return [
        entry
        for entry in entries
        if _is_allowed(allowed, targets, targets.resolve(entry["id"]), entry["id"])
    ]


def describe_for(caller: Caller, targets: Targets, model: str) -> dict[str, Any]:
    """One name's entry, if the key may ask for it.

    Raises:
        MergerouteError: as `resolve_for`.
    """
    resolve_for(caller, targets, model)
    return targets.describe(model)


def _is_allowed(allowed: frozenset[str], targets: Targets, target: Target, model: str) -> bool:
    """Whether a key that may name these may have this target.

    A bank's name stands for the bank, whatever its router picks, each of its modules and its
    backbone. `auto` stands for itself alone: what the router picks, without a blend of one's own.
    """
    bank = target.hosted.bank
    if bank.name in allowed:
        return True
    if target.blend is None:
        return model == AUTO and AUTO in allowed
    if not target.blend:
        return bank.backbone.name in allowed
    return all(
        f"{bank.name}:{module}" in allowed or targets.full_name(module, target.hosted) in allowed
        for module in target.blend
    )


def _not_allowed(caller: Caller, model: str) -> ApiError:
    names = ", ".join(sorted(caller.targets or ())) or "nothing"
    return ApiError(
        f"the model {model!r}, or the blend with it, does not exist or the key {caller.name!r} may "
        f"not ask for it; it may ask for: {names}",
        status=404,
        param="model",
        code="model_not_found",
    )
