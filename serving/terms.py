"""On whose account a request runs, and until when."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from .access.callers import ANYBODY
from .context import Context
from .errors import ApiError

TIMEOUT_HEADER = "x-mergeroute-timeout"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Terms:
    """On whose account a request runs, and until when.

    tenant: None: nobody's. deadline: on the monotonic clock; None: there is none.
    request_id: as the answer's header states it.
    """

    tenant: str | None = None
    deadline: float | None = None
    request_id: str = ""


NO_TERMS = Terms()


def terms_of(context: Context, most_s: float | None) -> Terms:
    """The terms of a request that begins now. most_s: what the server grants any request.

    Raises:
        ApiError: the time that it asks for is no time.
    """
    tenant = None if context.caller is ANYBODY else context.caller.name
    seconds = min(filter(None, (most_s, _asked_s(context.headers))), default=None)
    deadline = None if seconds is None else time.monotonic() + seconds
    return Terms(tenant, deadline, context.request_id)


def timed_out() -> ApiError:
    """A request took longer than it or the server allows."""
    return ApiError(
        f"the request's time is up ({TIMEOUT_HEADER}, or pressure.request_timeout_seconds): ask "
        "for less, or allow more",
        status=504,
        code="timeout",
    )


async def in_time(work: Awaitable[_Result], terms: Terms) -> _Result:
    """Wait for the work until the deadline.

    Raises:
        ApiError: it took longer.
    """
    left_s = None if terms.deadline is None else terms.deadline - time.monotonic()
    try:
        async with asyncio.timeout(left_s) as limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise timed_out() from None
        raise


def _asked_s(headers: Mapping[str, str]) -> float | None:
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(
            f"the header {TIMEOUT_HEADER} is {given[:60]!r}, it must be seconds above 0",
            param=TIMEOUT_HEADER,
        )
    return seconds
