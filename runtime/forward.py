"""Forward: one pass of the model over the chunks of a step, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import KVCache, PackedBatch, packed
from .blending import BlendPlan, blending
from .module_stack import ModuleStack
from .packing import blend_plan, last_rows, pack, pad_rows
from .prefix_cache import Reuse
from .prompt_logprobs import Scores, prompt_scores
from .sampling import Sampled, sample
from .scheduler import Chunk, Sequence


@dataclass(frozen=True)
class Computed:
    """What a forward gave. samples: of sequences whose last chunk it held."""

    chunks: list[Chunk]
    samples: dict[Sequence, Sampled | None] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    def is_sound(self, chunk: Chunk) -> bool:
        """Whether the logits that a chunk was asked for are numbers."""
        unsampled = chunk.is_last and self.samples[chunk.sequence] is None
        return not unsampled and self.scores.get(chunk.sequence, []) is not None


class Forward:
    """A model with the modules that are resident in it. One thread runs it, the engine's.

    cache: the keys and values of the slots.
    """

    def __init__(self, model: Any, stack: ModuleStack, cache: KVCache) -> None:  # noqa: ANN401
        self._model = model
        self._stack = stack
        self.cache = cache

    def reuse(self, reuse: Reuse) -> None:
        """Copy the keys and values of a prefix to the slot that goes on from it."""
        if reuse.source != reuse.slot:
            self.cache.copy_prefix(reuse.source, reuse.slot, reuse.length)

    def compute(self, chunks: list[Chunk]) -> Computed:
        """Run chunks, then sample and score what they ask for. Nothing but the cache changes: a
        chunk may be computed again.
        """
        spans, ids, asked_rows = pack(chunks)
        device = self._model.device
        batch = PackedBatch(spans, device=device, cache=self.cache)
        inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": batch.positions[None],
            "use_cache": False,
        }
        kept_rows = pad_rows(asked_rows)
        with packed(batch), blending(self._blend_plan(chunks, kept_rows)):
            if not asked_rows:
                self._model.base_model(**inputs)
                return Computed(chunks)
            keep = torch.tensor(kept_rows, device=device)
            logits = self._model(**inputs, logits_to_keep=keep).logits[0, : len(asked_rows)]
        scores = prompt_scores(chunks, logits)
        ends = [chunk.sequence for chunk in chunks if chunk.is_last]
        if scores:
            logits = logits[last_rows(chunks)]
        sampled = sample(logits, [s.sampling for s in ends]) if ends else []
        return Computed(chunks, dict(zip(ends, sampled, strict=True)), scores)

    def _blend_plan(self, chunks: list[Chunk], kept_rows: list[int]) -> BlendPlan | None:
        """Gates per row, and segments; see `blend_plan`."""
        if not any(chunk.sequence.digests for chunk in chunks):
            return None
        gates = torch.stack([self._gates(chunk.sequence) for chunk in chunks])
        counts = torch.tensor([chunk.count for chunk in chunks], device=gates.device)
        return blend_plan(chunks, gates.repeat_interleave(counts, 0), self._stack, kept_rows)

    def _gates(self, sequence: Sequence) -> Tensor:
        """The sequence's gates, [R]; R changes when modules come and go."""
        if sequence.gates is None or sequence.gates.shape[0] != self._stack.ranks:
            sequence.gates = self._stack.gates(sequence.blend)
        return sequence.gates
