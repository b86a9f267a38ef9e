"""Feedback over HTTP: what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing

from ..access.conftest import make_key
from .lab import Lab, eventually, lab


@pytest.fixture(scope="module")
def served(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("feedback") / "state") as found:
        found.begin()
        yield found


def code(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def test_feedback_is_kept_once_and_answered_alike(served: Lab) -> None:
    answer = served.chat("trial", "a")
    first = served.feedback(answer, 1)
    assert first.status_code == 200
    assert first.json() == {
        "object": "feedback",
        "request_id": answer.headers["x-request-id"],
        "metric": "score",
        "value": 1.0,
        "experiment": "trial",
        "variant": answer.headers["x-mergeroute-variant"],
    }
    assert served.feedback(answer, 1).json() == first.json()
    assert code(served.feedback(answer, 0)) == (409, "feedback_exists")
    assert served.feedback(answer, 3, "clicks").status_code == 200
    assert served.feedback(answer, -1.5, "joy").status_code == 200
    sums = eventually(lambda: served.live.store.sums("trial", "joy"))
    assert [each.y for each in sums.values()] == [-1.5]
    metrics = served.call("GET", "/metrics").text
    assert 'mergeroute_feedback_total{experiment="trial",metric="joy"} 1.0' in metrics


def test_an_idempotency_key_stands_for_one_feedback(served: Lab) -> None:
    one, two = served.chat("trial", "b"), served.chat("trial", "c")
    key = {"Idempotency-Key": "k1"}
    first = served.feedback(one, 1, **key)
    assert first.status_code == 200
    assert served.feedback(one, 1, **key).json() == first.json()
    assert code(served.feedback(two, 1, **key)) == (409, "idempotency_key_reused")
    assert served.feedback(two, 1, **{"Idempotency-Key": "k" * 300}).status_code == 400


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("score", 0.5),
        ("score", 2),
        ("score", True),
        ("score", "1"),
        ("score", None),
        ("clicks", -1),
        ("clicks", 1.5),
        ("joy", 1e300),
        ("latency_ms", 3),
        ("nothing", 1),
        ("", 1),
    ],
)
def test_values_that_do_not_fit_are_refused(served: Lab, metric: str, value: object) -> None:
    answer = served.chat("trial", "d")
    response = served.feedback(answer, value, metric)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in ("value", "metric")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(served: Lab, value: float) -> None:
    answer = served.chat("trial", "e")
    body = {"request_id": answer.headers["x-request-id"], "metric": "joy", "value": value}
    response = served.http.post("/v1/feedback", content=json.dumps(body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "value"


def test_unknown_answers_are_refused(served: Lab) -> None:
    plain = served.chat("zoo")
    for unknown in (plain.headers["x-request-id"], "made-up"):
        assert code(served.feedback(unknown, 1)) == (404, "request_not_found")
    for odd in ("", "a b", "nul\0", "x" * 129):
        assert served.feedback(odd, 1).status_code == 400


def test_other_servers_clocks_may_be_ahead(served: Lab) -> None:
    name = served.chat("trial", "early").headers["x-request-id"]
    known = eventually(lambda: served.live.store.find_exposure(name))
    assert known is not None
    served.live.recorder.expose(replace(known, request_id="ahead", at=known.at + 3600))
    assert served.feedback("ahead", 1).status_code == 200


def test_feedback_that_comes_too_late_is_refused(served: Lab) -> None:
    served.begin(name="brief", layer="other", feedback_days=1e-9)
    assert code(served.feedback(served.chat("brief", "f"), 1)) == (410, "feedback_too_late")


def test_feedback_on_an_experiment_that_was_deleted_is_refused(served: Lab) -> None:
    served.begin(name="short", layer="short")
    answer = served.chat("short", "g")
    served.change("short", "conclude")
    assert served.call("DELETE", "/v1/experiments/short").status_code == 204
    assert code(served.feedback(answer, 1)) == (410, "experiment_deleted")
    served.begin(name="short", layer="short")  # another one
    assert code(served.feedback(answer, 1)) == (410, "experiment_deleted")


@pytest.fixture(scope="module")
def keyed(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = {
        "root": {"scopes": ["inference", "admin"]},
        "one": {"scopes": ["inference"], "targets": ["trial"]},
        "two": {"scopes": ["inference"]},
        "auto": {"scopes": ["inference"], "targets": ["auto"]},
        "bank": {"scopes": ["inference"], "targets": ["zoo"]},
    }
    tokens = {name: make_key(folder / "keys.yaml", name, **said) for name, said in keys.items()}
    policy = Policy(KeyRing(folder / "keys.yaml"), is_exposed=True)
    with lab([bank, farm], folder / "state", policy=policy) as found:
        found.http.headers["Authorization"] = f"Bearer {tokens['root']}"
        found.begin(attach_to="auto", unit=["api_key", "request"])
        found.http.headers.pop("Authorization")
        for name, token in tokens.items():
            found.http.headers[f"x-test-{name}"] = token
        yield found


def as_key(served: Lab, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {served.http.headers[f'x-test-{name}']}"}


def test_only_the_key_that_asked_may_judge(keyed: Lab) -> None:
    answer = keyed.chat("trial", headers=as_key(keyed, "one"))
    assert answer.status_code == 200
    other = keyed.feedback(answer, 1, **as_key(keyed, "two"))
    assert code(other) == (404, "request_not_found")
    unknown = keyed.feedback("made-up", 1, **as_key(keyed, "two")).text
    assert other.text == unknown.replace("made-up", answer.headers["x-request-id"])
    assert keyed.feedback(answer, 1, **as_key(keyed, "one")).status_code == 200


def test_the_name_of_an_experiment_is_its_permission(keyed: Lab) -> None:
    """Whatever its variants answer from: a key's targets name the experiment, not those."""
    for user in ("one", "two"):
        assert keyed.chat("trial", headers=as_key(keyed, user)).status_code == 200
    assert code(keyed.chat("zoo", headers=as_key(keyed, "one"))) == (404, "model_not_found")
    for user in ("auto", "bank"):
        refused = keyed.chat("trial", headers=as_key(keyed, user))
        assert code(refused) == (404, "model_not_found")
        assert "farm" not in refused.text
    taking_part = keyed.chat("auto", headers=as_key(keyed, "auto"))
    assert taking_part.headers["x-mergeroute-experiment"] == "trial"
    staying_out = keyed.chat("auto", headers=as_key(keyed, "bank"))
    assert "x-mergeroute-experiment" not in staying_out.headers
    assert staying_out.headers["x-mergeroute-bank"] == (
        keyed.service.targets.banks["zoo"].bank.digest
    )


def test_changing_and_forcing_need_the_admin_scope(keyed: Lab) -> None:
    for path in ("/v1/experiments", "/v1/experiments/trial", "/v1/experiments/trial/results"):
        assert keyed.call("GET", path).status_code == 401
        assert keyed.call("GET", path, headers=as_key(keyed, "two")).status_code == 403
    paused = keyed.call("POST", "/v1/experiments/trial/pause", headers=as_key(keyed, "two"))
    assert paused.status_code == 403
    forced = {"x-mergeroute-variant": "trial=new"}
    assert keyed.chat("trial", headers=as_key(keyed, "two") | forced).status_code == 403
    answer = keyed.chat("trial", headers=as_key(keyed, "root") | forced)
    assert answer.headers["x-mergeroute-variant"] == "new"


def test_without_keys_an_exposed_server_changes_nothing(bank: Bank, tmp_path: Path) -> None:
    with lab([bank], tmp_path / "state", policy=Policy(None, is_exposed=True)) as served:
        response = served.call("POST", "/v1/experiments", {})
        assert code(response) == (403, "api_keys_required")
