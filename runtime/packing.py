"""From planned chunks to one packed batch."""

from __future__ import annotations

from itertools import accumulate, takewhile

from torch import Tensor

from .attention import Span
from .blending import BlendPlan, Gated, Part, Segment
from .gating import GateTable, Routed, Smoother
from .module_stack import ModuleStack
from .scheduler import Chunk
from .types import TokenGate

Run = tuple[int, list[str]]
"""Neighbouring rows of one sequence: how many, and the digests that change them."""

_SLOW_COUNTS = range(7, 16)
"""On CPU, MKL multiplies the head with so many rows in 1.2 to 2.2 times the time of 16 rows."""


def pack(chunks: list[Chunk]) -> tuple[list[Span], list[int], list[int]]:
    """Spans, token ids, and the rows whose logits are asked for: of each chunk its last ones."""
    spans: list[Span] = []
    ids: list[int] = []
    kept_rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        start = len(ids)
        ids += sequence.tokens[sequence.computed : sequence.computed + chunk.count]
        spans.append(Span(sequence.slot, start, len(ids), sequence.computed))
        kept_rows += range(len(ids) - chunk.kept_rows, len(ids))
    return spans, ids, kept_rows


def last_rows(chunks: list[Chunk]) -> list[int]:
    """Of the rows whose logits are asked for, those after which a token is sampled."""
    stops = accumulate(chunk.kept_rows for chunk in chunks)
    return [stop - 1 for chunk, stop in zip(chunks, stops, strict=True) if chunk.is_last]


def pad_rows(rows: list[int]) -> list[int]:
    """The rows to give the head: the last is repeated where more rows take less time."""
    if len(rows) not in _SLOW_COUNTS:
        return rows
    return rows + rows[-1:] * (_SLOW_COUNTS.stop - len(rows))


def blend_plan(
    chunks: list[Chunk], gates: Tensor, stack: ModuleStack, kept_rows: list[int]
) -> BlendPlan:
    """How a forward over these chunks blends. Parts that no resident module changes are left out.

    gates: [t, R]. kept_rows: the rows whose logits are asked for, chunk by chunk.
    """
    segments = blend_segments(_runs(chunks, "inner", stack), stack)
    inner = Gated(gates, segments, routed_rows(chunks, stack))
    if not stack.changes_beside_inner:
        return BlendPlan(inner)
    kept = gates[kept_rows]
    return BlendPlan(
        inner,
        embedding=_gated(gates, _runs(chunks, "embedding", stack), stack),
        head=_gated(kept, _kept_runs(chunks, "head", stack), stack),
        vectors=_slotted(gates, _runs(chunks, "vectors", stack), stack),
        head_vectors=_slotted(kept, _kept_runs(chunks, "head_vectors", stack), stack),
    )


def blend_segments(runs: list[Run], stack: ModuleStack) -> tuple[Segment, ...]:
    """Single rows come first and share a segment; each longer run gets its own, joined with the
    one before when both need the same ranks. Rows that nothing changes are in none.
    """
    segments: list[Segment] = []
    decodes = [digests for _, digests in takewhile(lambda run: run[0] == 1 and run[1], runs)]
    start = 0
    if decodes:
        needed = [digest for digests in decodes for digest in digests]
        segments.append(Segment(0, len(decodes), stack.rank_slices(needed)))
    for count, digests in runs:
        stop = start + count
        if digests and start >= len(decodes):
            ranks = stack.rank_slices(digests)
            if segments and segments[-1].stop == start and segments[-1].ranks == ranks:
                segments[-1] = Segment(segments[-1].start, stop, ranks)
            else:
                segments.append(Segment(start, stop, ranks))
        start = stop
    return tuple(segments)


def routed_rows(chunks: list[Chunk], stack: ModuleStack) -> tuple[Routed, ...]:
    """The rows whose modules are weighed by token; those that follow equal gates are one."""
    pieces: dict[TokenGate, list[tuple[int, int, Smoother | None]]] = {}
    tables: dict[TokenGate, GateTable] = {}
    start = 0
    for chunk in chunks:
        stop = start + chunk.count
        if (table := chunk.sequence.table) is not None:
            tables[table.gate] = table
            pieces.setdefault(table.gate, []).append((start, stop, chunk.sequence.smoother))
        start = stop
    return tuple(
        Routed(table, stack.spread(gate.modules), tuple(pieces[gate]))
        for gate, table in tables.items()
    )


def _runs(chunks: list[Chunk], part: Part, stack: ModuleStack) -> list[Run]:
    changing = stack.changing(part)
    return [
        (chunk.count, [digest for digest in chunk.sequence.digests if digest in changing])
        for chunk in chunks
    ]


def _kept_runs(chunks: list[Chunk], part: Part, stack: ModuleStack) -> list[Run]:
    runs = zip(chunks, _runs(chunks, part, stack), strict=True)
    return [(chunk.kept_rows, digests) for chunk, (_, digests) in runs if chunk.kept_rows]


def _gated(gates: Tensor, runs: list[Run], stack: ModuleStack) -> Gated | None:
    segments = blend_segments(runs, stack)
    return Gated(gates, segments) if segments else None


def _slotted(gates: Tensor, runs: list[Run], stack: ModuleStack) -> Gated | None:
    """As `_gated` for vectors: neighbouring rows that any module changes are one segment."""
    segments: list[Segment] = []
    start = 0
    for count, digests in runs:
        stop = start + count
        if digests and segments and segments[-1].stop == start:
            segments[-1] = Segment(segments[-1].start, stop, ())
        elif digests:
            segments.append(Segment(start, stop, ()))
        start = stop
    return Gated(stack.slot_gates(gates), tuple(segments)) if segments else None
