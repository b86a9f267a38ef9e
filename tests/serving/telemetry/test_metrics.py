from __future__ import annotations

import json
import string
import time
from pathlib import Path

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing, revoke_key
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service
from mergeroute.serving.telemetry.catalogue import (
    CATALOGUE,
    EXPERIMENTS,
    FEEDBACK,
    PAUSES,
    REPLICAS,
    SHADOWS,
)
from mergeroute.serving.telemetry.labels import Names

from ..access.conftest import make_key
from ..conftest import Served, running
from .conftest import Watched, eventually, samples_of

_SUFFIXES = {
    "counter": ("_total", "_created"),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
    "summary": ("_count", "_sum"),
}


def test_what_is_exposed_is_what_the_catalogue_says(watched: Watched) -> None:
    assert watched.chat().status_code == 200
    assert watched.chat(model="nothing").status_code == 404
    known: dict[str, frozenset[str]] = {}
    for spec in CATALOGUE:
        base = spec.full_name.removesuffix("_total")
        for suffix in _SUFFIXES[spec.kind]:
            extra = {"le"} if suffix == "_bucket" else set()
            known[base + suffix] = frozenset(spec.labels) | extra
    shown = {
        name: frozenset(label for label, _ in labels)
        for name, labels in watched.samples()
        if name.startswith("mergeroute_")
    }
    assert shown.items() <= known.items()
    absent = {name for name in known.keys() - shown.keys() if not name.endswith("_created")}
    others = (*EXPERIMENTS.values(), FEEDBACK, PAUSES, SHADOWS, *REPLICAS.values())
    unset = {spec.full_name for spec in others} | {"mergeroute_exposures_total"}
    assert absent == {"mergeroute_modules_budget_bytes"} | unset  # none is set, there are none


def test_a_request_is_counted_once_and_whole(watched: Watched) -> None:
    before = watched.samples()
    used = watched.chat(n=2).json()["usage"]
    eventually(lambda: watched.samples() != before)
    after = watched.samples()

    def grown(name: str, **labels: str) -> float:
        key = (f"mergeroute_{name}", frozenset(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    assert grown("requests_total", route="/v1/chat/completions", status="200") == 1
    assert grown("prompt_tokens_total", bank="zoo") == used["prompt_tokens"]
    assert grown("completion_tokens_total", bank="zoo") == used["completion_tokens"]
    assert grown("key_tokens_total", key="anybody") == used["total_tokens"]
    assert grown("decisions_total", bank="zoo", router="prototype") == 1
    assert grown("module_hits_total", bank="zoo", module="upper") == 1
    assert grown("blend_modules_count", bank="zoo") == 1
    assert grown("blend_modules_sum", bank="zoo") == 1
    assert grown("queue_seconds_count", bank="zoo") == 2
    assert grown("time_to_first_token_seconds_count", bank="zoo") == 1
    assert grown("inter_token_seconds_count", bank="zoo") == used["completion_tokens"] - 2
    assert grown("engine_admitted_total", backbone="tiny") == 2
    assert grown("engine_rows_total", backbone="tiny") >= used["completion_tokens"]


def test_abstentions_are_of_routers_alone(watched: Watched) -> None:
    before = watched.value("mergeroute_abstentions_total", bank="zoo")
    strange = [{"role": "user", "content": "~~ %% ## quite another thing ?? @@"}]
    assert watched.chat(messages=strange).headers["x-mergeroute-blend"] == "none"
    assert watched.chat(model="tiny").headers["x-mergeroute-blend"] == "none"
    found = eventually(lambda: watched.value("mergeroute_abstentions_total", bank="zoo") - before)
    assert found == 1


def test_what_is_refused_is_counted_by_its_code(watched: Watched) -> None:
    before = watched.value("mergeroute_refused_requests_total", reason="model_not_found")
    assert watched.chat(model="nothing").status_code == 404
    assert watched.chat(max_tokens=0).status_code == 400
    assert watched.get("/nowhere").status_code == 404
    reasons = ("model_not_found", "invalid_request_error")
    name = "mergeroute_refused_requests_total"
    assert eventually(lambda: watched.value(name, reason=reasons[0]) == before + 1)
    assert watched.value(name, reason=reasons[1]) >= 2
    assert watched.value("mergeroute_requests_total", route="unknown", status="404") >= 1


def test_who_leaves_a_stream_is_counted_as_499(watched: Watched) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 230,
        "ignore_eos": True,
        "stream": True,
    }
    with watched.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        next(response.iter_lines())
    route = "/v1/chat/completions"
    name = "mergeroute_requests_total"
    assert eventually(lambda: watched.value(name, route=route, status="499") == 1)
    assert watched.value("mergeroute_choices_total", bank="zoo", reason="cancelled") >= 1


def test_no_hammer_of_names_makes_the_series_grow(watched: Watched) -> None:
    watched.chat(model="nothing")
    watched.get("/nowhere")
    watched.get("/v1/models/nothing")
    before = eventually(watched.samples).keys()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(string.ascii_letters + string.digits + "-_.:=é\n", min_size=1, max_size=40))
    def hammer(name: str) -> None:
        headers = {"Authorization": f"Bearer {json.dumps(name)}", "x-session-id": json.dumps(name)}
        model = f"no-{name}"
        assert watched.chat(model=model, headers=headers).status_code in (400, 404)
        assert watched.chat(model=f"blend:upper=0.5,{model}=0.5").status_code in (400, 404)
        watched.get("/no" + name.replace("\n", "%0A"), headers=headers)
        watched.get("/v1/models/" + model.replace("\n", "%0A"), headers=headers)

    hammer()
    grown = watched.samples().keys() - before
    assert {name for name, _ in grown} <= {
        "mergeroute_requests_total",
        "mergeroute_requests_created",
        "mergeroute_refused_requests_total",
        "mergeroute_refused_requests_created",
    }
    assert len(grown) <= 6


def test_series_of_unloaded_modules_go(watched: Watched) -> None:
    body = {"lora_name": "sql", "lora_path": "sql"}
    assert watched.post("/v1/load_lora_adapter", body).status_code == 200
    assert watched.chat(model="sql").status_code == 200
    labels = {"bank": "zoo", "module": "sql"}
    assert eventually(lambda: watched.value("mergeroute_module_hits_total", **labels) == 1)
    assert watched.value("mergeroute_module_resident", **labels) == 1
    assert watched.post("/v1/unload_lora_adapter", {"lora_name": "sql"}).status_code == 200
    shown = watched.samples()
    assert not [key for key in shown if ("module", "sql") in key[1]]
    assert [key for key in shown if ("module", "upper") in key[1]]


def test_names_beyond_the_most_share_a_series_until_some_go() -> None:
    counter = Counter("hits", "text", ["bank", "module"], registry=CollectorRegistry())
    present = {("zoo", "a"), ("zoo", "b"), ("zoo", "c")}
    names = Names([counter], lambda: present, most=2)
    for module in "abca":
        counter.labels(*names.of("zoo", module)).inc()
    assert names.of("zoo", "c") == ("zoo", "other")
    present.remove(("zoo", "a"))
    assert names.of("zoo", "c") == ("zoo", "c")
    assert names.of("zoo", "b") == ("zoo", "b")
    shown = {s.labels["module"] for f in counter.collect() for s in f.samples}
    assert shown == {"b", "other"}


def test_keys_are_counted_by_name_and_go(bank: Bank, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    token = make_key(file, "team-a", scopes=["inference"], requests_per_minute=2)
    reader = {"x-api-key": make_key(file, "reader", scopes=[])}
    service = Service(host_banks([bank], Placement(dtype="float32")))
    sent = {"Authorization": f"Bearer {token}"}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    with running(service, Policy(KeyRing(file), is_exposed=True)) as url:
        codes = [
            httpx.post(f"{url}/v1/completions", json=body, headers=sent).status_code
            for _ in range(3)
        ]
        assert codes == [200, 200, 429]
        wrong = httpx.post(f"{url}/v1/completions", json=body, headers={"x-api-key": "mr-guess"})
        assert wrong.status_code == 401
        shown = samples_of(httpx.get(f"{url}/metrics", headers=reader).text)
        revoke_key(file, "team-a")
        time.sleep(1.1)  # the file is looked at once a second
        after = samples_of(httpx.get(f"{url}/metrics", headers=reader).text)
        after = samples_of(httpx.get(f"{url}/metrics", headers=reader).text)
    team = frozenset({("key", "team-a")})
    assert shown["mergeroute_key_requests_total", team] == 3
    assert shown["mergeroute_key_tokens_total", team] > 0
    reasons = {dict(labels)["reason"] for name, labels in shown if "refused_requests" in name}
    assert reasons == {"rate_limit_exceeded", "invalid_api_key"}
    assert team not in {labels for _, labels in after}


def test_complaint_15_residency_metrics_so_that_gateways_can_route(
    bank: Bank, served: Served
) -> None:
    residency = served.service.hosted[0].residency
    size = max(residency.info(digest).bytes for digest in served.service.hosted[0].digests.values())
    options = EngineOptions(max_concurrency=4, module_bytes=size)
    service = Service(host_banks([bank], Placement(dtype="float32", options=options)))
    with running(service) as url:

        def gauges() -> dict[str, float]:
            shown = samples_of(httpx.get(f"{url}/metrics").text)
            return {
                dict(labels)["module"]: value
                for (name, labels), value in shown.items()
                if name == "mergeroute_module_resident"
            }

        def ask(model: str) -> httpx.Response:
            body = {"model": model, "prompt": "abc", "max_tokens": 2}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        assert gauges() == {"upper": 1, "digit": 0}
        assert ask("digit").headers["x-mergeroute-cold"] == "digit"
        assert gauges() == {"upper": 0, "digit": 1}
        assert "x-mergeroute-cold" not in ask("digit").headers
        shown = samples_of(httpx.get(f"{url}/metrics").text)
    on_tiny = frozenset({("backbone", "tiny")})
    told = {
        name.removeprefix("mergeroute_"): value
        for (name, labels), value in shown.items()
        if labels == on_tiny
    }
    assert told["modules_registered"] == 2
    assert told["modules_resident"] == 1
    assert 0 < told["modules_bytes"] <= told["modules_budget_bytes"] == size
    assert told["module_evictions_total"] == told["module_cold_load_seconds_count"] == 1
    assert told["module_cold_load_seconds_sum"] > 0
    assert told["requests_waiting_for_modules"] == 0
