"""Which sequences run, and which of their tokens go into the next forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..adapters.blend import Blend
from ..adapters.errors import QueueFullError
from .detokenize import TextStream
from .engine import Generation
from .gating import GateTable, Smoother
from .prefix_cache import PrefixCache, Reuse
from .sampling import SamplingState


@dataclass(eq=False, repr=False)
class Sequence:
    """One request on its way.

    tokens: prompt and generated tokens. computed: how many of them have keys and values.
    limit: most tokens it may generate. end_tokens: ids that end it.
    table: how its modules are weighed by token; None: not at all. smoother: where that is smoothed.
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


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token is sampled after this chunk."""
        return self.count == self.sequence.pending


class Scheduler:
    """First come, first served; running sequences decode in every step, prompts fill the rest.

    slots: most sequences that run at once. token_budget: most tokens in one forward.
    max_waiting: most sequences that wait for a slot.
    """

    def __init__(self, *, slots: int, token_budget: int, max_waiting: int) -> None:
        self.prefixes = PrefixCache(slots)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._token_budget = token_budget
        self._max_waiting = max_waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Thread-safe: one append.

        Raises:
            QueueFullError: too many wait already.
        """
        if len(self.waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait, the limit is {self._max_waiting} "
                "(max_waiting): try again later"
            )
        self.waiting.append(sequence)

    def admit(self, on_admit: Callable[[Sequence, Reuse], None]) -> None:
        """Give free slots to waiting sequences; `on_admit` readies each before it runs."""
        while self.waiting and self.prefixes.free:
            sequence = self.waiting.popleft()
            reuse = self.prefixes.claim(sequence.key, sequence.tokens)
            sequence.slot, sequence.computed = reuse.slot, reuse.length
            self.running.append(sequence)
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
        self.prefixes.contents[sequence.slot].valid = sequence.computed

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.prefixes.release(sequence.slot)
        sequence.slot = None


def _urgency(sequence: Sequence) -> int:
    """Decodes that blend, decodes that do not, prompts; a stable sort keeps the order within."""
    if sequence.pending > 1:
        return 2
    return 0 if sequence.digests else 1
