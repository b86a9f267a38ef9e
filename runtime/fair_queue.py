"""Who gets the next free slot: the tenant that was served least."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")

Tenant = Hashable
"""Whoever shares the engine with others; None where nobody in particular asks."""


class FairQueue(Generic[_Item]):
    """First come, first served within a tenant; among tenants that wait, the one with the least
    service comes first. Any thread may call anything.

    Who comes back after a pause is set level with those that wait, or with the last one that did:
    nobody saves service up, and nobody pays for what was used while others were away.

    Source: Sheng et al. 2024, Fairness in Serving Large Language Models, arXiv:2401.00588,
    algorithm 2 (virtual token counter).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[Tenant, deque[_Item]] = {}
        self._service: dict[Tenant, float] = {}
        self._last: Tenant = None

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[_Item]:
        with self._lock:
            return iter([item for lane in self._lanes.values() for item in lane])

    def waiting(self, tenant: Tenant) -> int:
        """How many items of a tenant wait."""
        with self._lock:
            return len(self._lanes.get(tenant, ()))

    def add(self, tenant: Tenant, item: _Item) -> None:
        """Queue an item."""
        with self._lock:
            if tenant not in self._lanes:
                level = min(self._of(other) for other in self._lanes or [self._last])
                self._service[tenant] = max(self._of(tenant), level)
                self._lanes[tenant] = deque()
            self._lanes[tenant].append(item)

    def pop(self) -> _Item:
        """Take the next item; there must be one."""
        with self._lock:
            self._last = tenant = min(self._lanes, key=self._of)
            item = self._lanes[tenant].popleft()
            self._close(tenant)
            return item

    def remove(self, tenant: Tenant, item: _Item) -> None:
        """Take an item out of turn."""
        with self._lock:
            self._lanes[tenant].remove(item)
            self._close(tenant)

    def charge(self, tenant: Tenant, service: float) -> None:
        """A tenant was served so much."""
        with self._lock:
            self._service[tenant] = self._of(tenant) + service

    def _of(self, tenant: Tenant) -> float:
        return self._service.get(tenant, 0.0)

    def _close(self, tenant: Tenant) -> None:
        if not self._lanes[tenant]:
            del self._lanes[tenant]
