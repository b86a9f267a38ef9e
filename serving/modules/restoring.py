"""What earlier loads and unloads left behind, brought back at a start."""

from __future__ import annotations

import logging

from ...adapters.errors import BankError, MergerouteError
from ..errors import ApiError
from ..hosted import HostedBank
from ..targets import Targets
from .changes import introduced
from .sources import Sources
from .state import BankState, ModuleChange, State

logger = logging.getLogger(__name__)


def restore(targets: Targets, state: State, sources: Sources) -> tuple[Targets, State]:
    """Make the changes of a state again. One that cannot be made is logged and says why in its
    `error`; one that the bank's own files have overtaken is dropped.
    """
    for name in list(targets.banks):
        bank = state.of(targets.banks[name])
        if bank.changes:
            targets, after = _restored(targets, name, bank, sources)
            state = state.replacing(after)
    return targets, state


def _restored(
    targets: Targets, bank: str, told: BankState, sources: Sources
) -> tuple[Targets, BankState]:
    kept, generations = [], dict(told.generations)
    for change in told.changes:
        host = targets.banks[bank]
        if change.before != host.digests.get(change.name):
            logger.warning(
                "%s:%s: the bank has another module of this name now, which is served",
                bank,
                change.name,
            )
            generations[change.name] = generations.get(change.name, 1) + 1
            continue
        try:
            targets = _made(targets, host, change, sources)
        except MergerouteError as error:
            logger.warning("%s:%s could not be brought back: %s", bank, change.name, error)
            change = change.model_copy(update={"error": str(error)})
            targets = _withheld(targets, host, change.name)
        kept.append(change)
    return targets, told.model_copy(update={"changes": tuple(kept), "generations": generations})


def _made(targets: Targets, host: HostedBank, change: ModuleChange, sources: Sources) -> Targets:
    if change.digest is None:
        return _without(targets, host, change.name)
    if targets.is_taken(change.name):
        raise ApiError(f"{change.name!r} is the name of a bank or a backbone now")
    folder = sources.folder(change.path, name=change.name)
    loaded = introduced(targets, host, change.model_copy(update={"path": str(folder)}))
    if loaded.retired:
        host.release(change.name)
    return loaded.targets


def _without(targets: Targets, host: HostedBank, name: str) -> Targets:
    after = host.without_module(name)
    after.check_router()
    host.release(name)
    return targets.replacing(host, after)


def _withheld(targets: Targets, host: HostedBank, name: str) -> Targets:
    """Rather nothing than what was replaced on purpose; where the router cannot do without it, it
    answers after all.
    """
    if name not in host.digests:
        return targets
    try:
        return _without(targets, host, name)
    except BankError as error:
        logger.warning("%s:%s answers as it is on disk: %s", host.bank.name, name, error)
        return targets
