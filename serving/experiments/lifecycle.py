"""What can be done with an experiment, from draft to conclusion. Each change is one transaction,
which reads, checks and writes; who made it and why is kept with the version that it makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import ApiError
from ..targets import AUTO, Targets
from .allocation import allocate, ramped
from .checks import check_same_assignment, check_target, check_targets, with_traffic
from .definition import Experiment
from .experiment_store import Experiments, StaleError, State, StoredExperiment
from .layers import Ranges, check_together, claim

_ACTIVE: tuple[State, ...] = ("running", "paused")


@dataclass(frozen=True)
class Author:
    """Who makes a change, and why. etag: of the version it is made of, or several with commas, as
    If-Match has them; None: whichever it is.
    """

    who: str
    reason: str = ""
    etag: str | None = None

    def check(self, stored: StoredExperiment) -> None:
        """Refuse to change what is not as the author saw it.

        Raises:
            StaleError: somebody else changed it.
        """
        if self.etag is None:
            return
        given = {each.strip().removeprefix("W/") for each in self.etag.split(",")}
        if given.isdisjoint(("*", stored.etag)):
            raise StaleError(stored.name, given=self.etag, etag=stored.etag)


def create(
    experiments: Experiments, document: Experiment, targets: Targets, author: Author
) -> StoredExperiment:
    """A draft.

    Raises:
        ApiError: a target cannot be asked for, or the name is taken.
    """
    if targets.is_known(document.name):
        raise ApiError(
            f"{document.name!r} is the name of a bank, a module or a backbone: choose another",
            status=409,
            param="name",
            code="name_taken",
        )
    check_targets(document, targets)
    return experiments.create(document.salted(), who=author.who)


def start(
    experiments: Experiments, name: str, targets: Targets, author: Author
) -> StoredExperiment:
    """Let a draft begin, or a paused one go on: everybody keeps the variant they had.

    Raises:
        ApiError: it does not fit what runs, a target is gone, or there is nothing to start.
    """
    stored = _read(experiments, name, author, "start", ("draft", "paused"))
    check_targets(stored.document, targets)
    others = [s for s in experiments.list() if s.state in _ACTIVE and s.name != name]
    check_together(stored.document, [other.document for other in others])
    changed = replace(
        stored,
        state="running",
        allocation=stored.allocation or allocate(stored.document.weights),
        ranges=stored.ranges or _claimed(others, stored.document),
    )
    return _written(experiments, stored, changed, author, "started")


def pause(experiments: Experiments, name: str, author: Author) -> StoredExperiment:
    """The control answers whoever asks for it, and nothing is counted, until it goes on.

    Raises:
        ApiError: it does not run.
    """
    stored = _read(experiments, name, author, "pause", ("running",))
    return _written(experiments, stored, replace(stored, state="paused"), author, "paused")


def ramp(
    experiments: Experiments,
    name: str,
    author: Author,
    *,
    weights: Mapping[str, float] | None = None,
    traffic: float | None = None,
) -> StoredExperiment:
    """Change weights, traffic, or both; no more units change their variant than must.

    Raises:
        ApiError: they are no shares, the layer has no room, or it is concluded.
    """
    stored = _read(experiments, name, author, "change", ("draft", *_ACTIVE))
    document = stored.document if weights is None else stored.document.with_weights(weights)
    document = document if traffic is None else with_traffic(document, traffic)
    return _written(experiments, stored, _refitted(experiments, stored, document), author, "ramped")


def redefine(
    experiments: Experiments, document: Experiment, targets: Targets, author: Author
) -> StoredExperiment:
    """Replace what an experiment says, but for what decides who gets which variant once it runs.

    Raises:
        ApiError: a target is gone, or it is no longer a draft and something else would change.
    """
    stored = _read(experiments, document.name, author, "change", ("draft", *_ACTIVE))
    document = document.salted(stored.document.salt)
    check_targets(document, targets)
    if stored.state != "draft":
        check_same_assignment(stored.document, document)
    return _written(
        experiments, stored, _refitted(experiments, stored, document), author, "redefined"
    )


def conclude(experiments: Experiments, name: str, author: Author) -> StoredExperiment:
    """End it: the control answers whoever asks for it, and its units are free for others.

    Raises:
        ApiError: it was never started, or is concluded.
    """
    stored = _read(experiments, name, author, "conclude", _ACTIVE)
    changed = replace(stored, state="concluded", ranges=())
    return _written(experiments, stored, changed, author, "concluded")


def promote(
    experiments: Experiments, name: str, variant: str, targets: Targets, author: Author
) -> StoredExperiment:
    """End it, and let a variant's target answer `auto`; what did before is remembered.

    Raises:
        ApiError: there is no such variant, its target is gone, or it was never started, or is
            promoted already.
    """
    stored = _read(experiments, name, author, "promote", (*_ACTIVE, "concluded"))
    chosen = stored.document.by_name.get(variant)
    if chosen is None:
        known = ", ".join(stored.document.by_name)
        raise ApiError(f"there is no variant {variant!r}; there are: {known}", param="variant")
    if stored.promoted is not None:
        raise ApiError(
            f"{stored.promoted!r} of {name!r} is promoted: POST /v1/experiments/{name}/rollback "
            "first",
            status=409,
            param="variant",
            code="promoted",
        )
    check_target(variant, chosen.target, targets, param="variant")
    changed = replace(stored, state="concluded", ranges=(), promoted=variant)
    after = _written(experiments, stored, changed, author, f"promoted {variant}")
    default = experiments.default_target()  # which is what answers a variant's `auto`
    target = default.target if default and chosen.target == AUTO else chosen.target
    experiments.set_default(target, experiment=name, variant=variant, who=author.who)
    return after


def rollback(experiments: Experiments, name: str, author: Author) -> StoredExperiment:
    """Undo the promotion: what answered `auto` before it does so again.

    Raises:
        ApiError: the last promotion was not of this experiment.
    """
    stored = experiments.get(name)
    author.check(stored)
    default = experiments.default_target()
    if default is None or default.experiment != name:
        rest = f"; the last is of {default.experiment!r}: roll that back first" if default else ""
        raise ApiError(
            f"there is no promotion of {name!r} to roll back{rest}",
            status=409,
            code="not_promoted",
        )
    experiments.rollback_default(who=author.who)
    return _written(experiments, stored, replace(stored, promoted=None), author, "rolled back")


def delete(experiments: Experiments, name: str, author: Author) -> None:
    """Take a draft, or a concluded one, away; its records stay.

    Raises:
        ApiError: it runs or is paused, or `auto` answers from its variant.
    """
    stored = _read(experiments, name, author, "delete", ("draft", "concluded"))
    if any(promotion.experiment == name for promotion in experiments.promotions()):
        raise ApiError(
            f"{name!r} is promoted: POST /v1/experiments/{name}/rollback first",
            status=409,
            code="promoted",
        )
    experiments.delete(name, stored.etag, who=author.who)


def _read(
    experiments: Experiments,
    name: str,
    author: Author,
    verb: str,
    allowed: tuple[State, ...],
) -> StoredExperiment:
    """The experiment, where it is in a state that allows the change."""
    stored = experiments.get(name)
    author.check(stored)
    if stored.state not in allowed:
        raise ApiError(
            f"the experiment {name!r} is {stored.state}: to {verb} it, it must be "
            f"{' or '.join(allowed)}",
            status=409,
            code="wrong_state",
        )
    return stored


def _written(
    experiments: Experiments,
    stored: StoredExperiment,
    changed: StoredExperiment,
    author: Author,
    what: str,
) -> StoredExperiment:
    said = f"{what}: {author.reason}" if author.reason else what
    return experiments.replace(stored.etag, changed, who=author.who, what=said)


def _refitted(
    experiments: Experiments, stored: StoredExperiment, document: Experiment
) -> StoredExperiment:
    """With another document, and what follows for one that has been started."""
    if stored.allocation is None:
        return replace(stored, document=document)
    others = [s for s in experiments.list() if s.state in _ACTIVE and s.name != stored.name]
    ranges = stored.ranges and _claimed(others, document, held=stored.ranges)
    allocation = ramped(stored.allocation, document.weights)
    return replace(stored, document=document, allocation=allocation, ranges=ranges)


def _claimed(others: list[StoredExperiment], document: Experiment, *, held: Ranges = ()) -> Ranges:
    taken = [other.ranges for other in others if other.document.layer == document.layer]
    return claim(taken, document.traffic, held=held)
