from __future__ import annotations

import threading
import time

import httpx

from ..conftest import Served
from .conftest import Watched, eventually, samples_of

_TINY = {"model_name": "tiny", "engine": "0"}
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_COUNTERS = {
    "prefix_cache_queries_total": "engine_prompt_tokens_total",
    "prefix_cache_hits_total": "engine_reused_tokens_total",
    "prompt_tokens_total": "engine_prompt_tokens_total",
    "generation_tokens_total": "engine_generated_tokens_total",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_seconds",
    "e2e_request_latency_seconds": "request_seconds",
    "request_queue_time_seconds": "queue_seconds",
}


def test_they_hold_what_ours_hold(watched: Watched) -> None:
    assert watched.chat().status_code == 200
    eventually(lambda: watched.value("mergeroute_request_seconds_count", bank="zoo"))
    shown = watched.samples()

    def theirs(name: str, **labels: str) -> float:
        return shown[f"vllm:{name}", frozenset((_TINY | labels).items())]

    def ours(name: str, **labels: str) -> float:
        return shown[f"mergeroute_{name}", frozenset(labels.items())]

    for name in _GAUGES:
        assert theirs(name) == 0
    for name, own in _COUNTERS.items():
        assert theirs(name) == ours(own, backbone="tiny") >= 0
    for name, own in _HISTOGRAMS.items():
        for part in ("count", "sum"):
            assert theirs(f"{name}_{part}") == ours(f"{own}_{part}", bank="zoo")
        for label in ("0.1", "+Inf"):
            assert theirs(f"{name}_bucket", le=label) == ours(f"{own}_bucket", bank="zoo", le=label)
    ended = theirs("request_success_total", finished_reason="length")
    assert ended == ours("choices_total", bank="zoo", reason="length") >= 1


def test_they_are_not_shown_unless_asked_for(served: Served) -> None:
    assert not any(
        name.startswith("vllm:") for name, _ in samples_of(httpx.get(served.url + "/metrics").text)
    )


def test_modules_that_run_and_wait_are_named(watched: Watched) -> None:
    """One runs in each of the eight slots, and another one waits."""

    def info() -> dict[str, str]:
        [(labels, value)] = [
            (dict(labels), value)
            for (name, labels), value in watched.samples().items()
            if name == "vllm:lora_requests_info"
        ]
        assert abs(value - time.time()) < 60
        return labels

    none = {"max_lora": "2", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert eventually(lambda: info() == none)
    long = {"max_tokens": 230, "ignore_eos": True}
    asked = [{"model": "upper", "n": 8, **long}, {"model": "digit", **long}]
    threads = [threading.Thread(target=watched.chat, kwargs=body) for body in asked]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    seen = [info()]
    while any(thread.is_alive() for thread in threads):
        seen.append(info())
    for thread in threads:
        thread.join()
    assert {**none, "running_lora_adapters": "upper", "waiting_lora_adapters": "digit"} in seen
    assert eventually(lambda: info() == none)
