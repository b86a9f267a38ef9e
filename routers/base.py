"""What a router takes and gives, and the protocols of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..adapters.blend import Blend

if TYPE_CHECKING:
    from .token_routing import TokenRouting


class Encode(Protocol):
    """Runs the first layers of the backbone."""

    def __call__(
        self, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], /
    ) -> list[Tensor]:
        """Token ids to hidden states after the layers asked for, [layers, t, hidden] a prompt."""


@dataclass(frozen=True)
class Turn:
    """What a user said once.

    token_ids: rendered as a conversation of its own, as the backbone sees it. text: the words
    alone, for signals and rules that read text.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Query:
    """What is routed.

    turns: the user's turns, at least one; the last is what is asked now. labels: what the request
    says about itself, for rules: headers as `header:NAME`, in lower case, and metadata by key.
    """

    turns: tuple[Turn, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, token_ids: Sequence[int] = (), text: str = "") -> Query:
        """A query of a single turn."""
        return cls((Turn(tuple(token_ids), text),))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the last turn."""
        return self.turns[-1].token_ids

    @property
    def text(self) -> str:
        """Of the last turn."""
        return self.turns[-1].text

    def up_to(self, count: int) -> Query:
        """The query as it was `count` turns into the conversation."""
        return Query(self.turns[:count], self.labels)


@dataclass(frozen=True)
class Card:
    """A module as it introduces itself to a router.

    samples: prompts that it serves. description: in a sentence, rendered as a prompt is.
    """

    name: str
    samples: tuple[Query, ...] = ()
    description: Query | None = None


@dataclass(frozen=True)
class Scores:
    """A scorer's opinion.

    logits: per module; any scale that a softmax understands.
    distance: how unlike the modules' own prompts this one is; None: the scorer cannot tell.
    calibration: the same of prompts of the modules that the scorer was not fitted on, ascending.
    none: a logit for no module at all; None: the scorer knows of no such prompts.
    is_certain: the logits are weights already, and no policy is asked.
    basis: by what the scorer knows modules that it was not fitted on: `10 samples`.
    reason: in words, where the scorer has one of its own.
    """

    logits: Mapping[str, float]
    distance: float | None = None
    calibration: Sequence[float] = ()
    none: float | None = None
    is_certain: bool = False
    basis: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


class Signal(Protocol):
    """What of a query a scorer looks at."""

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The queries' features, [n, d], float32."""


class Scorer(Protocol):
    """A query to a score per module. Immutable: what grows or shrinks is a new one."""

    @property
    def name(self) -> str:
        """What responses and metrics call the router."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that it may name."""

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What it reads, so that many queries can be read at once before they are scored."""

    def score(self, query: Query) -> Scores | None:
        """A score per module; None: the scorer has no opinion on this query."""

    def with_module(self, card: Card) -> Scorer:
        """This scorer and one module more, without fitting again; the other modules' scores stay.
        A module that the scorer has already is replaced; where nothing on the card is of use to
        it, the scorer stays as it is.

        Raises:
            RouterError: a sample cannot be read.
        """

    def without_module(self, name: str) -> Scorer:
        """This scorer without a module that may not be served any more."""


@dataclass(frozen=True)
class Decision:
    """What a router decided, and why.

    scores: weight of each module before it was cut and snapped. confidence: of the best one.
    distance: how unlike the modules' own prompts the prompt is, when the scorer can tell.
    typicality: the share of such prompts, held out, that are at least as unlike.
    threshold: the distance above which the router abstains, when its policy has one.
    basis: by what modules are known that the scorer was not fitted on.
    token_routing: the layers choose for every token; the blend is empty.
    is_certain: a rule or a fixed blend decided; nothing was weighed.
    strays: turns in a row, this one the last, that were no module's in a conversation that kept its
    blend.
    milliseconds: time the decision took.
    """

    blend: Blend
    scores: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 1.0
    distance: float | None = None
    typicality: float | None = None
    threshold: float | None = None
    runner_up: str | None = None
    router: str = "none"
    reason: str = ""
    basis: Mapping[str, str] = field(default_factory=dict)
    token_routing: TokenRouting | None = None
    is_certain: bool = False
    strays: int = 0
    milliseconds: float = 0.0

    @property
    def abstained(self) -> float:
        """The share that stays on the backbone."""
        return 0.0 if self.token_routing else self.blend.abstained

    @property
    def best(self) -> str | None:
        """The module with the largest weight; None: the backbone answers."""
        return max(self.blend, key=lambda name: self.blend[name]) if self.blend else None
