"""Shadows: requests that are answered once more by another variant, in spare capacity."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.allocation import allocate
from mergeroute.serving.experiments.definition import Experiment, ShadowSettings
from mergeroute.serving.experiments.hashing import bucket
from mergeroute.serving.experiments.records import ShadowPair
from mergeroute.serving.experiments.shadow import is_drawn

from ..conftest import torch_engine
from .lab import Lab, eventually, experiment, lab
from .recorded import shadow_pairs_of

WEIGHTS = allocate({"old": 0.5, "new": 0.5})
SHADOW = {"variant": "new", "share": 1}
LONG = {"max_tokens": 60, "ignore_eos": True}
TWINS = [
    {"name": "old", "target": "zoo", "weight": 0.5, "control": True},
    {"name": "new", "target": "zoo", "weight": 0.5},
]


@pytest.fixture
def served(bank: Bank, farm: Bank, tmp_path: Path) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path / "state") as found:
        yield found


@pytest.fixture
def slow(served: Lab) -> Iterator[None]:
    """Every step takes a hundredth of a second more."""
    engine = torch_engine(served.service)
    handle = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    yield
    handle.remove()


def pairs(served: Lab, count: int) -> list[ShadowPair]:
    """All pairs, once there are so many."""

    def look() -> list[ShadowPair]:
        found = shadow_pairs_of(served.live.store, "trial")
        return found if len(found) >= count else []

    return eventually(look)


def counts(served: Lab) -> dict[str, int]:
    return {result: count for (_, result), count in served.live.shadow_counts.items()}


def ask(served: Lab, variant: str, count: int, **more: Any) -> list[httpx.Response]:
    """Answers of so many users of a variant, one after the other, each with its shadow's time."""
    users = [f"u{number}" for number in range(100)]
    own = [user for user in users if WEIGHTS.variant_of(bucket("pepper", user)) == variant]
    return [ask_one(served, user, **more) for user in own[:count]]


def ask_one(served: Lab, user: str, **more: Any) -> httpx.Response:
    answer = served.chat("trial", user, **more)
    assert answer.status_code == 200, answer.text
    assert eventually(lambda: not served.service._shadows._tasks)
    return answer


def test_a_pair_tells_what_both_would_have_answered(served: Lab) -> None:
    served.begin(shadow=SHADOW)
    answers = ask(served, "old", 4, max_tokens=6, temperature=0)
    ask(served, "new", 2)  # which need no shadow of their own
    found = {pair.request_id: pair for pair in pairs(served, 4)}
    assert found.keys() == {answer.headers["x-request-id"] for answer in answers}
    direct = served.chat("farm", max_tokens=6, temperature=0).json()["choices"][0]
    for answer in answers:
        pair, own = found[answer.headers["x-request-id"]], answer.json()["choices"][0]
        assert (pair.experiment, pair.variant) == ("trial", "new")
        assert pair.agrees == (own["message"] == direct["message"])
        assert pair.length == answer.json()["usage"]["completion_tokens"]
        assert pair.other_length == 6
        assert pair.latency_ms > 0
        assert pair.other_latency_ms > 0
        assert (pair.score, pair.error) == (None, None)
    assert eventually(lambda: counts(served) == {"started": 4, "compared": 4})


def test_shadows_are_nobodys_requests(served: Lab) -> None:
    served.begin(shadow=SHADOW)
    ask(served, "old", 2, conversation="c1")
    pairs(served, 2)
    units = served.live.store.unit_counts("trial")
    assert sum(units.by_variant.values()) == 2
    assert units.by_variant.get("new", 0) == 0
    text = served.call("GET", "/metrics").text
    assert 'mergeroute_shadows_total{experiment="trial",result="compared"} 2.0' in text
    assert 'mergeroute_completion_tokens_total{bank="zoo"} 4.0' in text
    assert 'mergeroute_completion_tokens_total{bank="farm"} 0.0' in text
    assert 'mergeroute_exposures_total{experiment="trial",variant="new"}' not in text
    farm = served.service.targets.banks["farm"].opened.digest
    assert served.service._sessions._kept
    assert farm not in {key.bank for key in served.service._sessions._kept}


def test_draws_without_a_seed_are_the_same_in_both(served: Lab) -> None:
    """Two variants that are one bank agree at any temperature: the shadow has the same seed."""
    served.begin(shadow=SHADOW, variants=TWINS)
    answers = ask(served, "old", 3, max_tokens=12, temperature=1.5, n=2)
    texts = {str(answer.json()["choices"]) for answer in answers}
    assert len(texts) == 3  # seeds are drawn, one for each
    for answer in answers:
        first, second = answer.json()["choices"]
        assert first["message"] != second["message"]
    found = pairs(served, 3)
    assert [pair.agrees for pair in found] == [True] * 3
    told = served.call("GET", "/v1/experiments/trial/results").json()["shadow"]
    assert [(each["variant"], each["compared_with"]) for each in told] == [("new", "old")]
    assert (told[0]["pairs"], told[0]["units"]) == (3, 3)
    assert told[0]["agreement"]["share"] == 1
    assert told[0]["agreement"]["confidence_interval"]["upper"] == 1
    assert 0.3 < told[0]["agreement"]["confidence_interval"]["lower"] < 0.5  # Wilson's of 3 in 3
    assert told[0]["length_difference"]["mean"] == 0
    assert told[0]["latency_ms_difference"]["pairs"] == 3
    assert told[0]["score"] is None


def test_streams_and_texts_have_shadows_too(served: Lab) -> None:
    served.begin(shadow=SHADOW, variants=TWINS)
    for number in range(4):
        with served.http.stream(
            "POST",
            "/v1/completions",
            json={
                "model": "trial",
                "user": f"u{number}",
                "prompt": ["0 1 2", "shout"],
                "max_tokens": 5,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ) as response:
            assert response.read().endswith(b"[DONE]\n\n")
        assert eventually(lambda: not served.service._shadows._tasks)
    found = pairs(served, 1)
    assert all(pair.agrees and pair.length == 10 for pair in found)


@pytest.mark.usefixtures("slow")
def test_a_busy_engine_runs_no_shadow_and_one_that_gets_busy_lets_it_go(served: Lab) -> None:
    served.begin(shadow=SHADOW)
    long = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "ignore_eos": True}
    users = [
        threading.Thread(target=served.call, args=("POST", "/v1/completions", long))
        for _ in range(4)
    ]
    for user in users:
        user.start()
    assert eventually(lambda: torch_engine(served.service).stats().running == 4)
    ask(served, "old", 2)
    assert eventually(lambda: counts(served) == {"dropped": 2})  # told of after the answer
    for user in users:
        user.join()
    began = threading.Thread(target=ask, args=(served, "old", 1), kwargs=LONG)
    began.start()
    assert eventually(lambda: served.service._shadows._spare._taken)
    users = [
        threading.Thread(target=served.call, args=("POST", "/v1/completions", long))
        for _ in range(8)
    ]
    for user in users:
        user.start()
    assert eventually(lambda: counts(served)["dropped"] == 3)
    for user in (began, *users):
        user.join()
    assert eventually(lambda: counts(served) == {"dropped": 3, "started": 1})
    assert not shadow_pairs_of(served.live.store, "trial")


def test_a_prompt_that_comes_need_not_wait_for_a_shadows(served: Lab) -> None:
    served.begin(shadow=SHADOW)
    engine = torch_engine(served.service)
    handle = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    asking = threading.Thread(target=ask, args=(served, "old", 1), kwargs={"max_tokens": 1})
    asking.start()
    assert eventually(lambda: served.service._shadows._spare._taken)
    assert served.chat("zoo", max_tokens=1).status_code == 200
    asking.join()
    handle.remove()
    assert eventually(lambda: counts(served) == {"started": 1, "dropped": 1})


@pytest.mark.usefixtures("slow")
def test_a_drain_cancels_shadows(served: Lab) -> None:
    served.begin(shadow=SHADOW)
    asking = threading.Thread(target=ask, args=(served, "old", 1), kwargs=LONG)
    asking.start()
    assert eventually(lambda: served.service._shadows._spare._taken)
    served.service.drain()
    assert eventually(lambda: not served.service._shadows._tasks)
    asking.join()
    assert eventually(lambda: torch_engine(served.service).stats().running == 0)
    assert eventually(lambda: counts(served) == {"started": 1, "dropped": 1})
    assert not shadow_pairs_of(served.live.store, "trial")


def test_a_target_that_is_gone_is_a_failed_shadow(served: Lab) -> None:
    variants = [TWINS[0], {"name": "new", "target": "farm:upper", "weight": 0.5}]
    served.begin(shadow=SHADOW, variants=variants)
    served.live._closing.set()  # the monitor would pause it first
    gone = served.call("POST", "/v1/unload_lora_adapter", {"lora_name": "farm:upper"})
    assert gone.status_code == 200
    ask(served, "old", 1)
    assert eventually(lambda: counts(served) == {"started": 1, "failed": 1})


def test_the_share_is_drawn_by_the_request_alone() -> None:
    document = Experiment.model_validate(experiment(shadow={"variant": "new", "share": 0.2}))
    wanted = document.shadow
    assert wanted is not None
    ids = [f"request-{number}" for number in range(5000)]
    drawn = [each for each in ids if is_drawn(each, document, wanted)]
    assert 0.18 < len(drawn) / len(ids) < 0.22
    more = ShadowSettings(variant="new", share=0.4)
    assert set(drawn) < {each for each in ids if is_drawn(each, document, more)}
