"""From planned chunks to one packed batch."""

from __future__ import annotations

from itertools import takewhile

from .attention import Span
from .blended import ModuleStack, Segment
from .scheduler import Chunk

_SLOW_COUNTS = range(7, 16)
"""On CPU, MKL multiplies the head with so many rows in 1.2 to 2.2 times the time of 16 rows."""


def pack(chunks: list[Chunk]) -> tuple[list[Span], list[int], list[int]]:
    """Spans, token ids, and the rows after which a token is sampled."""
    spans: list[Span] = []
    ids: list[int] = []
    last_rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        start = len(ids)
        ids += sequence.tokens[sequence.computed : sequence.computed + chunk.count]
        spans.append(Span(sequence.slot, start, len(ids), sequence.computed))
        if chunk.is_last:
            last_rows.append(len(ids) - 1)
    return spans, ids, last_rows


def pad_rows(rows: list[int]) -> list[int]:
    """The rows to give the head: the last is repeated where more rows take less time."""
    if len(rows) not in _SLOW_COUNTS:
        return rows
    return rows + rows[-1:] * (_SLOW_COUNTS.stop - len(rows))


def blend_segments(chunks: list[Chunk], stack: ModuleStack) -> tuple[Segment, ...]:
    """Single rows come first and share a segment; each longer chunk gets its own, joined with the
    one before when both need the same ranks. Rows without a blend are in none.
    """
    segments: list[Segment] = []
    singles = takewhile(lambda chunk: chunk.count == 1 and chunk.sequence.blend, chunks)
    decodes = [chunk.sequence.blend for chunk in singles]
    start = 0
    if decodes:
        segments.append(Segment(0, len(decodes), stack.rank_slices(decodes)))
    for chunk in chunks:
        stop = start + chunk.count
        if chunk.sequence.blend and start >= len(decodes):
            ranks = stack.rank_slices([chunk.sequence.blend])
            if segments and segments[-1].stop == start and segments[-1].ranks == ranks:
                segments[-1] = Segment(segments[-1].start, stop, ranks)
            else:
                segments.append(Segment(start, stop, ranks))
        start = stop
    return tuple(segments)
