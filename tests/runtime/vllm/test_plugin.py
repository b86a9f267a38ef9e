"""Blends inside a real vLLM: exact, hot, and unharmed by what harms its own LoRAs."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.adapters.staging import staged
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.vllm.blends import lora_name, module_key
from mergeroute.runtime.vllm.store import ModuleStore
from tests.runtime.vllm.conftest import NAMES, SLOTS
from tests.runtime.vllm.server import BASE, VllmServer
from tests.tiny import make_model, make_module, make_prompt, make_rich_module, reference_tokens

pytestmark = pytest.mark.vllm

COUNT = 12
Asked = tuple[Blend, tuple[int, ...]]


def named(blend: Blend, modules: Mapping[str, Module]) -> str:
    """What vLLM is asked for."""
    return lora_name(blend.renamed({n: modules[n].digest for n in blend})) if blend else BASE


def ask_all(
    server: VllmServer,
    asked: Sequence[Asked],
    modules: Mapping[str, Module],
    count: int = COUNT,
) -> list[list[int]]:
    """All at once: they run in one batch."""
    with ThreadPoolExecutor(len(asked)) as pool:
        running = [
            pool.submit(server.tokens, named(blend, modules), prompt, count)
            for blend, prompt in asked
        ]
        return [one.result() for one in running]


def expected(
    model: Any, asked: Sequence[Asked], modules: Mapping[str, Module], count: int = COUNT
) -> list[list[int]]:
    return [reference_tokens(model, modules, blend, prompt, count) for blend, prompt in asked]


def random_blends(count: int, *, seed: int) -> list[Blend]:
    """Different ones, of one to three modules, negative weights among them."""
    chance, found = random.Random(seed), set[Blend]()
    while len(found) < count:
        names = chance.sample(NAMES, chance.randint(1, 3))
        found.add(Blend({name: chance.choice([-48, -16, 8, 32, 56, 64]) / 64 for name in names}))
    return sorted(found, key=str)


def told(server: VllmServer, metric: str) -> float:
    found = re.search(rf"^vllm:{metric}(?:{{.*}})? (\S+)", server.get("/metrics")[1], re.M)
    assert found
    return float(found[1])


def prefix_hits(server: VllmServer) -> float:
    return told(server, "prefix_cache_hits_total")


@contextmanager
def batches(server: VllmServer) -> Iterator[list[float]]:
    """How many requests ran in one batch, looked at again and again for the length of a block."""
    found: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.03):
            found.append(told(server, "num_requests_running"))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield found
        finally:
            is_over.set()
        watching.result()


def test_sixteen_blends_and_base_rows_in_one_batch_are_the_merged_models(
    server: VllmServer, model: Any, modules: dict[str, Module]
) -> None:
    shared = make_prompt(150, seed=0)  # over a block of vLLM's cache, 128 tokens on CPUs
    blends = random_blends(16, seed=1)
    asked = [(blend, (*shared, *make_prompt(5 + k, seed=k))) for k, blend in enumerate(blends)]
    asked += [(Blend(), (*shared, *make_prompt(k, seed=k))) for k in (3, 9, 20)]
    count = 80  # so many that they meet, however they come in
    reference = expected(model, asked, modules, count)
    hits = prefix_hits(server)

    with batches(server) as sizes:
        assert ask_all(server, asked, modules, count) == reference
    assert max(sizes) > 16
    assert prefix_hits(server) - hits <= 2 * 128  # the base rows' own
    with batches(server) as sizes:
        assert ask_all(server, asked, modules, count) == reference
    assert max(sizes) > 16
    assert prefix_hits(server) - hits >= 19 * 128
    assert len({tuple(tokens) for tokens in reference}) > 12  # blends differ in what they say


def test_modules_that_move_to_neighbouring_slots_stay_what_they_are(
    server: VllmServer, model: Any, modules: dict[str, Module]
) -> None:
    """Of three slots in a row the outer ones move together after some steps, amid an answer."""
    prompt = make_prompt(9, seed=5)
    pairs = [Blend({one: 0.75, other: -0.5}) for one, other in combinations(NAMES, 2)]
    for blend in (*pairs, *(Blend({name: 1.0}) for name in NAMES)):
        found = server.tokens(named(blend, modules), prompt, 40)
        assert found == reference_tokens(model, modules, blend, prompt, 40), blend


def test_a_module_comes_is_replaced_and_goes_while_vllm_runs(
    server: VllmServer, model: Any, shapes: Shapes, modules: dict[str, Module], store: ModuleStore
) -> None:
    prompt = make_prompt(140, seed=7)
    before, after = (
        {**modules, "hot": make_module(model, "hot", rank=5, seed=seed, scale=0.15)}
        for seed in (50, 51)
    )
    blend = Blend({"hot": 1.0, "m0": 0.25})

    store.add(before["hot"], shapes)
    assert len(store.keys()) == SLOTS
    for _ in range(2):  # the second finds its prompt in the cache
        assert ask_all(server, [(blend, prompt)], before) == expected(
            model, [(blend, prompt)], before
        )
    store.remove(before["hot"].digest)
    store.add(after["hot"], shapes)  # into the slot of the one before: all others are taken
    assert ask_all(server, [(blend, prompt)], after) == expected(model, [(blend, prompt)], after)
    store.remove(after["hot"].digest)
    status, answer = server.post(
        "/v1/completions", {"model": named(blend, after), "prompt": [1], "max_tokens": 1}
    )
    assert (status, answer["error"]["param"]) == (404, "model")
    assert module_key(after["hot"].digest) in answer["error"]["message"]
    still = Blend({"m1": 0.5})
    assert ask_all(server, [(still, prompt)], modules) == expected(
        model, [(still, prompt)], modules
    )


def test_base_rows_stay_what_they_are_beside_a_module_in_the_last_slot(
    server: VllmServer, model: Any, shapes: Shapes, modules: dict[str, Module], store: ModuleStore
) -> None:
    every = {**modules, "last": make_module(model, "last", rank=8, seed=60, scale=0.3)}
    store.add(every["last"], shapes)
    asked = [
        (Blend({"last": 1.0}) if k % 2 else Blend(), make_prompt(4 + k, seed=70 + k))
        for k in range(8)
    ]
    assert ask_all(server, asked, every) == expected(model, asked, every)
    store.remove(every["last"].digest)


def test_a_known_blend_whose_files_are_gone_does_not_end_the_server(
    server: VllmServer, model: Any, shapes: Shapes, modules: dict[str, Module], store: ModuleStore
) -> None:
    gone = make_module(model, "gone", seed=80)
    store.add(gone, shapes)
    name = lora_name(Blend({gone.digest: 1.0}))
    server.tokens(name, [1, 2, 3], 2)
    store.remove(gone.digest)
    others = [(blend, make_prompt(6, seed=90)) for blend in random_blends(12, seed=2)]
    ask_all(server, others, modules)
    status, _ = server.post("/v1/completions", {"model": name, "prompt": [1], "max_tokens": 1})
    assert status == 404
    assert server.get("/health")[0] == 200


def test_prompts_are_scored_beside_each_other(
    server: VllmServer, model: Any, modules: dict[str, Module]
) -> None:
    blends = [Blend(), *random_blends(5, seed=3)]
    prompts = [make_prompt(8 + k, seed=100 + k) for k in range(len(blends))]

    def score(blend: Blend, prompt: tuple[int, ...]) -> list[float]:
        body = {
            "model": named(blend, modules),
            "prompt": prompt,
            "max_tokens": 1,
            "echo": True,
            "logprobs": 1,
        }
        status, answer = server.post("/v1/completions", body)
        assert status == 200, answer
        found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
        return found[1 : len(prompt)]

    with ThreadPoolExecutor(len(blends)) as pool:
        scores = list(pool.map(score, blends, prompts))
    for blend, prompt, found in zip(blends, prompts, scores, strict=True):
        assert found == pytest.approx(reference_scores(modules, blend, prompt), abs=1e-4)


@torch.no_grad()
def reference_scores(
    modules: Mapping[str, Module], blend: Blend, prompt: tuple[int, ...]
) -> list[float]:
    merged = make_model("llama", hidden_size=128, intermediate_size=96, head_dim=32)
    merge_into(merged, modules, blend)
    logprobs = merged(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return [float(logprobs[k, token]) for k, token in enumerate(prompt[1:])]


def test_a_worker_that_fails_to_load_a_module_goes_on(
    server: VllmServer, model: Any, shapes: Shapes, modules: dict[str, Module], store: ModuleStore
) -> None:
    damaged = make_module(model, "damaged", seed=110)
    folder = store.path(store.add(damaged, shapes))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    body = {"model": lora_name(Blend({damaged.digest: 1.0})), "prompt": [1], "max_tokens": 1}
    status, answer = server.post("/v1/completions", body)
    assert (status, answer["error"]["type"]) == (400, "BadRequestError")
    store.remove(damaged.digest)

    wide = make_module(make_model("llama", hidden_size=160, head_dim=32), "wide", seed=112)
    with staged(store.path(module_key(wide.digest))) as folder:
        wide.save(folder)  # past our own check
    body = {"model": lora_name(Blend({wide.digest: 1.0})), "prompt": [1], "max_tokens": 1}
    assert [server.post("/v1/completions", body)[0] for _ in range(2)] == [400, 400]
    store.remove(wide.digest)

    assert server.get("/health")[0] == 200
    good = make_module(model, "good", seed=113, scale=0.15)  # the last slot is still free
    store.add(good, shapes)
    asked = [(Blend({"good": 1.0}), make_prompt(9, seed=114))]
    assert ask_all(server, asked, {"good": good}) == expected(model, asked, {"good": good})
    store.remove(good.digest)
    asked = [(Blend({"m2": 1.0}), make_prompt(9, seed=111))]
    assert ask_all(server, asked, modules) == expected(model, asked, modules)


def test_a_module_of_layers_that_vllm_does_not_wrap_is_refused_by_name(
    server: VllmServer, model: Any, shapes: Shapes, store: ModuleStore
) -> None:
    head = make_rich_module(model, "strange", rank=2, seed=120).deltas["lm_head"]
    module = Module("strange", {"lm_head": head})
    with staged(store.path(module_key(module.digest))) as folder:
        module.save(folder)  # past our own check
    body = {"model": lora_name(Blend({module.digest: 1.0})), "prompt": [1], "max_tokens": 1}
    status, answer = server.post("/v1/completions", body)
    store.remove(module.digest)
    assert status == 400
    assert (
        "changes 'lm_head', which vLLM does not run as a linear layer"
        in (answer["error"]["message"])
    )


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("blend:" + "0" * 32 + "=1", 404),
        ("blend:../../etc=1", 400),
        ("blend:none", 400),
        ("blend:" + "0" * 32 + "=nan", 400),
        ("blend:" + "0" * 32 + "=9", 400),
        ("blend:" + "0" * 32 + "=0.001", 400),
        ("m0", 404),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_names_no_blend_is_refused(
    server: VllmServer, name: str, status: int, path: str
) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user"}]}
    found, answer = server.post(path, {"model": name, "max_tokens": 1, **body})
    assert (found, answer["error"]["param"]) == (status, "model")


def test_blends_leave_no_trace_in_lists_routes_and_metrics(server: VllmServer) -> None:
    models = json.loads(server.get("/v1/models")[1])["data"]
    assert [model["id"] for model in models] == [BASE]
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert server.post(route, {"lora_name": "x", "lora_path": "/x"})[0] == 404
    assert "blend:" not in server.get("/metrics")[1]
