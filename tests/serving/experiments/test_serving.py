"""Requests that take part: who gets what, what is told of it, and what is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.allocation import allocate
from mergeroute.serving.experiments.hashing import bucket
from mergeroute.serving.experiments.statistics.units import Sums

from .lab import UNIT, Lab, eventually, experiment, lab

WEIGHTS = {"old": 0.5, "new": 0.5}
TARGETS = {"old": "zoo", "new": "farm"}


@pytest.fixture(scope="module")
def server(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("lab") / "state") as found:
        yield found


@pytest.fixture
def served(server: Lab) -> Iterator[Lab]:
    yield server
    server.clear()


def variant_of(user: str, salt: str = "pepper") -> str:
    return allocate(WEIGHTS).variant_of(bucket(salt, user))


def recorded(served: Lab, count: int) -> Counter[str]:
    """Units by variant, once so many were recorded."""

    def look() -> Counter[str] | None:
        found = Counter(served.live.store.unit_counts("trial").by_variant)
        return found if found.total() >= count else None

    return eventually(look) or Counter()


def test_the_same_user_gets_the_same_variant_and_the_answer_says_which(served: Lab) -> None:
    served.begin()
    users = [f"user {number}" for number in range(30)]
    for user in users * 2:
        answer = served.chat("trial", user)
        told = answer.headers
        assert answer.json()["model"] == "trial"
        assert told["x-mergeroute-experiment"] == "trial"
        assert told["x-mergeroute-variant"] == variant_of(user)
        assert told["x-mergeroute-target"] == TARGETS[variant_of(user)]
        assert told["x-mergeroute-bank"] == (
            served.service.targets.banks[TARGETS[variant_of(user)]].bank.digest
        )
    assert recorded(served, 30) == Counter(map(variant_of, users))


def test_the_preview_says_the_same_and_records_nothing(served: Lab) -> None:
    served.begin()
    for number in range(12):
        body = {"model": "trial", "user": f"u{number}", "prompt": "0 1 2"}
        told = served.call("POST", "/v1/route", body).json()
        assert (told["experiment"], told["variant"]) == ("trial", variant_of(f"u{number}"))
        assert told["target"] == TARGETS[told["variant"]]
        answer = served.call("POST", "/v1/completions", {**body, "max_tokens": 1})
        assert answer.headers["x-mergeroute-variant"] == told["variant"]
    assert recorded(served, 12).total() == 12


def test_streams_choices_and_prompts_are_one_exposure(served: Lab) -> None:
    served.begin()
    client = served.openai.with_options(default_headers={UNIT: "her"})
    with client.chat.completions.with_streaming_response.create(
        model="trial",
        messages=[{"role": "user", "content": "0 1 2"}],
        max_tokens=3,
        stream=True,
        n=2,
    ) as stream:
        assert stream.headers["x-mergeroute-variant"] == variant_of("her")
        judged = served.feedback(str(stream.headers["x-request-id"]), 1)
        assert judged.status_code == 200  # it was recorded before its first byte
        lines = list(stream.iter_lines())
        assert '"model":"trial"' in lines[0]
    many = client.completions.with_raw_response.create(
        model="trial", prompt=["0 1 2", "shout the word"], n=2, max_tokens=2
    )
    assert many.headers["x-mergeroute-variant"] == variant_of("her")
    sums = eventually(lambda: outcomes(served, "completion_tokens", 2))
    assert sums is not None
    assert sums.n == 1  # one unit, two requests
    assert sums.y == 3 * 2 + 2 * 4


def outcomes(served: Lab, metric: str, count: int) -> Sums | None:
    """Sums of all variants, once there are so many."""
    total = Sums()
    for each in served.live.store.sums("trial", metric).values():
        total += each
    return total if total.x >= count else None


def test_auto_takes_part_where_an_experiment_is_attached(served: Lab) -> None:
    served.begin(attach_to="auto")
    for number in range(8):
        answer = served.chat("auto", f"u{number}")
        assert answer.headers["x-mergeroute-variant"] == variant_of(f"u{number}")
        assert answer.json()["model"] == "auto"
    pinned = served.chat("auto", "u1", blend={"zoo:upper": 1})
    assert "x-mergeroute-experiment" not in pinned.headers
    other = served.chat("zoo", "u1")
    assert "x-mergeroute-experiment" not in other.headers
    assert recorded(served, 8).total() == 8


def test_what_fails_is_an_outcome_and_no_lost_exposure(served: Lab) -> None:
    served.begin()
    refused = served.chat("trial", "he", max_tokens=100_000)
    assert refused.status_code == 400
    late = served.chat("trial", "she", headers={"x-mergeroute-timeout": "0.000001"})
    assert late.status_code == 504
    errors = eventually(lambda: outcomes(served, "error", 2))
    assert errors is not None
    assert (errors.n, errors.y) == (2, 2)
    assert outcomes(served, "latency_ms", 1) is None  # told of answers without an error


def test_a_client_that_leaves_is_an_outcome_too(served: Lab) -> None:
    served.begin()
    body = {"model": "trial", "prompt": "0 1 2", "max_tokens": 200, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    left = eventually(lambda: outcomes(served, "error", 1))
    assert left is not None
    assert left.y == 1


def test_a_variant_answers_as_its_target_does(served: Lab) -> None:
    """One prompt over and over, so that prefixes of both are cached."""
    variants: list[dict[str, Any]] = [
        {"name": "old", "target": "zoo:upper", "weight": 0.5, "control": True},
        {"name": "new", "target": "farm:upper", "weight": 0.5},
    ]
    served.begin(variants=variants)
    plain = {v["name"]: _text(served.chat(v["target"], max_tokens=8)) for v in variants}
    assert plain["old"] != plain["new"]
    for number in range(10):
        answer = served.chat("trial", f"u{number}", max_tokens=8)
        assert _text(answer) == plain[answer.headers["x-mergeroute-variant"]]


def _text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_body_that_is_not_allowed_is_no_exposure(served: Lab) -> None:
    served.begin()
    refused: list[dict[str, Any]] = [
        {"blend": {"upper": 1}},
        {"routing": "arrow"},
        {"n": 1000},
        {"messages": []},
    ]
    for body in refused:
        assert served.chat("trial", "he", **body).status_code == 400
    assert served.chat("trial", "he").status_code == 200
    assert recorded(served, 1).total() == 1


def test_a_draft_is_not_served_and_an_unknown_name_is_unknown(served: Lab) -> None:
    response = served.call("POST", "/v1/experiments", experiment(name="later"))
    assert response.status_code == 201
    draft = served.chat("later")
    assert (draft.status_code, draft.json()["error"]["code"]) == (409, "experiment_not_started")
    assert served.chat("nothing").status_code == 404


def test_an_experiment_is_a_model_once_it_is_started(served: Lab) -> None:
    assert served.call("POST", "/v1/experiments", experiment()).status_code == 201
    assert "trial" not in [model.id for model in served.openai.models.list()]
    served.change("trial", "start")
    assert "trial" in [model.id for model in served.openai.models.list()]
    assert served.openai.models.retrieve("trial").owned_by == "mergeroute"
    body = {"lora_name": "trial", "lora_path": "anywhere"}
    taken = served.call("POST", "/v1/load_lora_adapter", body)
    assert taken.status_code == 409
    assert "experiment" in taken.json()["error"]["message"]


def test_an_administrator_may_force_a_variant_which_is_not_counted(served: Lab) -> None:
    served.begin()
    for variant in ("old", "new"):
        answer = served.chat("trial", "x", headers={"x-mergeroute-variant": f"trial={variant}"})
        assert answer.headers["x-mergeroute-variant"] == variant
        assert served.feedback(answer, 1).status_code == 200
    wrong = served.chat("trial", headers={"x-mergeroute-variant": "trial=odd"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-mergeroute-variant")
    assert served.chat("trial", "y").status_code == 200
    assert recorded(served, 1).total() == 1


def test_a_conversation_keeps_its_variant_and_no_other_banks_blend(served: Lab) -> None:
    served.begin(unit=["session"])
    for number in range(6):
        conversation = f"c{number}"
        first = served.chat("trial", conversation=conversation)
        again = served.chat("trial", conversation=conversation)
        assert first.headers["x-mergeroute-variant"] == variant_of(conversation)
        assert again.headers["x-mergeroute-bank"] == first.headers["x-mergeroute-bank"]
        other = {"old": "farm", "new": "zoo"}[variant_of(conversation)]
        moved = served.chat(other, conversation=conversation)
        told = served.call(
            "POST",
            "/v1/route",
            {"model": other, "messages": [{"role": "user", "content": "shout the word"}]},
        ).json()
        assert moved.headers["x-mergeroute-bank"] == told["bank_digest"]
        assert moved.headers["x-mergeroute-confidence"] == f"{told['confidence']:.4f}"
