"""Which sequences run, and which of their tokens go into the next forward."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..adapters.blend import Blend
from ..adapters.errors import QueueFullError
from .detokenize import TextStream
from .engine import Generation
from .fair_queue import FairQueue, Tenant
from .gating import GateTable, Smoother
from .prefix_cache import PrefixCache, Reuse
from .sampling import SamplingState

_TOKEN_COST = 2.0
"""Of a token that is generated; of one that is prefilled it is 1 (Sheng et al. 2024, section 5)."""

_RECENT = 64
"""How many ends tell how fast requests run of late."""


@dataclass(eq=False, repr=False)
class Sequence:
    """One request on its way.

    tokens: prompt and generated tokens. computed: how many of them have keys and values.
    limit: most tokens it may generate. end_tokens: ids that end it.
    table: how its modules are weighed by token; None: not at all. smoother: where that is smoothed.
    tenant: who shares the slots with others. deadline: on the monotonic clock; None: there is none.
    """

    generation: Generation
    blend: Blend
    sampling: SamplingState
    limit: int
    end_tokens: frozenset[int]
    text: TextStream | None = None
    computed: int = 0
    slot: int | None = None
    gates: Tensor | None = None
    generated: int = field(default=0)
    is_over: bool = False
    table: GateTable | None = None
    smoother: Smoother | None = None
    tenant: Tenant = None
    deadline: float | None = None

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The modules it runs on, by blend or by token."""
        routed = self.table.gate.modules if self.table else ()
        return tuple(dict.fromkeys([*self.blend, *routed]))

    @property
    def key(self) -> Hashable | None:
        """What its keys and values depend on besides its tokens. None where scores are smoothed:
        what a prefix left behind is not kept.
        """
        if self.smoother is not None:
            return None
        return self.blend, self.table.gate if self.table else None

    @property
    def tokens(self) -> list[int]:
        """Prompt and generated tokens."""
        return self.sampling.tokens

    @property
    def pending(self) -> int:
        """Tokens that have no keys and values yet: 1 while decoding, more during prefill."""
        return len(self.tokens) - self.computed

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are scored."""
        return self.sampling.params.prompt_logprobs is not None


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token is sampled after this chunk."""
        return self.count == self.sequence.pending

    @property
    def scored(self) -> int:
        """How many of the tokens, all or none, tell of the prompt's token that follows each."""
        is_prompt = not self.sequence.generated and self.sequence.scores_prompt
        return self.count if is_prompt else 0

    @property
    def kept_rows(self) -> int:
        """How many of the tokens, the last ones, have their logits asked for."""
        return self.scored or int(self.is_last)


class Scheduler:
    """Slots go to tenants in turn; running sequences decode in every step, prompts fill the rest.

    slots: most sequences that run at once. token_budget: most tokens in one forward.
    max_waiting: most sequences that wait for a slot. A tenant may wait with as many as there are
    places left besides, so that some are left for others however many tenants flood.
    Source: Choudhury and Hahne 1998, Dynamic Queue Length Thresholds, with a factor of 1.
    """

    def __init__(
        self,
        *,
        slots: int,
        token_budget: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prefixes = PrefixCache(slots)
        self.running: list[Sequence] = []
        self.waiting: FairQueue[Sequence] = FairQueue()
        self._token_budget = token_budget
        self._max_waiting = max_waiting
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_RECENT)  # since it was idle last, begin included

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one thread at a time.

        Raises:
            QueueFullError: too many wait already.
        """
        total, own = len(self.waiting), self.waiting.waiting(sequence.tenant)
        if total >= self._max_waiting:
            raise self._full(f"{total} requests wait, the limit is {self._max_waiting}")
        if sequence.tenant is not None and 0 < own >= self._max_waiting - total:
            raise self._full(
                f"{own} requests of {sequence.tenant!r} wait, and {self._max_waiting - total} "
                f"places of {self._max_waiting} are left for others"
            )
        if not (total or self.running):
            self._ends.append(self._clock())
        self.waiting.add(sequence.tenant, sequence)

    def _full(self, why: str) -> QueueFullError:
        return QueueFullError(f"{why} (max_waiting): try again later", retry_s=self.turnover_s)

    @property
    def turnover_s(self) -> int:
        """Seconds until those that wait now have run, at the rate of late; 1 to 60."""
        ends = tuple(self._ends)
        if len(ends) < 2:
            return 1
        seconds = len(self.waiting) * (self._clock() - ends[0]) / (len(ends) - 1)
        return min(max(math.ceil(seconds), 1), 60)

    def admit(self, on_admit: Callable[[Sequence, Reuse], None]) -> None:
        """Give free slots to waiting sequences; `on_admit` readies each before it runs."""
        while self.waiting and self.prefixes.free:
            sequence = self.waiting.pop()
            reuses = not sequence.scores_prompt
            reuse = self.prefixes.claim(sequence.key, sequence.tokens, reuses=reuses)
            sequence.slot, sequence.computed = reuse.slot, reuse.length
            self.running.append(sequence)
            self.waiting.charge(sequence.tenant, sequence.pending)
            on_admit(sequence, reuse)

    def plan(self) -> list[Chunk]:
        """The next forward: decodes that blend, decodes that do not, then prompts in order."""
        left = self._token_budget
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=_urgency):
            count = min(sequence.pending, left)
            if count:
                chunks.append(Chunk(sequence, count))
                left -= count
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache now."""
        sequence = chunk.sequence
        assert sequence.slot is not None
        sequence.computed += chunk.count
        if sequence.smoother is not None:
            sequence.smoother.commit()

    def gained(self, sequence: Sequence) -> None:
        """A sound token came of what is in the cache: others may reuse it, and it is paid for."""
        assert sequence.slot is not None
        self.prefixes.contents[sequence.slot].valid = sequence.computed
        self.waiting.charge(sequence.tenant, _TOKEN_COST)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence.tenant, sequence)
        else:
            self.running.remove(sequence)
            self.prefixes.release(sequence.slot)
            sequence.slot = None
            self._ends.append(self._clock())
        if not (self.running or len(self.waiting)):
            self._ends.clear()


def _urgency(sequence: Sequence) -> int:
    """Decodes that blend, decodes that do not, prompts; a stable sort keeps the order within."""
    if sequence.pending > 1:
        return 2
    return 0 if sequence.digests else 1
