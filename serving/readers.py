"""Clients that read their answer, or are let go."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def reading_within(base: type[H11Protocol], stalled_s: float) -> type[H11Protocol]:
    """A protocol that cuts the connection when the client has taken no byte of what was sent for so
    many seconds: uvicorn itself waits for ever, with the answer's generation behind it.
    """

    class Reading(base):  # type: ignore[valid-type, misc]
        """One connection. What does not go out at once is watched until it has."""

        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # writing pauses as soon as a byte is kept

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._be_done()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._be_done()

        def _wait(self) -> None:
            kept = self.transport.get_write_buffer_size()
            self._patience = self.loop.call_later(stalled_s, self._look, kept)

        def _look(self, kept: int) -> None:
            if self.transport.get_write_buffer_size() < kept:
                self._wait()
            else:
                self.transport.abort()  # closing would wait for the reader

        def _be_done(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Reading
