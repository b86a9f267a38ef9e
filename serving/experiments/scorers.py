"""What scores a shadow's answer against the one that was given: a function of an installed package,
or a service that is asked over HTTP. Neither is trusted to end.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import urlsplit

import httpx

from ...adapters.errors import MergerouteError
from ..errors import ApiError
from .records import LARGEST_VALUE

PLUGINS = "mergeroute.scorers"
TIMEOUT_S = 10.0
MOST_SENT_BYTES = 1 << 20
MOST_ANSWERED_BYTES = 64 << 10
AT_ONCE = 4
_SHOWN = 200

Asked = str | list[dict[str, Any]]
"""A prompt, or the messages of a chat as the request's body wrote them."""

Scorer = Callable[[Asked, str, str], float]
"""Of what was asked, the answer that was given, and the shadow's."""


class ScorerError(MergerouteError):
    """There is no score, for this reason."""


def check_scorer(name: str) -> None:
    """Refuse what is neither installed nor an address.

    Raises:
        ApiError: it says what there is.
    """
    if _is_address(name):
        parts = urlsplit(name)
        if not parts.hostname or "@" in parts.netloc:
            raise _refused(f"{name[:60]!r} is no http(s) URL of a host, without a password in it")
    elif not entry_points(group=PLUGINS, name=name):
        known = ", ".join(sorted(point.name for point in entry_points(group=PLUGINS))) or "none"
        raise _refused(
            f"the scorer {name[:60]!r} is not installed ({PLUGINS} has: {known}): install its "
            "package, or give an http(s) URL"
        )


class Scoring:
    """Runs scorers in threads of their own, a few at a time, and waits for none too long. Of one
    event loop. timeout_s: how long a score may take.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._running = 0

    async def score(self, name: str, asked: Asked, answer: str, other: str) -> float:
        """The score of another answer against the one that was given.

        Raises:
            ScorerError: there is none: the scorer fails, is too slow, or says no finite number.
        """
        if self._running >= AT_ONCE:
            raise ScorerError(f"{self._running} scorers have not ended yet")
        score = await self._in_time(partial(_score, name, asked, answer, other, self._timeout_s))
        if not abs(score) <= LARGEST_VALUE:  # NaN compares false
            raise ScorerError(f"the score is {score}, it must be finite")
        return score

    async def _in_time(self, work: Callable[[], float]) -> float:
        """In a thread that the process does not wait for at its end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[float] = loop.create_future()

        def settle(found: float | Exception) -> None:
            self._running -= 1
            if ended.done():
                return
            if isinstance(found, Exception):
                ended.set_exception(found)
            else:
                ended.set_result(found)

        def run() -> None:
            try:
                found: float | Exception = work()
            except Exception as error:  # of somebody else's code: whatever it is, it is told
                found = ScorerError(f"{type(error).__name__}: {error}"[:_SHOWN])
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(settle, found)

        self._running += 1
        threading.Thread(target=run, name="mergeroute-scorer", daemon=True).start()
        try:
            return await asyncio.wait_for(ended, self._timeout_s)
        except TimeoutError:
            raise ScorerError(f"no score within {self._timeout_s:g} s") from None


def _score(name: str, asked: Asked, answer: str, other: str, timeout_s: float) -> float:
    if _is_address(name):
        return _asked_for(name, asked, answer, other, timeout_s)
    found = entry_points(group=PLUGINS, name=name)
    if not found:
        raise ScorerError(f"the scorer {name!r} is not installed")
    scorer: Scorer = next(iter(found)).load()
    return float(scorer(asked, answer, other))


def _asked_for(url: str, asked: Asked, answer: str, other: str, timeout_s: float) -> float:
    """What a service says; it is followed nowhere else."""
    said = {"prompt" if isinstance(asked, str) else "messages": asked}
    content = json.dumps({**said, "answer": answer, "other_answer": other}).encode()
    if len(content) > MOST_SENT_BYTES:
        raise ScorerError(
            f"prompt and answers are {len(content):,} bytes, over {MOST_SENT_BYTES:,}"
        )
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    until = time.monotonic() + timeout_s
    body = bytearray()
    with (
        httpx.Client(timeout=timeout_s, follow_redirects=False, trust_env=False) as client,
        client.stream("POST", url, content=content, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise ScorerError(f"the scorer answered {response.status_code}")
        for part in response.iter_raw():
            body += part
            if len(body) > MOST_ANSWERED_BYTES or time.monotonic() > until:
                raise ScorerError("the scorer's answer is too long, or too slow")
    return _number(bytes(body))


def _number(content: bytes) -> float:
    try:
        score = json.loads(content)["score"]
    except (ValueError, LookupError, TypeError, RecursionError):
        score = None
    if not isinstance(score, int | float):
        raise ScorerError('the scorer\'s answer is not {"score": NUMBER}')
    return float(score) if abs(score) <= LARGEST_VALUE else math.inf


def _is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _refused(message: str) -> ApiError:
    return ApiError(message, param="shadow.scorer", code="scorer_not_found")
