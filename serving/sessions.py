"""Conversations that are known by an id, and the labels that requests carry."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..routers.base import Decision
from ..routers.rules import SECRET_HEADERS
from .errors import ApiError
from .schemas.completions import GenerationBody
from .schemas.generation import MAX_CONVERSATION_ID

SESSION_HEADER = "x-session-id"


@dataclass(frozen=True)
class SessionKey:
    """A conversation with one bank's router.

    bank: digest of the bank as it was opened, so that modules may come and go meanwhile.
    caller: whose it is: nobody goes on with another key's conversation.
    """

    bank: str
    router: str
    conversation: str
    caller: str = ""


class Sessions:
    """The last decision of each conversation; the one unused for longest goes first.

    capacity: most conversations that are remembered. idle_s: seconds after which an unused one is
    forgotten. clock: seconds that never go back. Any thread may use it.
    """

    def __init__(
        self, capacity: int, idle_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._idle_s = idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[SessionKey, tuple[float, Decision]] = OrderedDict()

    def last(self, key: SessionKey) -> Decision | None:
        """The conversation's last decision. Looking does not prolong its life."""
        with self._lock:
            self._forget_idle()
            found = self._kept.get(key)
        return found[1] if found else None

    def record(self, key: SessionKey, decision: Decision) -> None:
        """Remember a decision that was served."""
        with self._lock:
            self._kept[key] = (self._clock(), decision)
            self._kept.move_to_end(key)
            self._forget_idle()
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)

    def _forget_idle(self) -> None:
        """The order is that of use, so the idle ones stand in front."""
        oldest = self._clock() - self._idle_s
        while self._kept and next(iter(self._kept.values()))[0] < oldest:
            self._kept.popitem(last=False)


def conversation_of(body: GenerationBody, headers: Mapping[str, str]) -> str | None:
    """The conversation's id: the body's, else the header's; a header may be empty.

    Raises:
        ApiError: the header is too long.
    """
    if body.conversation is not None:
        return body.conversation_id
    found = headers.get(SESSION_HEADER) or None
    if found is not None and len(found) > MAX_CONVERSATION_ID:
        raise ApiError(
            f"the header {SESSION_HEADER} has {len(found):,} characters, it may have at most "
            f"{MAX_CONVERSATION_ID}",
            param=SESSION_HEADER,
        )
    return found


def labels_of(body: GenerationBody, headers: Mapping[str, str]) -> dict[str, str]:
    """What rules may look at: headers as `header:NAME` in lower case, without those that hold
    secrets, and the body's metadata.
    """
    named = {name.lower(): value for name, value in headers.items()}
    shown = {f"header:{n}": value for n, value in named.items() if n not in SECRET_HEADERS}
    return {**body.metadata, **shown}
