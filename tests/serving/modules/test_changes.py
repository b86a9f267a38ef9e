"""Modules that come and go while a real server runs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import WEIGHTS_FILE
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions

from ...tiny import make_model, make_module, make_tokenizer, reference_tokens
from ..conftest import chat_ids, running, write_routed_bank

SAMPLES = [f"please sing song {k}" for k in range(10, 30, 2)]
VLLM_TYPES = {400: "BadRequestError", 404: "NotFoundError", 409: "BadRequestError"}
UPPER, DIGIT, SING = "shout the word 7", "0 1 2 3 4 5", "please sing song 21"


class Hot:
    """A running server, and a client's view of it."""

    def __init__(self, url: str, service: Service, root: Path) -> None:
        self.url, self.service, self.root = url, service, root

    def load(self, name: str, path: str, **more: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, **more}
        return httpx.post(self.url + "/v1/load_lora_adapter", json=body, timeout=60)

    def unload(self, name: str, **more: object) -> httpx.Response:
        body = {"lora_name": name, **more}
        return httpx.post(self.url + "/v1/unload_lora_adapter", json=body, timeout=60)

    def route(self, text: str, **more: object) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": text}], **more}
        response = httpx.post(self.url + "/v1/route", json=body, timeout=60)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def chat(self, text: str, count: int = 12, **more: object) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "temperature": 0, "max_tokens": count, **more}
        return httpx.post(self.url + "/v1/chat/completions", json=body, timeout=60)

    def models(self) -> list[str]:
        return [m["id"] for m in httpx.get(self.url + "/v1/models").json()["data"]]

    @property
    def resident(self) -> int:
        return self.service.hosted[0].engine.stats().modules


def write_module(root: Path, folder: str, seed: int) -> None:
    make_module(make_model(), folder, seed=seed).save(root / folder)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def expected(bank: Bank, text: str, seed: int, count: int = 12) -> str:
    """What a module of `write_module` answers."""
    modules = {"m": make_module(make_model(), "m", seed=seed)}
    ids = chat_ids(bank.backbone, text)
    tokens = reference_tokens(make_model(), modules, Blend({"m": 1}), ids, count)
    decoded: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
    return decoded


@pytest.fixture
def hot(bank: Bank, tmp_path: Path) -> Iterator[Hot]:
    root = tmp_path / "loras"
    root.mkdir()
    for number, folder in enumerate(("sing", "sing2"), 70):
        write_module(root, folder, number)
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    service = Service(host_banks([bank], placement), ServiceOptions(module_roots=(root,)))
    with running(service) as url:
        yield Hot(url, service, root)


def test_a_module_comes_answers_exactly_and_goes(hot: Hot, bank: Bank) -> None:
    response = hot.load("sing", "sing", samples=SAMPLES, description="Songs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    first, second = response.text.splitlines()
    assert first == "Success: LoRA adapter 'sing' added successfully."
    assert second == "The router knows it by 10 samples."
    assert hot.models() == ["auto", "tiny", "zoo", "upper", "digit", "sing"]
    assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)
    metrics = httpx.get(hot.url + "/metrics").text
    assert 'mergeroute_engine_modules{backbone="tiny"} 3.0' in metrics

    gone = hot.unload("sing")
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'sing' removed successfully.",
    )
    assert hot.models() == ["auto", "tiny", "zoo", "upper", "digit"]
    assert hot.chat(SING, model="sing").status_code == 404
    assert hot.resident == 2


def test_the_router_takes_it_in_and_leaves_the_others_as_they_were(hot: Hot) -> None:
    before = {text: hot.route(text) for text in (UPPER, DIGIT)}
    assert hot.route(SING)["blend"] == {}
    assert hot.load("sing", "sing", samples=SAMPLES).status_code == 200
    found = hot.route(SING)
    assert found["blend"] == {"sing": 1.0}
    assert found["basis"] == {"sing": "10 samples"}
    assert hot.chat(SING).headers["x-mergeroute-blend"] == "sing=1"
    assert found["bank_digest"] != before[UPPER]["bank_digest"]
    for text, decision in before.items():
        assert hot.route(text)["blend"] == decision["blend"]
    assert hot.unload("zoo:sing").status_code == 200
    for text, decision in before.items():
        again = hot.route(text)
        del again["milliseconds"], decision["milliseconds"]
        assert again == decision
    assert hot.route(SING)["blend"] == {}


def test_with_nothing_to_go_by_it_is_reached_by_name_alone(hot: Hot, bank: Bank) -> None:
    response = hot.load("sing", "sing")
    assert "The router has nothing to go by: ask for it by name" in response.text
    assert hot.route(SING)["blend"] == {}
    assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)
    assert "10 samples" in hot.load("sing", "sing", load_inplace=True, samples=SAMPLES).text
    known = hot.route(SING)
    assert known["blend"] == {"sing": 1.0}
    assert "10 samples" in hot.load("sing", "sing", load_inplace=True).text
    assert hot.route(SING)["blend"] == {"sing": 1.0}
    assert hot.unload("sing").status_code == 200
    assert hot.load("sing", "sing").status_code == 200
    forgotten = hot.route(SING)
    assert forgotten["blend"] == {}
    assert forgotten["bank_digest"] != known["bank_digest"]


def test_other_weights_in_place_are_not_known_by_what_the_old_ones_were(hot: Hot) -> None:
    assert hot.load("sing", "sing", samples=SAMPLES).status_code == 200
    known = hot.route(SING)
    assert known["blend"] == {"sing": 1.0}
    response = hot.load("sing", "sing2", load_inplace=True)
    assert "The router forgot what it knew of other weights under this name" in response.text
    assert hot.route(SING)["blend"] == {}
    assert "10 samples" in hot.load("sing", "sing2", load_inplace=True, samples=SAMPLES).text
    assert hot.route(SING)["blend"] == {"sing": 1.0}
    assert "forgot" in hot.load("upper", "sing2", load_inplace=True).text
    assert "upper" not in hot.route(UPPER)["blend"]
    assert "forgot" not in hot.load("upper", "sing", load_inplace=True).text


def test_in_place_takes_over_at_once_and_what_runs_goes_on(hot: Hot, bank: Bank) -> None:
    assert hot.load("sing", "sing").status_code == 200
    with ThreadPoolExecutor(1) as pool:
        running_on = pool.submit(hot.chat, SING, 150, model="sing", ignore_eos=True)
        while not hot.service.hosted[0].engine.stats().running:
            assert not running_on.done()
        assert hot.load("sing", "sing2", load_inplace=True).status_code == 200
        assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 71)
        whole = expected(bank, SING, 70, 150)
        assert text_of(running_on.result()) == whole
    assert hot.models().count("sing") == 1
    assert hot.resident == 3


def test_requests_while_modules_are_replaced_never_fail(hot: Hot, bank: Bank) -> None:
    assert hot.load("sing", "sing").status_code == 200
    answers = {expected(bank, SING, 70, 3), expected(bank, SING, 71, 3)}
    is_over = threading.Event()

    def ask() -> set[str]:
        found = set()
        while not is_over.is_set():
            found.add(text_of(hot.chat(SING, 3, model="sing")))
        return found

    def ask_all_modules() -> None:
        while not is_over.is_set():
            text_of(hot.chat(SING, 3, routing="arrow"))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        weighing = [pool.submit(ask_all_modules) for _ in range(2)]
        for k in range(20):
            path = ("sing2", "sing")[k % 2]
            assert hot.load("sing", path, load_inplace=True).status_code == 200
        is_over.set()
        assert set.union(*(future.result() for future in asking)) <= answers
        assert [future.result() for future in weighing] == [None, None]
    assert hot.resident == 3


def test_a_server_that_has_stopped_loads_nothing(hot: Hot) -> None:
    hot.service.stop()
    response = hot.load("sing", "sing")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert hot.models() == ["auto", "tiny", "zoo", "upper", "digit"]


def test_a_conversation_outlives_other_modules_and_leaves_its_own(hot: Hot) -> None:
    strange = "~~~~~~~~~~~~ \x01\x02\x03 ~~~~~~~~~"

    def blend(text: str) -> str:
        return hot.chat(text, 1, conversation="c").headers["x-mergeroute-blend"]

    assert blend(UPPER) == "upper=1"
    assert hot.load("sing", "sing", samples=SAMPLES).status_code == 200
    assert blend(strange) == "upper=1"
    assert blend(SING) == "sing=1"
    assert hot.unload("sing").status_code == 200
    assert blend(strange) == "none"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "Both 'lora_name' and 'lora_path' must be provided"),
        ({"lora_path": "sing"}, 400, "Both 'lora_name'"),
        ({"lora_name": "new"}, 400, "Both 'lora_name'"),
        ({"lora_name": "", "lora_path": "sing"}, 400, "Both 'lora_name'"),
        ({"lora_name": 7, "lora_path": "sing"}, 400, "lora_name is 7"),
        (
            {"lora_name": "upper", "lora_path": "sing"},
            400,
            "The lora adapter 'upper' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True.",
        ),
        ({"lora_name": "zoo", "lora_path": "sing"}, 409, "name of a bank or a backbone"),
        ({"lora_name": "tiny", "lora_path": "sing"}, 409, "name of a bank or a backbone"),
        ({"lora_name": "auto", "lora_path": "sing"}, 400, "reserved"),
        ({"lora_name": "a b", "lora_path": "sing"}, 400, "not allowed"),
        ({"lora_name": "../x", "lora_path": "sing"}, 400, "not allowed"),
        ({"lora_name": "nobody:x", "lora_path": "sing"}, 404, "no bank 'nobody'"),
        ({"lora_name": "new", "lora_path": "gone"}, 404, "No adapter found for gone"),
        ({"lora_name": "new", "lora_path": "../x"}, 400, "leads out"),
        ({"lora_name": "new", "lora_path": "/dev/zero"}, 400, "leads out"),
        ({"lora_name": "new", "lora_path": "a\0b"}, 400, "no path of"),
        ({"lora_name": "new", "lora_path": "."}, 400, "adapter_config.json"),
        ({"lora_name": "new", "lora_path": "sing", "samples": "x"}, 400, "samples"),
        ({"lora_name": "new", "lora_path": "sing", "samples": [1]}, 400, "samples.0"),
        ({"lora_name": "new", "lora_path": "sing", "samples": [""]}, 400, "samples.0"),
        ({"lora_name": "new", "lora_path": "sing", "samples": [" "]}, 400, "samples.0"),
        ({"lora_name": "new", "lora_path": "sing", "samples": ["x", None]}, 400, "samples.1"),
        ({"lora_name": "new", "lora_path": "sing", "samples": ["x" * 400]}, 400, "samples.0"),
        ({"lora_name": "new", "lora_path": "sing", "samples": ["x"] * 1001}, 400, "at most 1000"),
        ({"lora_name": "new", "lora_path": "sing", "description": 3}, 400, "description"),
        ({"lora_name": "new", "lora_path": "sing", "load_inplace": "no"}, 400, "load_inplace"),
        ({"lora_name": "new", "lora_path": "sing", "hub": "x"}, 400, "'hub' is not supported"),
        ({"lora_name": "new", "lora_path": "sing", "pinned": 1}, 400, "pinned"),
        (
            {"lora_name": "new", "lora_path": "sing", "base_model_name": "x"},
            400,
            "stands on 'tiny'",
        ),
        ({"lora_name": "new", "lora_path": "sing", "is_3d_lora_weight": True}, 400, "is_3d_lora"),
        ({"lora_name": "new", "lora_path": "sing", "expected_generation": -1}, 400, "at least 0"),
        ({"lora_name": "new", "lora_path": "sing", "expected_generation": 1}, 409, "generation 0"),
        ({"lora_name": "new", "lora_path": "org/gone"}, 404, "No adapter found for org/gone"),
    ],
)
def test_a_bad_load_is_refused_and_changes_nothing(
    hot: Hot, body: dict[str, Any], status: int, words: str
) -> None:
    before = hot.models(), hot.route(UPPER)["bank_digest"]
    response = httpx.post(hot.url + "/v1/load_lora_adapter", json=body, timeout=60)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    is_missing = "Both 'lora_name'" in words or "already been loaded" in words
    kind = "InvalidUserInput" if is_missing else VLLM_TYPES[status]
    assert response.json()["error"]["type"] == kind
    assert (hot.models(), hot.route(UPPER)["bank_digest"]) == before
    assert hot.resident == 2


def test_a_module_with_nan_or_of_another_backbone_changes_nothing(hot: Hot) -> None:
    bad = make_module(make_model(), "bad", seed=3)
    next(iter(bad.deltas.values())).left.fill_(torch.nan)
    bad.save(hot.root / "nan")
    make_module(make_model("gpt2"), "other").save(hot.root / "other")
    (hot.root / "cut").mkdir()
    for file in (hot.root / "sing").iterdir():
        (hot.root / "cut" / file.name).write_bytes(file.read_bytes()[:-200])
    for path, words in (("nan", "NaN"), ("other", "no layer"), ("cut", WEIGHTS_FILE)):
        for name, more in (("new", {}), ("upper", {"load_inplace": True})):
            response = hot.load(name, path, samples=SAMPLES, **more)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["code"] == "invalid_lora_adapter"
            assert words in response.json()["error"]["message"] or path == "cut"
    assert hot.models() == ["auto", "tiny", "zoo", "upper", "digit"]
    assert hot.route(UPPER)["blend"] == {"upper": 1.0}
    assert hot.resident == 2


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("nobody", 404, "The lora adapter 'nobody' cannot be found."),
        ("zoo", 404, "The lora adapter 'zoo' cannot be found."),
        ("auto", 404, "cannot be found"),
        ("other:upper", 404, "cannot be found"),
        ("", 400, "'lora_name' needs to be provided"),
    ],
)
def test_a_bad_unload_is_refused(hot: Hot, name: str, status: int, words: str) -> None:
    response = hot.unload(name)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_a_module_that_came_with_the_bank_goes_and_comes_back(hot: Hot, bank: Bank) -> None:
    assert hot.unload("upper").status_code == 200
    assert hot.models() == ["auto", "tiny", "zoo", "digit"]
    assert "upper" not in hot.route(UPPER)["blend"]
    (hot.root / "upper").mkdir()
    module = next(m for m in bank.modules if m.name == "upper")
    for file in module.path.iterdir():
        (hot.root / "upper" / file.name).write_bytes(file.read_bytes())
    samples = [f"shout the word {k}" for k in range(10)]
    assert hot.load("upper", "upper", samples=samples).status_code == 200
    assert hot.route(UPPER)["blend"] == {"upper": 1.0}
    assert hot.route(UPPER)["bank_digest"] != bank.digest


def test_with_two_banks_a_bare_name_goes_to_the_first(bank: Bank, tmp_path: Path) -> None:
    second = write_routed_bank(tmp_path / "farm", name="farm", backbone=bank.backbone, seed=50)
    write_module(tmp_path, "sing", 70)
    service = Service(
        host_banks([bank, second], Placement(dtype="float32")),
        ServiceOptions(module_roots=(tmp_path,)),
    )
    with running(service) as url:
        hot = Hot(url, service, tmp_path)
        assert hot.load("sing", "sing").status_code == 200
        assert hot.load("farm:sing", "sing").status_code == 200
        assert hot.load("farm:solo", "sing").status_code == 200
        listed = hot.models()
        assert {"zoo:sing", "farm:sing", "solo"} <= set(listed)
        assert "several banks" in hot.unload("sing").json()["error"]["message"]
        assert hot.unload("farm:sing").status_code == 200
        assert hot.unload("sing").status_code == 200
        assert hot.unload("solo").status_code == 200
        assert hot.resident == 4


def test_without_roots_nothing_is_loaded_and_what_is_there_may_go(bank: Bank) -> None:
    service = Service(host_banks([bank], Placement(dtype="float32")))
    with running(service) as url:
        hot = Hot(url, service, Path())
        response = hot.load("new", ".")
        assert response.json()["error"]["code"] == "adapter_path_forbidden"
        assert hot.unload("digit").status_code == 200


def test_a_body_that_is_no_json_object_is_400(hot: Hot) -> None:
    for content in (b"", b"[]", json.dumps("x").encode(), b"\xff"):
        response = httpx.post(hot.url + "/v1/load_lora_adapter", content=content)
        assert response.status_code == 400


def test_generations_rise_and_are_compared_before_anything_is_done(hot: Hot) -> None:
    assert generation(hot.load("sing", "sing", expected_generation=0)) == 1
    assert generation(hot.load("sing", "sing2", load_inplace=True)) == 2
    stale = hot.load("sing", "sing", load_inplace=True, expected_generation=1)
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "lora_generation_mismatch")
    assert "has generation 2, and expected_generation is 1" in stale.json()["error"]["message"]
    gone = hot.unload("sing", expected_generation=1)
    assert (gone.status_code, gone.json()["error"]["param"]) == (409, "expected_generation")
    assert generation(hot.load("sing", "sing", load_inplace=True, expected_generation=2)) == 3
    assert hot.unload("sing", expected_generation=3, lora_int_id=1).status_code == 200
    assert hot.load("sing", "sing", expected_generation=3).status_code == 409
    assert generation(hot.load("sing", "sing")) == 4
    assert generation(hot.load("upper", "sing", load_inplace=True, expected_generation=1)) == 2


def test_loading_again_in_place_unpins(hot: Hot) -> None:
    for pinned in (True, False, True):
        hot.load("sing", "sing", load_inplace=True, pinned=pinned)
        assert httpx.get(hot.url + "/v1/modules/sing").json()["pinned"] is pinned


def test_sglangs_paths_and_fields_are_understood(hot: Hot) -> None:
    body = {"lora_name": "sing", "lora_path": "sing", "pinned": True, "base_model_name": "tiny"}
    response = httpx.post(hot.url + "/load_lora_adapter", json=body, timeout=60)
    assert response.text.startswith("Success: LoRA adapter 'sing' added successfully.")
    assert httpx.get(hot.url + "/v1/modules/sing").json()["pinned"]
    response = httpx.post(hot.url + "/unload_lora_adapter", json={"lora_name": "sing"})
    assert response.text == "Success: LoRA adapter 'sing' removed successfully."


def test_complaint_08_stale_cache_after_same_name_replace(hot: Hot, bank: Bank) -> None:
    text = SING + " and then a tail that is long enough to be cached as a whole"
    assert hot.load("sing", "sing", samples=SAMPLES).status_code == 200
    for turn, (seed, path) in enumerate(((70, "sing"), (71, "sing2"), (70, "sing"))):
        assert hot.load("sing", path, load_inplace=True, samples=SAMPLES).status_code == 200
        first, second = (hot.chat(text, model="sing") for _ in range(2))
        assert text_of(first) == text_of(second) == expected(bank, text, seed)
        assert cached(second) > 0
        assert cached(first) == 0 or turn == 2  # the weights of the first time, and their cache


def test_complaint_09_unknown_names_never_reach_the_backbone(hot: Hot) -> None:
    assert hot.load("sing", "sing").status_code == 200
    assert hot.unload("sing").status_code == 200
    for name in ("sing", "zoo:sing", "blend:sing=1"):
        assert hot.chat(SING, model=name).status_code == 404


def test_complaint_07_a_hundred_loads_and_unloads_leave_memory_flat(hot: Hot) -> None:
    _cycle(hot, 100)


@pytest.mark.slow
def test_complaint_07_a_thousand_loads_and_unloads_leave_memory_flat(hot: Hot) -> None:
    _cycle(hot, 1000)


def _cycle(hot: Hot, count: int) -> None:
    """Load, ask and unload; memory and threads after the first half are those at the end."""
    sizes = []
    with httpx.Client(base_url=hot.url, timeout=60) as client:
        for number in range(count):
            body = {"lora_name": "sing", "lora_path": ("sing", "sing2")[number % 2]}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
            answer = {"model": "sing", "prompt": "x", "max_tokens": 1}
            if number % 10 == 0:
                assert client.post("/v1/completions", json=answer).status_code == 200
            assert client.post("/v1/unload_lora_adapter", json=body_of("sing")).status_code == 200
            sizes.append(resident_bytes())
    assert hot.resident == 2
    assert min(sizes[-10:]) <= max(sizes[count // 4 : count // 2]) * 1.02, sizes[:: count // 20]


def cached(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def body_of(name: str) -> dict[str, str]:
    return {"lora_name": name}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def generation(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.headers["x-mergeroute-generation"])
