"""Rates against a log of every request, and against wall clocks that jump."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.access.keys import Key
from mergeroute.serving.access.rates import Accounts, Window, headers

KEY = Key(name="a", hash="sha256:" + "0" * 64, requests_per_minute=3, tokens_per_minute=100)


@given(st.lists(st.floats(0, 20), max_size=60), st.integers(1, 5))
def test_no_minute_holds_more_than_the_limit(pauses: list[float], limit: int) -> None:
    window, now = Window(), 0.0
    admitted: list[float] = []
    for pause in pauses:
        now += pause
        allowance = window.look(limit, now)
        inside = sum(now - moment < 60 for moment in admitted)
        assert allowance.remaining <= limit - inside
        assert (allowance.retry_s == 0) == (allowance.remaining > 0)
        if allowance.retry_s:
            assert allowance.retry_s <= allowance.reset_s <= 60
            soon = now + allowance.retry_s + 1e-6  # sums of floats are off by less
            assert window.look(limit, soon).remaining > 0
            window = _copy(admitted)
            continue
        window.add(1, now)
        admitted.append(now)
        assert sum(now - moment < 61 for moment in admitted) <= limit + 1


def _copy(moments: list[float]) -> Window:
    """Looking ahead has forgotten what is old by then."""
    window = Window()
    for moment in moments:
        window.add(1, moment)
    return window


def test_requests_and_tokens_are_counted_apart_and_free_up() -> None:
    now = [100.5]
    account = Accounts(clock=lambda: now[0]).of(KEY)
    assert dict(headers(account.allowances())) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "0s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "0s",
    }
    account.count_request()
    account.charge(250)  # known only at its end
    left = account.allowances()
    assert (left["requests"].remaining, left["requests"].retry_s) == (2, 0)
    assert (left["tokens"].remaining, left["tokens"].retry_s) == (0, 60)
    assert dict(headers(left))["x-ratelimit-reset-requests"] == "60s"
    now[0] += 60
    assert [a.remaining for a in account.allowances().values()] == [3, 100]


def test_changed_limits_count_from_what_was_used() -> None:
    accounts = Accounts(clock=lambda: 5.0)
    accounts.of(KEY).count_request()
    lower = KEY.model_copy(update={"requests_per_minute": 1})
    assert accounts.of(lower).allowances()["requests"].remaining == 0
    unlimited = KEY.model_copy(update={"requests_per_minute": None, "tokens_per_minute": None})
    assert accounts.of(unlimited).allowances() == {}


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Accounts().of(KEY)
    for _ in range(3):
        account.count_request()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert account.allowances()["requests"].remaining == 0
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert account.allowances()["requests"].remaining == 0
