"""Replay: a stored request is answered again, or it is said what is gone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Decision
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing
from mergeroute.serving.experiments.keeping import decisions_of, told
from mergeroute.serving.experiments.pruning import prune
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.tables import exposures, requests
from mergeroute.serving.service import ServiceOptions

from ...tiny import make_model, make_module
from ..access.conftest import make_key
from .lab import UNIT, Lab, experiment, lab
from .recorded import exposure, stored_request

FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "yes", "schema": {"type": "object", "properties": {}}},
}


@pytest.fixture
def served(bank: Bank, farm: Bank, tmp_path: Path) -> Iterator[Lab]:
    options = ServiceOptions(module_roots=(tmp_path / "loras",))
    with lab([bank, farm], tmp_path / "state", options=options) as found:
        yield found


@pytest.fixture(scope="module")
def storing(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("replay")) as found:
        found.begin(store_requests=True)
        yield found


def replay(served: Lab, answer: httpx.Response | str, **headers: str) -> httpx.Response:
    given = answer if isinstance(answer, str) else answer.headers["x-request-id"]
    return served.call("POST", "/v1/replay", {"request_id": given}, headers)


def replayed(served: Lab, answer: httpx.Response | str) -> dict[str, Any]:
    response = replay(served, answer)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"temperature": 1.3, "n": 2},
        {"temperature": 1.3, "seed": 5, "stop": ["x"], "logit_bias": {"65": 2}},
        {"response_format": FORMAT, "temperature": 1, "max_tokens": 8},
        {"safety_identifier": "her", "metadata": {"tier": "iron"}, "logprobs": True},
        {"conversation": {"id": "c1"}, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "0 1 \u00fc 2"}]}]},
    ],
)
def test_a_chat_is_answered_alike(storing: Lab, more: dict[str, Any]) -> None:
    answer = storing.chat("trial", "u", **{"max_tokens": 12, "temperature": 1.2, **more})
    assert answer.status_code == 200, answer.text
    found = replayed(storing, answer)
    assert found["is_equal"] is True, found
    assert found["gone"] == []
    assert (found["experiment"], found["first_difference"]) == ("trial", None)
    assert found["variant"] == answer.headers["x-mergeroute-variant"]
    assert found["bank"]["was"] == found["bank"]["now"] == answer.headers["x-mergeroute-bank"]
    assert (found["seed"] is None) == ("seed" in more)
    assert len(found["stored"]) == more.get("n", 1)
    assert found["replayed"] == found["stored"]


def test_texts_with_several_prompts_are_answered_alike(storing: Lab) -> None:
    body = {"model": "trial", "prompt": ["shout the word", "0 1 2 3"], "n": 2, "max_tokens": 6}
    answer = storing.call("POST", "/v1/completions", body)
    found = replayed(storing, answer)
    assert found["is_equal"] is True
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert [choice["text"] for choice in found["stored"]] == texts
    assert len(found["blends"]) == 2
    assert len(set(texts)) == 4


def test_it_leaves_no_trace(served: Lab) -> None:
    served.begin(store_requests=True, shadow={"variant": "new", "share": 1})
    answer = served.chat("trial", "u")
    replayed(served, answer)
    assert sum(served.live.store.unit_counts("trial").by_variant.values()) == 1
    assert served.live.store.find_request(answer.headers["x-request-id"]) is not None
    text = served.call("GET", "/metrics").text
    assert text.count("mergeroute_exposures_total{") == 1


def load(served: Lab, name: str, path: Path, seed: int) -> None:
    make_module(make_model(), name, seed=seed).save(path)
    body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
    response = served.call("POST", "/v1/load_lora_adapter", body)
    assert response.status_code == 200, response.text


def test_what_is_gone_is_named(served: Lab, tmp_path: Path) -> None:
    variants = [
        {"name": "old", "target": "zoo:upper", "weight": 0.5, "control": True},
        {"name": "new", "target": "blend:zoo:upper=0.5,zoo:digit=0.5", "weight": 0.5},
    ]
    served.begin(store_requests=True, variants=variants)
    answers = [
        served.chat("trial", headers={"x-mergeroute-variant": f"trial={v}"}) for v in ("old", "new")
    ]
    served.live._closing.set()  # the monitor would pause it
    before = dict(served.service.targets.banks["zoo"].digests)
    load(served, "zoo:sing", tmp_path / "loras" / "sing", seed=7)
    for answer in answers:  # the bank has changed, and nothing that was needed
        found = replayed(served, answer)
        assert found["is_equal"] is True
        assert found["bank"]["was"] != found["bank"]["now"]
    load(served, "zoo:digit", tmp_path / "loras" / "digit", seed=8)
    assert replayed(served, answers[0])["is_equal"] is True
    found = replayed(served, answers[1])
    now = served.service.targets.banks["zoo"].digests["digit"]
    assert found["is_equal"] is found["replayed"] is None
    assert found["gone"] == [
        {"what": "module", "name": "digit", "was": before["digit"], "now": now}
    ]
    assert served.call("POST", "/v1/unload_lora_adapter", {"lora_name": "zoo:upper"}).is_success
    found = replayed(served, answers[0])
    assert found["gone"] == [
        {"what": "module", "name": "upper", "was": before["upper"], "now": None}
    ]


def test_a_bank_that_is_gone_is_named(bank: Bank, farm: Bank, tmp_path: Path) -> None:
    with lab([bank, farm], tmp_path) as served:
        served.begin(store_requests=True)
        answer = served.chat("trial", headers={"x-mergeroute-variant": "trial=new"})
        digest = answer.headers["x-mergeroute-bank"]
        assert replayed(served, answer)["is_equal"]
    with lab([bank], tmp_path) as served:
        found = replayed(served, answer)
        assert found["gone"] == [{"what": "bank", "name": "farm", "was": digest, "now": None}]
        assert found["is_equal"] is None


def test_what_is_not_stored_is_not_replayed(served: Lab) -> None:
    served.begin(unit=["header:" + UNIT])
    unknown = replay(served, "nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    outside = served.chat("zoo", "u")
    assert replay(served, outside).status_code == 404
    answer = served.chat("trial", "u")
    response = replay(served, answer)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_stored")
    assert served.call("POST", "/v1/replay", {}).status_code == 400


def test_only_ones_own_unless_one_is_an_administrator(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    tokens = {name: make_key(tmp_path / "keys.yaml", name) for name in ("one", "two")}
    tokens["boss"] = make_key(tmp_path / "keys.yaml", "boss", scopes=("inference", "admin"))
    policy = Policy(KeyRing(tmp_path / "keys.yaml"), is_exposed=True)
    headers = {name: {"authorization": f"Bearer {token}"} for name, token in tokens.items()}
    with lab([bank, farm], tmp_path / "state", policy=policy) as served:
        body = experiment(store_requests=True)
        served.http.headers.update(headers["boss"])
        assert served.call("POST", "/v1/experiments", body).status_code == 201
        served.change("trial", "start")
        answer = served.chat("trial", "u", headers=headers["one"])
        assert replay(served, answer, **headers["one"]).json()["is_equal"] is True
        assert replay(served, answer, **headers["boss"]).json()["is_equal"] is True
        hidden = replay(served, answer, **headers["two"])
        unknown = replay(served, "nothing", **headers["two"])
        assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "request_not_found")
        assert unknown.status_code == 404
        same = {**headers["two"], "x-request-id": answer.headers["x-request-id"]}
        served.chat("trial", "u", headers=same)
        assert replay(served, answer, **headers["two"]).status_code == 404
        assert replay(served, answer, **headers["one"]).json()["is_equal"] is True


def test_old_and_long_ones_are_not_kept(served: Lab) -> None:
    served.begin(store_requests=True, store_days=2)
    long = served.chat(
        "trial", "u", messages=[{"role": "user", "content": "a"}], safety_identifier="x" * 300_000
    )
    assert long.status_code == 200
    assert replay(served, long).json()["error"]["code"] == "request_not_stored"
    answers = [served.chat("trial", "u") for _ in range(2)]
    for answer in answers:
        assert replayed(served, answer)["is_equal"]
    store, old = served.live.store, answers[0].headers["x-request-id"]
    with store.database.writing() as connection:
        changed = update(requests).where(requests.c.request_id == old)
        connection.execute(changed.values(at=time.time() - 2.1 * 86_400))
        changed = update(exposures).where(exposures.c.request_id == old)
        connection.execute(changed.values(at=time.time() - 2.1 * 86_400))
    assert prune(store, served.live.snapshot.experiments) == 1
    served.live.recorder._known._exposures.clear()  # as after a restart
    expired = replay(served, old)
    assert (expired.status_code, expired.json()["error"]["code"]) == (410, "request_expired")
    assert replayed(served, answers[1])["is_equal"]


def test_requests_of_experiments_that_are_gone_are_pruned_too(store: Store) -> None:
    """Of both databases."""
    store.database.prepare()
    ages = {"new": 1.0, "old": 8.0}
    records = [
        dataclasses.replace(stored_request(name, body="{}"), at=time.time() - days * 86_400)
        for name, days in ages.items()
    ]
    store.insert([*records, *(exposure(name) for name in ages)])
    assert prune(store, ()) == 1
    assert store.find_request("old") is None
    assert store.find_request("new") is not None


def test_decisions_are_stored_whole() -> None:
    decisions = (
        Decision(Blend({"upper": 0.5, "digit": -1.25})),
        Decision(Blend(), token_routing=TokenRouting("arrow", top_k=1, none=0.5)),
    )
    found = decisions_of(told(decisions))
    assert [each.blend for each in found] == [each.blend for each in decisions]
    assert [each.token_routing for each in found] == [each.token_routing for each in decisions]
