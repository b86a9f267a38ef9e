"""Steps: what an engine does over and over while requests run."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import replace

from .engine import EngineStats
from .engine_modules import EngineModules
from .events import token_event
from .forward import Computed, Forward
from .prefix_cache import Reuse
from .sampling import Sampled
from .scheduler import Chunk, Scheduler, Sequence
from .types import FinishReason, TokenEvent

logger = logging.getLogger(__name__)

_FAILED = "the engine failed on this request: the server's log says why"
_UNSOUND = "the logits hold NaN or inf: the blend's weights are too large"


class Steps:
    """One step after another, each a forward for everything that runs. All but `unfinished` and
    `counts` is for the engine's thread.

    lock: the engine's: it guards which requests run and wait, and the counts of `modules`.
    counts: since the start; the load of the moment is left to the engine.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        forward: Forward,
        *,
        modules: EngineModules,
        lock: threading.Lock,
    ) -> None:
        self.counts = EngineStats()
        self._scheduler = scheduler
        self._forward = forward
        self._modules = modules
        self._lock = lock
        modules.on_moved = self._forget_gates

    def unfinished(self) -> list[Sequence]:
        """The requests that run, then those that wait; for any thread."""
        with self._lock:
            return [*self._scheduler.running, *self._scheduler.waiting]

    def cancel_all(self) -> None:
        """End what is unfinished."""
        for sequence in self.unfinished():
            self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))

    def step(self) -> None:
        """One forward for everything that runs, then its tokens."""
        for sequence in self.unfinished():
            if sequence.generation.is_cancelled:
                self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))
            elif sequence.is_late:
                self._finish(sequence, TokenEvent(finish_reason=FinishReason.TIMEOUT))
        self._scheduler.admit(self._prepare)
        if chunks := self._scheduler.plan():
            for computed in self._computed(chunks):
                self._advance(computed)

    def _prepare(self, sequence: Sequence, reuse: Reuse) -> None:
        """Ready a sequence that was given a slot: copy the prefix it reuses."""
        try:
            self._forward.reuse(reuse)
        except Exception:
            self._fail(sequence, _FAILED)
            return
        self._scheduler.prefixes.contents[reuse.slot].valid = reuse.length
        sequence.generation.cached_tokens = reuse.length
        sequence.generation.admitted_at = time.perf_counter()
        self._count(
            admitted=1,
            reused=int(reuse.length > 0),
            reused_tokens=reuse.length,
            prompt_tokens=len(sequence.tokens),
        )

    def _computed(self, chunks: list[Chunk]) -> list[Computed]:
        """The chunks with what was sampled. When a forward fails each chunk is tried alone, and so
        is each whose logits are no numbers: decodes share products with their neighbours' modules,
        which may overflow in a half type. So the one at fault ends and its neighbours go on;
        computing changes nothing else.
        """
        try:
            computed = self._forward.compute(chunks)
            sound = [chunk for chunk in chunks if computed.is_sound(chunk)]
        except Exception:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, _FAILED)
                return []
            computed, sound = Computed([]), []
        if len(chunks) == 1 or len(sound) == len(chunks):
            return [computed]
        alone = [chunk for chunk in chunks if chunk not in sound]
        rest = [result for chunk in alone for result in self._computed([chunk])]
        return [replace(computed, chunks=sound), *rest]

    def _advance(self, computed: Computed) -> None:
        """The chunks are in the cache: tell of the tokens that were sampled."""
        self._count(steps=1, rows=len(computed.chunks))
        for chunk in computed.chunks:
            is_last, sequence = chunk.is_last, chunk.sequence
            self._scheduler.advance(chunk)
            scores = computed.scores.get(sequence, [])
            if scores is None:
                self._fail(sequence, _UNSOUND)
                continue
            sequence.generation.prompt_scores += scores
            if is_last:
                self._deliver(sequence, computed.samples[sequence])

    def _deliver(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """Append a sampled token, and tell the caller."""
        if sampled is None:
            self._fail(sequence, _UNSOUND)
            return
        self._scheduler.gained(sequence)
        if not sequence.limit:
            self._finish(sequence, TokenEvent(finish_reason=FinishReason.LENGTH))
            return
        sequence.tokens.append(sampled.token_id)
        sequence.generated += 1
        self._count(generated_tokens=1)
        constraint = sequence.sampling.constraint
        if constraint and not constraint.take(sampled.token_id):
            self._fail(sequence, f"the answer cannot keep its form: {constraint.fault}")
            return
        try:
            event = token_event(sequence, sampled)
        except Exception:
            self._fail(sequence, _FAILED)
            return
        if event.finish_reason:
            self._finish(sequence, event)
        else:
            sequence.generation.deliver(event)

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End a sequence with an error; inside an except block, the log says which."""
        logger.error("a request failed: %s", message, exc_info=sys.exc_info()[0] is not None)
        self._finish(sequence, TokenEvent(finish_reason=FinishReason.ERROR, error=message))

    def _finish(self, sequence: Sequence, event: TokenEvent) -> None:
        """Free what the sequence held, then deliver its last event."""
        if sequence.is_over:
            return
        sequence.is_over = True
        with self._lock:
            self._scheduler.remove(sequence)
            self._modules.end_use(sequence.digests)
        try:
            self._modules.evict_unused(sequence.digests)
        finally:
            sequence.generation.deliver(event)

    def _forget_gates(self) -> None:
        for sequence in self._scheduler.running:
            sequence.gates = None

    def _count(self, **increments: int) -> None:
        current = self.counts
        self.counts = replace(
            current, **{name: getattr(current, name) + by for name, by in increments.items()}
        )
