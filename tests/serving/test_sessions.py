"""Conversations known by an id: what is remembered, for how long, and what labels a request has."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Decision
from mergeroute.serving.errors import ApiError
from mergeroute.serving.schemas.completions import ChatRequest, GenerationBody
from mergeroute.serving.sessions import SessionKey, Sessions, conversation_of, labels_of
from mergeroute.serving.validation import validate

from .conftest import Served

UPPER, DIGIT = "shout the word 7", "0 1 2 3 4 5"
HELD = {"model": "auto", "max_tokens": 1}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(conversation: str, bank: str = "b") -> SessionKey:
    return SessionKey(bank, "r", conversation)


def decision(module: str) -> Decision:
    return Decision(blend=Blend({module: 1.0}))


def body(**more: object) -> GenerationBody:
    return validate({"messages": [{"role": "user", "content": "x"}], **more}, ChatRequest)


def test_the_last_decision_is_kept_by_bank_and_id() -> None:
    sessions = Sessions(10, 60)
    sessions.record(key("a"), decision("m"))
    sessions.record(key("a"), decision("n"))
    assert sessions.last(key("a")) == decision("n")
    assert sessions.last(key("a", bank="other")) is None
    assert sessions.last(key("b")) is None


def test_the_one_unused_for_longest_goes_first() -> None:
    sessions = Sessions(2, 60)
    for name in ("a", "b", "a", "c"):
        sessions.record(key(name), decision(name))
    assert [sessions.last(key(name)) for name in "abc"] == [decision("a"), None, decision("c")]
    assert len(sessions) == 2


def test_an_idle_one_is_forgotten_and_looking_does_not_prolong_it() -> None:
    clock = Clock()
    sessions = Sessions(10, 60, clock=clock)
    sessions.record(key("a"), decision("m"))
    for clock.now in (30.0, 60.0):
        assert sessions.last(key("a")) == decision("m")
    clock.now = 60.1
    assert sessions.last(key("a")) is None
    assert len(sessions) == 0


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 30)), max_size=40),
    st.integers(0, 4),
)
def test_it_is_the_latest_few_that_are_not_idle(
    uses: list[tuple[str, float]], capacity: int
) -> None:
    clock = Clock()
    sessions = Sessions(capacity, 60, clock=clock)
    used: dict[str, tuple[float, int]] = {}
    for number, (name, passed) in enumerate(uses):
        clock.now += passed
        sessions.record(key(name), decision(f"m{number}"))
        used.pop(name, None)
        used[name] = (clock.now, number)
    latest = list(used.items())[len(used) - capacity if capacity < len(used) else 0 :]
    for name in "abcd":
        at, number = dict(latest).get(name, (-61.0, 0))
        expected = decision(f"m{number}") if clock.now - at <= 60 else None
        assert sessions.last(key(name)) == expected


def test_no_room_remembers_nothing() -> None:
    sessions = Sessions(0, 60)
    sessions.record(key("a"), decision("m"))
    assert sessions.last(key("a")) is None


def test_many_threads_may_use_it() -> None:
    sessions = Sessions(50, 60)

    def work(number: int) -> None:
        for k in range(300):
            sessions.record(key(f"{number}-{k % 40}"), decision("m"))
            sessions.last(key(f"{(number + 1) % 4}-{k % 40}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sessions) == 50


def test_the_id_comes_from_the_body_else_the_header() -> None:
    header = {"x-session-id": "h"}
    assert conversation_of(body(conversation="b"), header) == "b"
    assert conversation_of(body(conversation={"id": "b"}), header) == "b"
    assert conversation_of(body(), header) == "h"
    assert conversation_of(body(), {"x-session-id": ""}) is None
    assert conversation_of(body(), {}) is None
    with pytest.raises(ApiError, match="513 characters, it may have at most 512"):
        conversation_of(body(), {"x-session-id": "x" * 513})


def test_labels_are_headers_without_secrets_and_metadata() -> None:
    headers = {"X-Team": "Sales", "Authorization": "Bearer s3cret", "cookie": "s3cret"}
    labels = labels_of(body(metadata={"tier": "gold", "tool_choice": "auto"}), headers)
    assert labels == {"header:x-team": "Sales", "tier": "gold", "tool_choice": "auto"}


@pytest.mark.parametrize(
    ("field", "param", "words"),
    [
        ({"conversation": ""}, "conversation", "at least 1"),
        ({"conversation": "x" * 513}, "conversation", "at most 512"),
        ({"conversation": 7}, "conversation", "conversation"),
        ({"conversation": {"id": ""}}, "conversation.id", "at least 1"),
        ({"conversation": {"id": "a", "x": 1}}, "conversation.x", "not supported"),
        ({"reroute": "yes"}, "reroute", "boolean"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}", "at most 64"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "at most 512"),
        ({"metadata": {"k": 1}}, "metadata.k", "string"),
        ({"metadata": {"header:x-team": "v"}}, "metadata", "stands for the request's headers"),
        ({"metadata": ["k"]}, "metadata", "must be an object"),
    ],
)
def test_a_bad_label_or_id_is_refused_by_name(
    field: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        body(**field)
    assert caught.value.param == param


def ask(
    served: Served, text: str, path: str = "/v1/chat/completions", **more: object
) -> httpx.Response:
    headers = {"x-session-id": str(more.pop("session"))} if "session" in more else {}
    messages = more.pop("messages", [{"role": "user", "content": text}])
    return httpx.post(
        served.url + path, json={**HELD, "messages": messages, **more}, headers=headers, timeout=30
    )


def blend_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-mergeroute-blend"]


STRANGE = "~~~~~~~~~~~~ \x01\x02\x03 ~~~~~~~~~"
"""Routed on its own, it stays on the backbone."""


def test_a_session_keeps_its_blend_where_a_turn_alone_would_not(served: Served) -> None:
    assert blend_of(ask(served, STRANGE)) == "none"
    assert blend_of(ask(served, UPPER, session="keeps")) == "upper=1"
    assert blend_of(ask(served, STRANGE, session="keeps")) == "upper=1"
    assert blend_of(ask(served, STRANGE, conversation="keeps")) == "upper=1"
    assert blend_of(ask(served, STRANGE, conversation={"id": "keeps"})) == "upper=1"
    assert blend_of(ask(served, STRANGE, session="other")) == "none"
    assert blend_of(ask(served, DIGIT, session="keeps")) == "digit=1"
    assert blend_of(ask(served, STRANGE, session="keeps")) == "digit=1"


def test_reroute_lets_the_last_turn_alone_decide_and_is_remembered(served: Served) -> None:
    assert blend_of(ask(served, UPPER, session="again")) == "upper=1"
    assert blend_of(ask(served, STRANGE, session="again", reroute=True)) == "none"
    assert blend_of(ask(served, STRANGE, session="again")) == "none"


def test_a_preview_reads_the_session_and_records_nothing(served: Served) -> None:
    preview = ask(served, UPPER, "/v1/route", session="looked").json()
    assert preview["blend"] == {"upper": 1.0}
    assert blend_of(ask(served, STRANGE, session="looked")) == "none"
    assert blend_of(ask(served, UPPER, session="looked")) == "upper=1"
    preview = ask(served, STRANGE, "/v1/route", session="looked").json()
    assert preview["blend"] == {"upper": 1.0}
    assert "keeps upper=1" in preview["reason"]


def test_pinned_targets_and_refused_requests_leave_a_session_alone(served: Served) -> None:
    assert blend_of(ask(served, UPPER, session="pinned")) == "upper=1"
    assert blend_of(ask(served, UPPER, session="pinned", model="digit")) == "digit=1"
    assert ask(served, DIGIT, session="pinned", temperature=9).status_code == 400
    assert blend_of(ask(served, STRANGE, session="pinned")) == "upper=1"


def test_without_an_id_the_bodys_own_turns_decide(served: Served) -> None:
    turns = [
        {"role": "user", "content": UPPER},
        {"role": "assistant", "content": "SEVEN"},
        {"role": "user", "content": STRANGE},
    ]
    assert blend_of(ask(served, "", messages=turns)) == "upper=1"
    assert blend_of(ask(served, "", messages=turns, reroute=True)) == "none"
    assert blend_of(ask(served, "", messages=turns[2:])) == "none"


def test_several_prompts_are_no_conversation(served: Served) -> None:
    several = {**HELD, "prompt": [UPPER, DIGIT]}
    url = served.url + "/v1/completions"
    refused = httpx.post(url, json={**several, "conversation": "c"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "conversation"
    assert httpx.post(url, json=several, headers={"x-session-id": "c"}).status_code == 200


def test_a_session_header_that_is_too_long_is_refused(served: Served) -> None:
    response = ask(served, UPPER, session="x" * 600)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-session-id"
