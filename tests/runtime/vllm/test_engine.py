"""VllmEngine: servers of ours are started, watched, started again and ended; tokens for callers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import (
    EngineError,
    EngineStoppedError,
    ModuleError,
    RequestError,
    UnsupportedModelError,
)
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.residency import Residency
from mergeroute.runtime.types import (
    FinishReason,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TokenGate,
)
from mergeroute.runtime.vllm.calls import Call
from mergeroute.runtime.vllm.engine import VllmEngine
from mergeroute.runtime.vllm.launch import Mode
from mergeroute.runtime.vllm.options import VllmOptions

from ...moe import make_moe, save_moe, usage_of
from ...tiny import make_model, make_module, make_rich_module
from .fake import Fake
from .fleet import QUICK, engine_on, fake_command, make_engine, wait_for, write_backbone

MODULES = {name: make_module(make_model(), name, seed=k) for k, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return write_backbone(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_command(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def engine(
    backbone: Backbone, command: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    """Two servers of ours."""
    logs = tmp_path_factory.mktemp("logs")
    servers = VllmOptions(
        command=command,
        replicas=2,
        flags={"token_s": 0.01},
        slots=3,
        log_folder=logs,
        **{**QUICK, "silent_s": 1.5, "hung_s": 2},
    )
    engine = make_engine(backbone, servers)
    engine.load_module(MODULES["a"])
    told: list[str] = []
    engine.start(told.append)
    assert sum("ready, 1 modules" in line for line in told) == 2
    yield engine
    pids = [pid for replica in engine.replicas for pid in family(replica.process.pid)]  # type: ignore[union-attr]
    engine.stop()
    assert pids
    assert not any(map(psutil.pid_exists, pids))


def family(pid: int | None) -> list[int]:
    return [pid or 0, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def ready(engine: VllmEngine) -> bool:
    wanted = set(engine.modules.wanted)
    return len(engine.replicas.ready) == 2 and all(wanted <= r.modules for r in engine.replicas)


def generate(engine: VllmEngine, **more: Any) -> list[Any]:
    sampling = SamplingParams(max_tokens=more.pop("max_tokens", 5), temperature=0)
    return list(engine.submit(GenerationRequest((1, 2, 3), sampling=sampling, **more)))


def test_they_are_started_as_asked(engine: VllmEngine, backbone: Backbone) -> None:
    replica = next(iter(engine.replicas))
    assert replica.process is not None
    log = replica.process.launch.log.read_text()
    for part in (f"serve {backbone.path}", "--max-model-len 256", "--max-num-seqs 16", "--uds"):
        assert part in log
    assert "--max-lora-rank 16" in log
    socket = replica.endpoint.socket
    assert socket is not None
    assert os.stat(socket.parent).st_mode & 0o077 == 0  # nobody else gets there


def test_tokens_for_those_who_have_no_body(engine: VllmEngine) -> None:
    (digest, *_) = engine.modules.wanted
    before = engine.stats()
    events = generate(engine, blend=Blend({digest: 0.5}))
    assert [event.token_id for event in events] == [1, 2, 3, 4, 5]
    assert [event.finish_reason for event in events] == [None] * 4 + [FinishReason.LENGTH]
    assert len("".join(event.text for event in events)) > 5
    plain = generate(engine)
    assert [e.text for e in plain] != [e.text for e in events]
    wait_for(lambda: engine.stats().generated_tokens == before.generated_tokens + 10)


def test_a_generation_that_is_cancelled_ends(engine: VllmEngine) -> None:
    sampling = SamplingParams(max_tokens=200)
    generation = engine.submit(GenerationRequest((1,), sampling=sampling))
    next(iter(generation))
    generation.cancel()
    *_, last = generation
    assert last.finish_reason is FinishReason.CANCELLED
    wait_for(lambda: engine.replicas.in_flight == 0)


def test_what_only_another_engine_can_is_refused_by_name(engine: VllmEngine) -> None:
    request = GenerationRequest((1,), gate=TokenGate(TokenRouting.parse("arrow"), ("x",)))
    with pytest.raises(RequestError, match="torch engine") as told:
        engine.submit(request)
    assert told.value.parameter == "routing"
    with pytest.raises(RequestError, match="torch engine"):
        engine.embed([(1,)])
    with pytest.raises(RequestError, match="pass the body on"):
        engine.submit(GenerationRequest((1,), grammar=Grammar("start: /a/", "response_format")))
    scored = SamplingParams(prompt_logprobs=1)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        engine.submit(GenerationRequest((1,), sampling=scored))
    with pytest.raises(ModuleError, match="not blended inside vLLM"):
        engine.load_module(make_rich_module(make_model(), "rich"))
    with pytest.raises(ModuleError, match=r"rank 24.*at most 16.*engine.module_rank"):
        engine.load_module(make_module(make_model(), "large", rank=24))


def test_more_modules_than_slots_take_turns(engine: VllmEngine) -> None:
    """The same residency as of the torch engine: those asked for last stay."""
    (digest,) = engine.modules.wanted
    engine.unload_module(digest)
    residency = Residency(engine)
    sources = {name: (lambda m=module: m) for name, module in MODULES.items()}
    digests = {name: residency.register(MODULES[name], sources[name]) for name in MODULES}
    try:
        assert [residency.info(digests[name]).is_resident for name in "abcd"] == [True] * 3 + [
            False
        ]
        with residency.hold_now([digests["d"], digests["c"]]):
            assert generate(engine, blend=Blend({digests["d"]: 1, digests["c"]: -0.5}))
        assert not residency.info(digests["a"]).is_resident
        assert residency.stats().cold_loads == 1
        with residency.hold_now([digests["a"]]):
            assert generate(engine, blend=Blend({digests["a"]: 1}))[0].finish_reason is None
        with pytest.raises(RequestError, match=r"engine.module_slots"):
            residency._ask(list(digests.values()))
    finally:
        wait_for(lambda: not engine.replicas.in_use)
        for name, digest in digests.items():
            residency.unregister(digest, sources[name])
        engine.load_module(MODULES["a"])


def test_one_that_is_killed_loses_no_request_before_its_first_byte(engine: VllmEngine) -> None:
    """Under load: each request is answered, or its stream, which had begun, ends with an error."""
    wait_for(lambda: ready(engine))
    counts: Counter[str] = Counter()
    stop = threading.Event()

    async def one(stream: bool, number: int) -> str:
        body = {"prompt": f"p{number}", "max_tokens": 8, "stream": stream}
        try:
            reply = await engine.forward(Call("/v1/completions", body, prompt_ids=(number,)))
        except EngineStoppedError:
            return "lost"
        try:
            if stream:
                async for _ in reply.chunks():
                    pass
            return "answered"
        except EngineError:
            return "broken off"
        finally:
            reply.close()

    async def many(worker: int) -> None:
        number = worker
        while not stop.is_set():
            number += 8
            counts[await one(bool(worker % 2), number)] += 1

    async def all_of_them() -> None:
        await asyncio.gather(*(many(worker) for worker in range(8)))
        for replica in engine.replicas:
            await replica.clients.here().aclose()

    asking = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    asking.start()
    victim = next(iter(engine.replicas))
    assert victim.process is not None
    before = victim.restarts
    try:
        time.sleep(0.3)
        pids = family(victim.process.pid)
        os.kill(pids[-1], signal.SIGKILL)
        wait_for(lambda: victim.restarts == before + 1 and ready(engine), 20)
        time.sleep(0.3)
        served = victim.restarts
    finally:
        stop.set()
        asking.join()
    assert served == before + 1
    assert counts["lost"] == 0
    assert counts["answered"] > 30
    assert counts["broken off"] <= 4  # its streams that had begun


def test_one_that_hangs_is_started_again(engine: VllmEngine) -> None:
    wait_for(lambda: ready(engine))
    victim = next(iter(engine.replicas))
    assert victim.process is not None
    before = victim.restarts
    os.kill(family(victim.process.pid)[-1], signal.SIGSTOP)
    for _ in range(4):
        assert generate(engine)[-1].finish_reason is FinishReason.LENGTH
    wait_for(lambda: victim.restarts == before + 1 and ready(engine), 30)


def test_one_that_cannot_be_started_is_told_with_its_last_words(
    backbone: Backbone, command: str
) -> None:
    engine = make_engine(backbone, VllmOptions(command=command, flags={"fail": True}, **QUICK))
    with pytest.raises(EngineError, match=r"ended with status 1(.|\n)*told to fail"):
        engine.start()
    assert not engine.is_running


@pytest.mark.parametrize("mode", ["auto", "virtual"])
def test_where_blends_come_out_wrong_auto_starts_it_again(
    backbone: Backbone, command: str, mode: Mode, tmp_path: Path
) -> None:
    """A server that ends and leaves word of it, as the plugin does."""
    word = "$MERGEROUTE_VLLM_MODULES/.mismatch-0.32"
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\nif [ -f {word} ]; then exec {command} "$@"; fi\n'
        f"mkdir -p $MERGEROUTE_VLLM_MODULES; echo blends differ >{word}; exit 1\n"
    )
    program.chmod(0o755)
    engine = make_engine(backbone, VllmOptions(command=str(program), mode=mode, **QUICK))
    told: list[str] = []
    try:
        if mode == "virtual":
            with pytest.raises(EngineError, match="ended with status 1"):
                engine.start(told.append)
            return
        engine.start(told.append)
        assert any("blends differ" in line and "to materialise" in line for line in told)
        assert next(iter(engine.replicas)).restarts == 1
    finally:
        engine.stop()


def test_one_that_takes_too_long_is_not_waited_for(backbone: Backbone, command: str) -> None:
    servers = VllmOptions(command=command, flags={"start_s": 60}, **{**QUICK, "start_s": 0.5})
    engine = make_engine(backbone, servers)
    told: list[str] = []
    with pytest.raises(EngineError, match=r"engine\.start_seconds"):
        engine.start(told.append)
    assert any("0 of 1 servers ready" in line for line in told)


def test_without_vllm_the_remedy_is_told(backbone: Backbone) -> None:
    with pytest.raises(EngineError, match=r"not installed here.*make vllm"):
        make_engine(backbone, VllmOptions(command="no-such-vllm"))


def test_a_backbone_of_which_vllm_would_serve_less_is_refused(command: str, tmp_path: Path) -> None:
    """Merged experts with their own router, which vLLM does not read; the compact form it does."""
    original = make_moe()
    save_moe(original, tmp_path / "moe")
    tools = MoeTools(collect=lambda _: usage_of(original))
    for router, is_refused in (("exact", True), ("compact", False)):
        experts = {"method": "m-smoe", "keep": 2, "router": router}
        recipe = MoeRecipe.model_validate(
            {"base": str(tmp_path / "moe"), "experts": experts, "calibration": "prompts"}
        )
        backbone = build_moe(recipe, tmp_path / router, tools=tools).backbone
        refusal = pytest.raises(UnsupportedModelError, match=r"vLLM does not read.*--engine torch")
        with refusal if is_refused else nullcontext():
            make_engine(backbone, VllmOptions(command=command, **QUICK)).stop()


def test_servers_of_others_are_left_alone(backbone: Backbone, tmp_path: Path) -> None:
    fake = Fake(folder=tmp_path, max_length=100)
    with engine_on(backbone, tmp_path, [fake]) as engine:
        assert engine.max_length == 100
        assert engine.fields("/v1/completions") >= {"prompt", "model"}  # type: ignore[operator]
        assert engine.fields("/v1/other") is None
        url = next(iter(engine.replicas)).endpoint.url
        engine.stop()
        assert httpx.get(url + "/health").status_code == 200
        assert engine.ailment(1) == "the engine has stopped: restart the server"
        with pytest.raises(EngineStoppedError, match="restart"):
            engine.submit(GenerationRequest((1, 2)))
