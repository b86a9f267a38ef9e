"""Router: a scorer and a policy in a row."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..adapters.blend import Blend
from ..adapters.errors import RouterError
from .base import Card, Decision, Query, Scorer, Scores
from .policies import Policy
from .policy_steps import Weighing, ranked
from .token_routing import TokenRouting


class Router(Protocol):
    """A query in, a decision out. Immutable: what grows or shrinks is a new one."""

    @property
    def name(self) -> str:
        """What responses and metrics call it."""

    @property
    def digest(self) -> str:
        """Of its content: routers with one digest decide alike."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that it may name."""

    def route(self, query: Query) -> Decision:
        """Decide the blend of one query; the same query gets the same decision.

        Raises:
            RouterError: the scores are not finite, or the query cannot be read.
        """

    def route_all(self, queries: Sequence[Query]) -> list[Decision]:
        """Decide many, reading them together: faster; the last digits of a score may differ."""

    def with_module(self, card: Card, *, is_same: bool = False) -> Router:
        """This router and one module more; see `Scorer.with_module`. What was learned of a module
        that had the name before is forgotten, unless it is the same module by content and the
        card has no samples."""

    def without_module(self, name: str) -> Router:
        """This router without a module; the scores of the others stay."""


@dataclass(frozen=True)
class RequestRouter:
    """Decides once for the whole query.

    digest: of the router's files. renamed: where modules that the scorer knows have gone since, by
    their old names; the decision speaks of the new ones, and weights that meet there add up.
    """

    scorer: Scorer
    policy: Policy
    digest: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The scorer's."""
        return self.scorer.name

    @property
    def modules(self) -> tuple[str, ...]:
        """By their new names."""
        return tuple(dict.fromkeys(self.renamed.get(n, n) for n in self.scorer.modules))

    def route(self, query: Query) -> Decision:
        """Score, then weigh; see `Router.route`."""
        started = time.perf_counter()
        decision = self._decide(self.scorer.score(query))
        return replace(decision, milliseconds=(time.perf_counter() - started) * 1000)

    def route_all(self, queries: Sequence[Query]) -> list[Decision]:
        """See `Router.route_all`; only cached signals gain."""
        for signal in self.scorer.signals if queries else ():
            signal.read(queries)
        return [self.route(query) for query in queries]

    def with_module(self, card: Card, *, is_same: bool = False) -> RequestRouter:
        """See `Router.with_module`."""
        if card.name in self.renamed:
            raise RouterError(
                f"the router knows {card.name!r} as folded into {self.renamed[card.name]!r}: "
                "choose another name, or fit the router again"
            )
        scorer = self.scorer
        for known in self._known_as(card.name) if card.samples or not is_same else ():
            scorer = scorer.without_module(known).with_module(Card(known))  # rules still name it
        return replace(self, scorer=scorer.with_module(card))

    def without_module(self, name: str) -> RequestRouter:
        """See `Router.without_module`; of a module that others were folded into, all of them go."""
        scorer = self.scorer
        for known in self._known_as(name):
            scorer = scorer.without_module(known)
        renamed = {old: new for old, new in self.renamed.items() if new != name}
        return replace(self, scorer=scorer, renamed=renamed)

    def _known_as(self, name: str) -> list[str]:
        """What the scorer calls a module, or the modules that were folded into it."""
        return [old for old in self.scorer.modules if self.renamed.get(old, old) == name]

    def _decide(self, scores: Scores | None) -> Decision:
        if scores is None or not scores.logits:
            return self._backbone(scores)
        figures = [*scores.logits.values(), scores.none or 0.0, scores.distance or 0.0]
        if not all(map(math.isfinite, figures)):
            raise RouterError("the scores are not finite: the prompt or the router is damaged")
        weighing = Weighing(weights=dict(scores.logits), scores=scores)
        if not scores.is_certain:
            weighing = self.policy.apply(weighing)
        shares = self._renamed(weighing.confidences or scores.logits)
        best, *others = ranked(shares)
        return Decision(
            blend=self._blend(weighing.weights),
            scores=shares,
            confidence=best[1] if weighing.confidences else 1.0,
            distance=scores.distance,
            typicality=_typicality(scores),
            threshold=weighing.threshold,
            runner_up=others[0][0] if others else None,
            router=self.name,
            reason=self._reason(weighing),
            is_certain=scores.is_certain,
            basis={self.renamed.get(n, n): basis for n, basis in scores.basis.items()},
        )

    def _backbone(self, scores: Scores | None) -> Decision:
        """What is decided where nothing has a score."""
        if scores is None:
            reason = "no rule matches: the backbone answers"
        else:
            reason = scores.reason or "no module is known: the backbone answers"
        is_certain = scores is not None and scores.is_certain
        return Decision(
            blend=Blend(),
            confidence=1.0 if is_certain else 0.0,
            router=self.name,
            reason=reason,
            is_certain=is_certain,
        )

    def _blend(self, weights: Mapping[str, float]) -> Blend:
        return Blend(weights).renamed({name: self.renamed.get(name, name) for name in weights})

    def _renamed(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Shares by new name; the order is that of the first old one."""
        sums: dict[str, float] = {}
        for name, share in shares.items():
            new = self.renamed.get(name, name)
            sums[new] = sums.get(new, 0.0) + share
        return sums

    def _reason(self, weighing: Weighing) -> str:
        """The scorer's reason and the policy's; how modules are known, and where they have gone."""
        reasons = [reason for reason in (weighing.scores.reason, weighing.reason) if reason]
        basis = weighing.scores.basis
        known = [f"{n} is known by {basis[n]}" for n in Blend(weighing.weights) if n in basis]
        moved = [
            f"{name} is folded into {self.renamed[name]}"
            for name in Blend(weighing.weights)
            if name in self.renamed
        ]
        return "; ".join([*(reasons or ["every prompt gets this blend"]), *known, *moved])


@dataclass(frozen=True)
class TokenRouter:
    """Leaves the choice to the layers, token by token."""

    routing: TokenRouting
    digest: str = ""
    modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method's."""
        return self.routing.method

    def route(self, query: Query) -> Decision:
        """The same decision for every query."""
        del query
        return token_decision(self.routing)

    def route_all(self, queries: Sequence[Query]) -> list[Decision]:
        """The same decision for all."""
        return [self.route(query) for query in queries]

    def with_module(self, card: Card, *, is_same: bool = False) -> TokenRouter:
        """Nothing to learn: the module's own directions speak for it."""
        del card, is_same
        return self

    def without_module(self, name: str) -> TokenRouter:
        """Nothing to forget."""
        del name
        return self


def token_decision(routing: TokenRouting) -> Decision:
    """What is decided where layers choose for every token."""
    return Decision(
        blend=Blend(),
        router=routing.method,
        reason=f"{routing.method} picks modules in every layer, token by token",
        token_routing=routing,
    )


def _typicality(scores: Scores) -> float | None:
    """The conformal p-value of the prompt's distance.

    Source: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 2.2.
    """
    if scores.distance is None or not scores.calibration:
        return None
    farther = len(scores.calibration) - bisect.bisect_left(scores.calibration, scores.distance)
    return (farther + 1) / (len(scores.calibration) + 1)
