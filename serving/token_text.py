"""Single tokens as text and bytes, for log-probabilities: a token may be part of a character."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenText:
    """A token. text: as decoded alone. spelling: its bytes; None when they cannot be told."""

    text: str
    spelling: bytes | None

    @property
    def unique_text(self) -> str:
        """The text, or `bytes:\\xe2...` where the text would be a replacement character."""
        if "\ufffd" not in self.text or self.spelling is None:
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelling)


def token_text(tokenizer: Any, token_id: int) -> TokenText:  # noqa: ANN401 - transformers is untyped
    """A token's text and bytes, of byte-level and byte-fallback tokenizers too."""
    text: str = tokenizer.decode([token_id])
    if "\ufffd" not in text:
        return TokenText(text, text.encode())
    piece: str = tokenizer.convert_ids_to_tokens(token_id)
    if match := _BYTE_FALLBACK.fullmatch(piece):
        return TokenText(text, bytes([int(match[1], 16)]))
    table = _byte_level_alphabet()
    if all(character in table for character in piece):
        return TokenText(text, bytes(table[character] for character in piece))
    return TokenText(text, None)


class TokenTexts(dict[int, TokenText]):
    """The tokens of one answer by id, each decoded once, when it is first asked for."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> TokenText:
        self[token_id] = token_text(self._tokenizer, token_id)
        return self[token_id]


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte, as GPT-2's byte-level tokenizer writes bytes: printable Latin-1 stands for
    itself, the other bytes in order for the characters from U+0100 on.

    Source: Radford et al. 2019, GPT-2, `encoder.py`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
