"""From draft to conclusion over HTTP: states, ETags, authors, promotion and its way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing

from ..access.conftest import make_key
from .lab import Lab, eventually, experiment, lab

NAME = "/v1/experiments/trial"


@pytest.fixture(scope="module")
def server(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("lab") / "state") as found:
        yield found


@pytest.fixture
def served(server: Lab) -> Iterator[Lab]:
    yield server
    server.clear()


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_a_life_and_who_did_what(served: Lab) -> None:
    created = served.call("POST", "/v1/experiments", experiment())
    assert created.status_code == 201
    first = created.json()["version"]
    assert created.headers["etag"] == f'"{first}"'
    assert created.json()["state"] == "draft"
    assert served.change("trial", "start", reason="go")["state"] == "running"
    assert code(served.call("POST", NAME + "/start")) == (409, "wrong_state")
    assert served.change("trial", "pause")["state"] == "paused"
    paused = served.chat("trial", "somebody")
    assert paused.headers["x-mergeroute-variant"] == "old"
    assert served.feedback(paused, 1).status_code == 404
    assert served.change("trial", "start")["state"] == "running"
    assert code(served.call("DELETE", NAME)) == (409, "wrong_state")
    assert served.change("trial", "conclude")["state"] == "concluded"
    assert served.chat("trial", "somebody").headers["x-mergeroute-variant"] == "old"
    versions = served.call("GET", NAME + "/versions").json()["data"]
    assert [each["state"] for each in versions] == [
        "draft",
        "running",
        "paused",
        "running",
        "concluded",
    ]
    assert {each["changed_by"] for each in versions} == {"anybody"}
    assert versions[1]["reason"] == "started: go"
    assert [each["version"] - first for each in versions] == [0, 1, 2, 3, 4]
    assert served.call("DELETE", NAME).status_code == 204
    assert served.call("GET", NAME).status_code == 404
    assert served.call("GET", "/v1/experiments").json() == {"object": "list", "data": []}


def test_weights_change_by_etag(served: Lab) -> None:
    served.begin()
    body = {"weights": {"old": 0.9, "new": 0.1}}
    assert code(served.call("PATCH", NAME, body)) == (428, "if_match_required")
    assert code(served.call("PATCH", NAME, body, {"If-Match": '"0"'})) == (412, "stale")
    shown = served.call("GET", NAME)
    ramped = served.call("PATCH", NAME, body, {"If-Match": shown.headers["etag"]})
    assert ramped.status_code == 200
    assert ramped.headers["etag"] != shown.headers["etag"]
    before, after = shown.json()["buckets"], ramped.json()["buckets"]
    assert (before, after) == (
        [["old", 0, 5000], ["new", 5000, 10000]],
        [["old", 0, 9000], ["new", 9000, 10000]],
    )
    etag = {"If-Match": ramped.headers["etag"]}
    for wrong in (
        {"weights": {"old": 0.9}},
        {"weights": {"old": 0.9, "new": 0.2}},
        {"weights": {"old": 1.5, "new": -0.5}},
        {"traffic": 0},
        {"traffic": 0.00005},
        {},
        {"salt": "new"},
    ):
        assert served.call("PATCH", NAME, wrong, etag).status_code == 400, wrong
    less = served.call("PATCH", NAME, {"traffic": 0.25}, etag)
    assert less.json()["layer_buckets"] == [[0, 2500]]
    stale = served.call("POST", NAME + "/pause", None, etag)
    assert code(stale) == (412, "stale")
    several = {"If-Match": f'"0", W/{less.headers["etag"]}'}
    assert served.call("POST", NAME + "/pause", None, several).status_code == 200
    lines = [("If-Match", '"0"'), ("If-Match", "*")]
    assert served.http.post(NAME + "/start", headers=lines).status_code == 200


def test_bad_experiments_are_refused(served: Lab) -> None:
    variants: list[dict[str, Any]] = experiment()["variants"]
    gone = [variants[0], {**variants[1], "target": "nowhere"}]
    for wrong, status in (
        ({"variants": gone}, 400),
        ({"variants": [variants[0], {**variants[1], "weight": 0.4}]}, 400),
        ({"variants": variants[:1]}, 400),
        ({"name": "zoo"}, 409),
        ({"name": "upper"}, 409),
        ({"name": "auto"}, 400),
        ({"name": "a:b"}, 400),
        ({"guardrails": [{"metric": "nothing", "max_increase": 1}]}, 400),
        ({"alpha": float("nan")}, 400),
    ):
        body = {**experiment(), **wrong}
        if wrong.get("alpha"):
            response = served.http.post(
                "/v1/experiments", content=httpx_json(body), headers={"content-type": "a/json"}
            )
        else:
            response = served.call("POST", "/v1/experiments", body)
        assert response.status_code == status, (wrong, response.text)
    served.begin()
    assert served.call("POST", "/v1/experiments", experiment()).status_code == 409


def httpx_json(body: object) -> str:
    import json

    return json.dumps(body)


def test_experiments_share_a_layer_or_are_refused(served: Lab) -> None:
    served.begin(traffic=0.6)
    second = {"name": "second", "traffic": 0.4}
    served.begin(**second)
    ranges = [
        served.call("GET", f"/v1/experiments/{name}").json()["layer_buckets"]
        for name in ("trial", "second")
    ]
    assert ranges == [[[0, 6000]], [[6000, 10000]]]
    third = served.call("POST", "/v1/experiments", experiment(name="third", traffic=0.1))
    assert third.status_code == 201
    refused = served.call("POST", "/v1/experiments/third/start")
    assert code(refused) == (409, "layer_full")
    assert served.call("GET", "/v1/experiments/third").json()["state"] == "draft"
    served.change("trial", "conclude")
    assert served.change("third", "start")["layer_buckets"] == [[0, 1000]]


def test_a_promoted_variant_answers_auto_until_it_is_rolled_back(
    served: Lab, bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    served.begin(attach_to="auto")
    unknown = served.call("POST", NAME + "/promote", {"variant": "odd"})
    assert unknown.status_code == 400
    assert code(served.call("POST", NAME + "/rollback")) == (409, "not_promoted")
    promoted = served.change("trial", "promote", variant="new", reason="better")
    assert (promoted["state"], promoted["promoted"]) == ("concluded", "new")
    assert answers(served) == farm.digest
    assert served.chat("trial").headers["x-mergeroute-variant"] == "new"
    served.begin(name="next", variants=_between("zoo", "zoo:upper"))
    served.change("next", "promote", variant="new")
    assert answers(served) == bank.digest
    assert code(served.call("POST", NAME + "/rollback")) == (409, "not_promoted")
    assert code(served.call("DELETE", "/v1/experiments/next")) == (409, "promoted")
    assert served.change("next", "rollback")["promoted"] is None
    assert answers(served) == farm.digest


def test_auto_as_a_variant_is_what_was_promoted(served: Lab, bank: Bank, farm: Bank) -> None:
    served.begin()
    served.change("trial", "promote", variant="new")
    served.begin(name="next", attach_to="auto", variants=_between("auto", "zoo"))
    banks = {
        name: served.chat("auto", headers={"x-mergeroute-variant": f"next={name}"})
        for name in ("old", "new")
    }
    digests = {name: answer.headers["x-mergeroute-bank"] for name, answer in banks.items()}
    assert digests == {"old": farm.digest, "new": bank.digest}
    served.change("next", "promote", variant="old")
    assert answers(served) == farm.digest
    served.change("next", "rollback")
    assert answers(served) == farm.digest


def test_an_auto_variant_answers_when_what_was_promoted_is_gone(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    token = make_key(tmp_path / "keys.yaml", "app", targets=["next"])
    ops = make_key(tmp_path / "keys.yaml", "ops", scopes=["inference", "admin"])
    policy = Policy(KeyRing(tmp_path / "keys.yaml"), is_exposed=True)
    with lab([bank, farm], tmp_path / "state") as first:
        first.begin()
        first.change("trial", "promote", variant="new")
    with lab([bank], tmp_path / "state", policy=policy) as degraded:
        degraded.http.headers["authorization"] = f"Bearer {ops}"
        degraded.begin(name="next", variants=_between("auto", "zoo"))
        degraded.http.headers["authorization"] = f"Bearer {token}"
        for user in "abcdefgh":
            answer = degraded.chat("next", user)
            assert answer.status_code == 200
            assert answer.headers["x-mergeroute-bank"] == bank.digest
            is_old = answer.headers["x-mergeroute-variant"] == "old"
            assert ("x-mergeroute-warnings" in answer.headers) is is_old


def test_results_say_that_a_variant_changed_under_way(served: Lab) -> None:
    served.begin()
    served.begin(name="next", layer="other", variants=_between("auto", "zoo"))
    for user in "abcdefgh":
        served.chat("next", user)
    served.change("trial", "promote", variant="new")
    for user in "abcdefgh":
        served.chat("next", user)
    assert eventually(lambda: served.live.status()["backlog"] == 0)
    document = served.call("GET", "/v1/experiments/next/results").json()
    [warning] = document["warnings"]
    assert warning.startswith("old was answered from 2 things")
    assert "auto (" in warning
    assert "farm (" in warning


def test_an_experiment_that_has_a_banks_name_is_told_of(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    with lab([bank], tmp_path / "state") as first:
        first.begin(name="farm", variants=_between("zoo", "zoo:upper"))
    with lab([bank, farm], tmp_path / "state") as again:
        [warning] = again.call("GET", "/health").json()["warnings"]
        assert "the experiment 'farm' answers for the bank" in warning
        listed = [entry["id"] for entry in again.call("GET", "/v1/models").json()["data"]]
        assert listed.count("farm") == 1
        assert again.chat("farm", "u").headers["x-mergeroute-experiment"] == "farm"


def test_a_whole_life_on_each_database(
    bank: Bank, farm: Bank, database_url: str, tmp_path: Path
) -> None:
    with lab([bank, farm], tmp_path / "state", database=database_url) as served:
        served.begin(attach_to="auto")
        etag = served.call("GET", NAME).headers["etag"]
        body = {"weights": {"old": 0.25, "new": 0.75}}
        assert served.call("PATCH", NAME, body, {"If-Match": etag}).status_code == 200
        given = [served.chat("auto", user) for user in "abcdefgh"]
        assert {served.feedback(answer, 1).status_code for answer in given} == {200}
        assert eventually(lambda: served.live.status()["backlog"] == 0)
        document = served.call("GET", NAME + "/results?points=3").json()
        units = Counter(answer.headers["x-mergeroute-variant"] for answer in given)
        assert Counter(document["sample_ratio"]["units"]) == units
        score = document["metrics"][0]
        assert (score["name"], score["control_stats"]["sample_size"]) == ("score", units["old"])
        assert len(document["series"]) == 3
        served.change("trial", "promote", variant="new")
        assert answers(served) == farm.digest
        served.change("trial", "rollback")
        assert answers(served) == bank.digest
        assert len(served.call("GET", NAME + "/versions").json()["data"]) == 5


def _between(control: str, other: str) -> list[dict[str, Any]]:
    return [
        {"name": "old", "target": control, "weight": 0.5, "control": True},
        {"name": "new", "target": other, "weight": 0.5},
    ]


def answers(served: Lab) -> str:
    """Digest of the bank that answers `auto`."""
    answer = served.chat("auto")
    assert answer.status_code == 200
    assert answer.json()["model"] == "auto"
    assert "x-mergeroute-experiment" not in answer.headers
    return answer.headers["x-mergeroute-bank"]


def test_a_promotion_survives_a_restart_and_its_target_may_be_gone(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    with lab([bank, farm], folder) as first:
        first.begin()
        first.change("trial", "promote", variant="new")
    with lab([bank, farm], folder) as again:
        assert answers(again) == farm.digest
        assert again.call("GET", "/health").json() == {"status": "ok"}
    with lab([bank], folder) as degraded:
        answer = degraded.chat("auto")
        assert answer.headers["x-mergeroute-bank"] == bank.digest
        told = "the promoted target farm is gone: default answers"
        assert answer.headers["x-mergeroute-warnings"] == told
        [warning] = degraded.call("GET", "/health").json()["warnings"]
        assert "farm" in warning
        assert degraded.change("trial", "rollback")["promoted"] is None
        assert "x-mergeroute-warnings" not in degraded.chat("auto").headers
        assert degraded.call("GET", "/health").json() == {"status": "ok"}


def test_without_a_place_to_keep_them_there_are_none(bank: Bank) -> None:
    from mergeroute.serving.hosting import host_banks
    from mergeroute.serving.service import Service

    from ..conftest import running
    from .lab import PLACEMENT

    with running(Service(host_banks([bank], PLACEMENT))) as url:
        for path in ("/v1/experiments", "/v1/experiments/trial/results"):
            response = httpx.get(url + path)
            assert code(response) == (403, "no_experiments")
            assert "--state" in response.json()["error"]["message"]
        body = {"prompt": "0", "max_tokens": 1}
        forced = {"x-mergeroute-variant": "trial=new"}
        assert httpx.post(url + "/v1/completions", json=body).status_code == 200
        assert httpx.post(url + "/v1/completions", json=body, headers=forced).status_code == 400
