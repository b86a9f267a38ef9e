"""When a server's bandits move weights, and when they leave them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.monitor import Monitor
from mergeroute.serving.experiments.records import Exposure, Feedback, Record

from .lab import Lab, experiment, lab

BANDIT = {"metric": "score", "floor": 0.1, "every_minutes": 1e-6}


@pytest.fixture(scope="module")
def served(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("bandits") / "state") as found:
        yield found


def scored(served: Lab, name: str, variant: str, scores: list[int], *, unit: str = "") -> None:
    """A request for each score, of a unit of its own or of the one that is given."""
    running = served.live.snapshot.by_name[name]
    start, now = f"{name}-{running.version}-{variant}-{unit}", time.time()
    records: list[Record] = []
    for number, score in enumerate(scores):
        request_id = f"{start}-{number}"
        exposed = (name, running.version, variant, unit or request_id, "user", "anybody")
        records.append(Exposure(request_id, *exposed, now, False, "zoo", "d", "none"))
        records.append(Feedback(request_id, "score", score, now, "anybody"))
    served.live.store.insert(records)


def looked(served: Lab, name: str) -> tuple[dict[str, float], int]:
    """Weights and version after the monitor has looked."""
    Monitor(served.live, lambda: served.service.targets, every_s=0).look()
    found: dict[str, Any] = served.call("GET", f"/v1/experiments/{name}").json()
    return {each["name"]: each["weight"] for each in found["variants"]}, found["version"]


def test_a_busy_user_takes_nothing_back(served: Lab) -> None:
    served.begin(name="greedy", layer="greedy", bandit=BANDIT)
    for variant, share in (("old", 2), ("new", 6)):
        scored(served, "greedy", variant, ([1] * share + [0] * (10 - share)) * 20)
    moved, version = looked(served, "greedy")
    assert moved == {"old": 0.1, "new": 0.9}
    scored(served, "greedy", "old", [1] * 100, unit="crawler")
    assert looked(served, "greedy") == (moved, version)


def test_what_is_not_known_of_every_variant_moves_nothing(served: Lab) -> None:
    weights = {"old": 0.2, "new": 0.8}
    variants = [{**each, "weight": weights[each["name"]]} for each in experiment()["variants"]]
    begun = served.begin(name="unequal", layer="unequal", bandit=BANDIT, variants=variants)
    scored(served, "unequal", "new", [1, 0] * 200)
    assert looked(served, "unequal") == (weights, begun["version"])


def test_a_change_that_gains_little_moves_nobody(served: Lab) -> None:
    begun = served.begin(name="even", layer="even", bandit=BANDIT)
    for variant in ("old", "new"):
        scored(served, "even", variant, [1, 0] * 200)
    assert looked(served, "even") == ({"old": 0.5, "new": 0.5}, begun["version"])


def test_weights_below_the_floor_are_refused(served: Lab) -> None:
    variants = [{**each, "weight": float(each["control"])} for each in _stated()]
    body = experiment(name="low", layer="low", bandit=BANDIT, variants=variants)
    refused = served.call("POST", "/v1/experiments", body)
    assert refused.status_code == 400
    assert "the weight of 'new' is 0, below bandit.floor 0.1" in refused.json()["error"]["message"]
    served.begin(name="low", layer="low", bandit=BANDIT)
    etag = {"If-Match": served.call("GET", "/v1/experiments/low").headers["etag"]}
    body = {"weights": {"old": 0.95, "new": 0.05}}
    refused = served.call("PATCH", "/v1/experiments/low", body, etag)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "weights")


def _stated() -> list[dict[str, Any]]:
    return [{"control": False, **each} for each in experiment()["variants"]]
