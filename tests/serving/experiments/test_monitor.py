"""What happens by itself: guardrails, bandits, targets that go; and what results say."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.answers import ExperimentResults
from mergeroute.serving.experiments.monitor import PATIENCE_S, Monitor
from mergeroute.serving.experiments.records import Exposure, Feedback, Outcome, Record
from mergeroute.serving.service import ServiceOptions

from ...tiny import make_model, make_module
from .lab import Lab, eventually, lab


@pytest.fixture(scope="module")
def served(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("monitored")
    make_module(make_model(), "sql", seed=9).save(folder / "sql")
    options = ServiceOptions(module_roots=(folder,))
    with lab([bank, farm], folder / "state", options=options) as found:
        yield found


def record(
    served: Lab,
    name: str,
    units: dict[str, int],
    *,
    score: Callable[[str], float] = lambda _: 0.0,
    fails: Callable[[str], bool] = lambda _: False,
) -> None:
    """Requests as if so many units had made one each."""
    version = served.live.snapshot.by_name[name].version
    records: list[Record] = []
    for variant, count in units.items():
        for number in range(count):
            request_id = f"{name}-{version}-{variant}-{number}"
            now = time.time()
            exposed = (name, version, variant, f"{variant}-{number}", "user", "anybody")
            records.append(Exposure(request_id, *exposed, now, False, "zoo", "d", "none"))
            error = "engine_failed" if fails(variant) else None
            told = (10.0, 5.0, 4, 2, "stop", error, 500 if error else 200, 0.0, "none")
            records.append(Outcome(request_id, now, *told))
            records.append(Feedback(request_id, "score", score(variant), now, "anybody"))
    served.live.store.insert(records)


def look(served: Lab) -> None:
    Monitor(served.live, lambda: served.service.targets, every_s=0).look()


def shown(served: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = served.call("GET", f"/v1/experiments/{name}").json()
    return found


def results(served: Lab, name: str, **query: int) -> dict[str, Any]:
    response = served.http.get(f"/v1/experiments/{name}/results", params=query)
    assert response.status_code == 200, response.text
    ExperimentResults.model_validate(response.json())
    found: dict[str, Any] = response.json()
    return found


def test_a_guardrail_pauses_an_experiment_and_says_why(served: Lab) -> None:
    guardrails = [{"metric": "error", "max_increase": 0.05}]
    served.begin(name="guarded", layer="guarded", guardrails=guardrails)
    draw = random.Random(1)
    record(served, "guarded", {"old": 300, "new": 300})
    look(served)
    assert shown(served, "guarded")["state"] == "running"
    served.call("POST", "/v1/experiments/guarded/pause")  # so that the version differs
    served.change("guarded", "start")
    record(
        served,
        "guarded",
        {"old": 300, "new": 300},
        fails=lambda variant: variant == "new" and draw.random() < 0.6,
    )
    look(served)
    paused = shown(served, "guarded")
    assert (paused["state"], paused["changed_by"]) == ("paused", "monitor")
    assert "guardrail: error of new" in paused["reason"]
    metrics = served.call("GET", "/metrics").text
    assert 'mergeroute_guardrail_pauses_total{experiment="guarded"} 1.0' in metrics


def test_a_bandit_moves_weights_and_nobody_elses(served: Lab) -> None:
    bandit = {"metric": "score", "floor": 0.1, "every_minutes": 1e-6}
    served.begin(name="greedy", layer="greedy", bandit=bandit)
    draw = random.Random(2)
    look(served)
    assert shown(served, "greedy")["version"] == 2  # nothing is known yet
    rates = {"old": 0.2, "new": 0.6}
    record(
        served,
        "greedy",
        {"old": 200, "new": 200},
        score=lambda variant: float(draw.random() < rates[variant]),
    )
    look(served)
    moved = shown(served, "greedy")
    weights = {variant["name"]: variant["weight"] for variant in moved["variants"]}
    assert weights == {"old": pytest.approx(0.1), "new": pytest.approx(0.9)}
    assert moved["changed_by"] == "bandit"
    assert moved["buckets"] == [["old", 0, 1000], ["new", 1000, 10000]]


def broken(served: Lab, name: str) -> None:
    """An experiment whose users all get a module."""
    body = {"lora_name": "sql", "lora_path": "sql"}
    assert served.call("POST", "/v1/load_lora_adapter", body).status_code == 200
    variants = [
        {"name": "old", "target": "zoo", "weight": 0.0, "control": True},
        {"name": "new", "target": "sql", "weight": 1.0},
    ]
    served.begin(name=name, layer=name, variants=variants)
    assert served.chat(name, "x").headers["x-mergeroute-target"] == "sql"


def unload(served: Lab) -> None:
    body = {"lora_name": "sql"}
    assert served.call("POST", "/v1/unload_lora_adapter", body).status_code == 200


def test_whom_a_variant_cannot_answer_gets_503_and_is_counted(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    make_module(make_model(), "sql", seed=9).save(tmp_path / "sql")
    options = ServiceOptions(module_roots=(tmp_path,))
    with lab([bank, farm], tmp_path / "state", options=options) as served:
        broken(served, "broken")
        served.live._closing.set()  # the monitor would pause it
        unload(served)
        answer = served.chat("broken", "y")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "variant_unavailable"
        errors = eventually(lambda: errors_of_two(served))
        assert errors == {"new": (2, 1)}
        [warning] = served.call("GET", "/health").json()["warnings"]
        assert "'sql', which new answers from, is not on this server" in warning


def errors_of_two(served: Lab) -> dict[str, tuple[int, float]] | None:
    """By variant, once there are two: units and how many of them met an error."""
    found = served.live.store.sums("broken", "error")
    told = {variant: (sums.n, sums.y) for variant, sums in found.items()}
    return told if sum(n for n, _ in told.values()) == 2 else None


def test_an_experiment_whose_target_goes_is_paused(served: Lab) -> None:
    broken(served, "broken")
    time.sleep(2.5)  # so that the server has seen its target
    unload(served)
    paused = eventually(lambda: shown(served, "broken")["state"] == "paused", PATIENCE_S / 2)
    assert paused
    assert "'sql'" in shown(served, "broken")["reason"]
    assert served.chat("broken", "y").headers["x-mergeroute-variant"] == "old"
    refused = served.call("POST", "/v1/experiments/broken/start")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "target_not_found"


def test_results_say_who_wins_and_how_certain_that_is(served: Lab) -> None:
    served.begin(name="judged", layer="judged")
    empty = results(served, "judged")
    assert empty["verdict"]["winner"] is None
    draw = random.Random(3)
    rates = {"old": 0.3, "new": 0.5}
    record(
        served,
        "judged",
        {"old": 600, "new": 600},
        score=lambda variant: float(draw.random() < rates[variant]),
    )
    found = results(served, "judged", points=4)
    assert found["verdict"]["winner"] == "new"
    assert found["sample_ratio"]["units"] == {"old": 600, "new": 600}
    score = found["metrics"][0]
    assert (score["name"], score["decides"]) == ("score", True)
    [variant] = score["variant_results"]
    assert variant["is_significant"]
    assert variant["absolute_change"] == pytest.approx(0.2, abs=0.06)
    for interval in ("confidence_interval", "percent_confidence_interval"):
        assert variant[interval]["lower"] > 0
    always = variant["always_valid"]
    assert always["confidence_interval"]["lower"] > 0
    assert always["adjusted_p_value"] <= 0.05
    assert variant["probability_best"] > 0.99
    assert variant["power"]["units_needed"] > 1200
    assert len(found["series"]) == 4
    last = found["series"][-1]["metrics"]["score"]["new"]
    assert last["absolute_change"] == pytest.approx(variant["absolute_change"])
    assert {m["name"] for m in found["metrics"]} >= {"error", "latency_ms", "clicks"}
    for wrong in ({"points": "x"}, {"points": 1000}, {"version_from": -1}):
        answer = served.http.get("/v1/experiments/judged/results", params=wrong)
        assert answer.status_code == 400


def test_what_of_results_cannot_be_asked_for(served: Lab) -> None:
    for query in ("points=201", "points=-1", "version_from=2147483648", "points=" + "9" * 5000):
        refused = served.http.get(f"/v1/experiments/guarded/results?{query}")
        assert refused.status_code == 400, query


def test_units_that_are_missing_block_the_verdict(served: Lab) -> None:
    served.begin(name="leaky", layer="leaky")
    draw = random.Random(4)
    record(
        served,
        "leaky",
        {"old": 900, "new": 600},
        score=lambda variant: float(draw.random() < (0.2 if variant == "old" else 0.6)),
    )
    found = results(served, "leaky")
    assert found["sample_ratio"]["is_mismatch"]
    assert found["verdict"]["winner"] is None
    assert "mismatch" in found["verdict"]["reason"]


def test_after_a_ramp_only_what_came_since_counts(served: Lab) -> None:
    begun = served.begin(name="ramped", layer="ramped")
    record(served, "ramped", {"old": 100, "new": 100})
    etag = served.call("GET", "/v1/experiments/ramped").headers["etag"]
    body = {"weights": {"old": 0.25, "new": 0.75}}
    assert (
        served.call("PATCH", "/v1/experiments/ramped", body, {"If-Match": etag}).status_code == 200
    )
    record(served, "ramped", {"old": 25, "new": 76})
    found = results(served, "ramped")
    assert found["sample_ratio"]["units"] == {"old": 25, "new": 76}
    assert found["version_from"] == begun["version"] + 1
    assert not found["sample_ratio"]["is_mismatch"]
    everything = results(served, "ramped", version_from=1)
    assert everything["sample_ratio"]["units"] == {"old": 100, "new": 100}
    assert any("checked since version" in warning for warning in everything["warnings"])
    path = "/v1/experiments/ramped/results?version_from=99"
    late = served.call("GET", path)
    assert late.status_code == 400
    assert late.json()["error"]["param"] == "version_from"
