"""Labels that are names: few, and only of what there is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from prometheus_client import Counter

MOST = 200
OTHER = "other"


class Names:
    """The label values of counters whose last label is a name. The first names that are asked for
    have series of their own, the rest share one called `other`. Of one thread.

    present: label values of what there is now; series of what has gone are dropped.
    """

    def __init__(
        self,
        counters: Sequence[Counter],
        present: Callable[[], Collection[tuple[str, ...]]],
        *,
        most: int = MOST,
    ) -> None:
        self._counters = counters
        self._present = present
        self._most = most
        self._known: set[tuple[str, ...]] = set()

    def of(self, *values: str) -> tuple[str, ...]:
        """The values to label with."""
        if values in self._known:
            return values
        if len(self._known) >= self._most:
            self.prune()
        if len(self._known) >= self._most:
            return (*values[:-1], OTHER)
        self._known.add(values)
        return values

    def prune(self) -> None:
        """Drop the series of what has gone."""
        for gone in self._known.difference(self._present()):
            self._known.discard(gone)
            for counter in self._counters:
                with suppress(KeyError):  # never counted
                    counter.remove(*gone)
