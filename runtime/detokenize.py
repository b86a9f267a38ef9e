"""Tokens to text as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes one generation.

    tokenizer: a fast transformers tokenizer.
    stops: texts that end the generation; text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._pending: list[int] = []
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token; sets `is_stopped` at a stop text."""
        self._held += self._decode(token_id)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = self._open_length()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def flush(self) -> str:
        """What was held back, once no more tokens come; bytes that make no character become �."""
        rest: str = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        shown, self._held, self._pending = self._held + rest, "", []
        return shown

    def _decode(self, token_id: int) -> str:
        """The characters that this token completes."""
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # tokenizers has no error class of its own
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that make no character changed how the ones before them decode: begin anew.
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._tokenizer.decode([*self._pending, token_id], skip_special_tokens=True)
        if piece is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return str(piece)

    def _open_length(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
