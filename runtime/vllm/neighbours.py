"""Which modules are moved to neighbouring slots: one product does for neighbours, so those that are
used together are worth it.
"""

from __future__ import annotations

from collections.abc import Collection

_STEADY_STEPS = 8
"""A move copies two modules, which costs about a tenth of a step."""


class Steadiness:
    """Watches the modules of each step, and tells once when several steps in a row had the same."""

    def __init__(self) -> None:
        self._used: frozenset[str] = frozenset()
        self._steps = 0

    def is_steady(self, used: frozenset[str]) -> bool:
        """Whether this step, which uses these, is the one at which they have become steady."""
        self._steps = self._steps + 1 if used == self._used else 1
        self._used = used
        return self._steps == _STEADY_STEPS


def swaps(slots: Collection[int]) -> list[tuple[int, int]]:
    """Pairs of slots to be exchanged, each slot in one pair at most, so that what lies in these
    comes to lie in the first ones; none where they are neighbours.
    """
    if not slots or max(slots) - min(slots) < len(slots):
        return []
    free = (slot for slot in range(len(slots)) if slot not in slots)
    return list(zip((slot for slot in sorted(slots) if slot >= len(slots)), free, strict=True))
