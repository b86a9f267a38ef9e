"""What every slot of the KV cache holds, and which of it a new prompt can reuse.

Keys and values depend on the weights as much as on the tokens, so a slot is keyed by content: the
blend over module digests, exact to the last 1/64, and how modules are weighed by token. The
backbone needs no key: it never changes under an engine, and slots do not outlive the engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

MIN_REUSED = 16
"""Shorter common prefixes are not worth a copy."""


@dataclass
class SlotContent:
    """tokens[:valid] are the tokens whose keys and values stand in the slot.

    key: what they depend on besides; None: on more than can be told, so that nobody reuses them.
    """

    key: Hashable | None = None
    tokens: Sequence[int] = ()
    valid: int = 0
    in_use: bool = False
    last_used: int = 0


@dataclass(frozen=True)
class Reuse:
    """Where a sequence goes: its slot, and how many tokens to take from which slot first."""

    slot: int
    source: int
    length: int


class PrefixCache:
    """Hands out slots, preferring those that already hold the beginning of the prompt."""

    def __init__(self, slots: int) -> None:
        self.contents = [SlotContent() for _ in range(slots)]
        self._clock = 0

    @property
    def free(self) -> int:
        """Number of slots that no running sequence uses."""
        return sum(not content.in_use for content in self.contents)

    def claim(self, key: Hashable | None, tokens: Sequence[int], *, reuses: bool = True) -> Reuse:
        """Take a slot for a sequence. At least its last token is left to compute.

        key: what its keys and values depend on besides tokens; None reuses nothing.
        tokens: the sequence's own list, which grows as it generates. A slot must be free.
        reuses: False computes all tokens anew, for others to reuse.
        """
        wanted = key if reuses else None
        lengths = [_common(content, wanted, tokens) for content in self.contents]
        source = max(range(len(lengths)), key=lambda s: (lengths[s], not self.contents[s].in_use))
        length = lengths[source] if lengths[source] >= MIN_REUSED else 0
        slot = source if length and self._may_overwrite(source, length) else self._oldest_free()
        self._clock += 1
        valid = length if slot == source else 0  # until the copy is done
        self.contents[slot] = SlotContent(key, tokens, valid, True, self._clock)
        return Reuse(slot=slot, source=source if length else slot, length=length)

    def _may_overwrite(self, slot: int, length: int) -> bool:
        """Whether to go on in the slot itself: it is free, and most of it is the common prefix."""
        content = self.contents[slot]
        return not content.in_use and 2 * length >= content.valid

    def release(self, slot: int) -> None:
        """The sequence ended; what it computed stays reusable until the slot is taken again."""
        self._clock += 1
        content = self.contents[slot]
        content.tokens = tuple(content.tokens[: content.valid])
        content.in_use, content.last_used = False, self._clock

    def _oldest_free(self) -> int:
        free = (slot for slot, content in enumerate(self.contents) if not content.in_use)
        return min(free, key=lambda slot: self.contents[slot].last_used)


def _common(content: SlotContent, key: Hashable | None, tokens: Sequence[int]) -> int:
    """Length of the common prefix that can be reused, at most all but the last token."""
    if key is None or content.key != key:
        return 0
    most = min(content.valid, len(tokens) - 1)
    for index in range(most):
        if content.tokens[index] != tokens[index]:
            return index
    return most
