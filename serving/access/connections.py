"""Connections that send their request in time, or are closed."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def connection_within(header_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, with a time for request line and headers: uvicorn itself waits for ever,
    and whoever sends a byte a minute could hold as many connections as there are.

    header_s: seconds from the connection, or from the first byte of a later request.
    """

    class Connection(H11Protocol):
        """One connection. Idle ones between two requests are uvicorn's own to close."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._rest()

        def _watch(self) -> None:
            """Run the clock while headers are awaited, and from the first of them alone."""
            if self.conn.their_state is not h11.IDLE:
                self._rest()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(header_s, self.transport.close)

        def _rest(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection
