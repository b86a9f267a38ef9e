"""Server-sent events of a server, as they come in pieces of bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from ...adapters.errors import EngineError

_MOST_BYTES = 64 << 20


async def data_of(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """What the events hold after `data: `, one at a time; comments and other fields are left out.

    Lines end with line feeds alone: JSON may hold other characters that Python would end a line at.

    Raises:
        EngineError: an event is too long to be one.
    """
    kept = bytearray()
    async for piece in pieces:
        kept += piece
        *lines, rest = kept.split(b"\n")
        kept = bytearray(rest)
        if len(kept) > _MOST_BYTES:
            raise EngineError(f"the server sent an event of over {_MOST_BYTES:,} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield bytes(line[5:].strip())
