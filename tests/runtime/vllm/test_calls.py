"""Calls: what becomes of a body, whatever servers do. Each fault has an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    EngineTimeoutError,
    MergerouteError,
    ModuleUnavailableError,
    QueueFullError,
)
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.blends import lora_name
from mergeroute.runtime.vllm.calls import Call, Document
from mergeroute.runtime.vllm.engine import VllmEngine

from ...tiny import make_model, make_module
from .fake import Fake
from .fleet import BODY, PATH, STREAM, closing, engine_on, run, wait_for, write_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return write_backbone(tmp_path_factory.mktemp("calls") / "tiny")


@pytest.fixture(scope="module")
def shared(
    backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, list[Fake]]]:
    folder = tmp_path_factory.mktemp("modules")
    fakes = [Fake(folder=folder), Fake(folder=folder, name="other")]
    with engine_on(backbone, folder, fakes, first_s=1.0, next_s=0.6, whole_s=1.0) as engine:
        yield engine, fakes


@pytest.fixture
def fakes(shared: tuple[VllmEngine, list[Fake]]) -> list[Fake]:
    return shared[1]


@pytest.fixture
def engine(shared: tuple[VllmEngine, list[Fake]]) -> VllmEngine:
    """As new."""
    engine, fakes = shared
    for fake in fakes:
        fake.reset()
    wait_for(lambda: len(engine.replicas.ready) == len(fakes))
    for digest in engine.modules.wanted:
        engine.unload_module(digest)
    for replica in engine.replicas:
        replica.breaker.reset()
    return engine


def spoil(fakes: list[Fake], fault: str, count: int = 1) -> None:
    for fake in fakes:
        fake.fault, fake.count = fault, count


def text_of(answer: Document | list[Document]) -> str:
    chunks = answer if isinstance(answer, list) else [answer]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_body_comes_as_it_is_but_for_the_model(
    engine: VllmEngine, fakes: list[Fake], body: Document
) -> None:
    digest = engine.load_module(make_module(make_model(), "a"))
    blend = Blend({digest: 0.5})
    asked = {**body, "cache_salt": "x", "logit_bias": {"5": 1.5}}
    run(engine, asked, blend=blend, request_id="req-1")
    (seen,) = [body for fake in fakes for body in fake.seen]
    assert seen == {**asked, "model": lora_name(blend)}
    (headers,) = [headers for fake in fakes for headers in fake.headers]
    assert headers["x-request-id"] == "req-1"


def test_the_backbone_goes_by_each_servers_own_name(engine: VllmEngine, fakes: list[Fake]) -> None:
    for number in range(12):
        run(engine, BODY, prompt_ids=(number,))
    assert {body["model"] for body in fakes[0].seen} == {"backbone"}
    assert {body["model"] for body in fakes[1].seen} == {"other"}


def test_a_stream_is_the_same_text_and_no_line_is_broken(engine: VllmEngine) -> None:
    assert text_of(run(engine, BODY)) == text_of(run(engine, STREAM))
    assert "\u2028" in text_of(run(engine, STREAM))


FAULTS = ["500", "503", "429", "401", "html", "other", "empty"]


@pytest.mark.parametrize("fault", [*FAULTS, "hang"])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_another_server_answers_where_one_does_not(
    engine: VllmEngine, fakes: list[Fake], fault: str, body: Document
) -> None:
    for fake in fakes:
        spoil([fake], fault)
        for number in range(40):
            assert text_of(run(engine, body, prompt_ids=(number,)))
            if fake.count == 0:
                break
        assert fake.count == 0  # it was asked first, and another answered


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("500", EngineError),
        ("503", EngineStoppedError),
        ("429", QueueFullError),
        ("401", EngineError),
        ("html", EngineError),
        ("other", EngineError),
        ("empty", EngineError),
        ("hang", EngineTimeoutError),
    ],
)
def test_where_none_does_the_error_says_so(
    engine: VllmEngine, fakes: list[Fake], fault: str, error: type[MergerouteError]
) -> None:
    spoil(fakes, fault, 10)
    for body in (BODY, STREAM):
        with pytest.raises(error):
            run(engine, body)
    assert sum(len(fake.seen) for fake in fakes) <= 4  # never more than twice each
    spoil(fakes, "", 0)
    assert text_of(run(engine, BODY))


def test_a_fault_of_the_request_is_told_at_once_and_breaks_nothing(
    engine: VllmEngine, fakes: list[Fake]
) -> None:
    spoil(fakes, "too long", 20)
    for _ in range(8):
        with pytest.raises(ContextLengthError, match="maximum context length"):
            run(engine, BODY)
    assert sum(len(fake.seen) for fake in fakes) == 8
    assert not any(replica.breaker.is_open for replica in engine.replicas)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("break", "broke off"),
        ("garbage", "no JSON"),
        ("error event", "out of KV"),
    ],
)
def test_what_goes_wrong_amid_a_stream_ends_it_alone(
    engine: VllmEngine, fakes: list[Fake], fault: str, match: str
) -> None:
    async def both() -> tuple[list[Document], str]:
        for fake in fakes:
            fake.token_s = 0.03
        spoil(fakes, fault, 1)
        bad = await engine.forward(Call(PATH, STREAM))
        spoil(fakes, "", 0)
        good = await engine.forward(Call(PATH, {**STREAM, "max_tokens": 12}))
        got = []
        try:
            with pytest.raises(EngineError, match=match):  # noqa: PT012
                async for chunk in bad.chunks():
                    got.append(chunk)
            return got, text_of([chunk async for chunk in good.chunks()])
        finally:
            await bad.close()
            await good.close()

    got, text = asyncio.run(closing(engine, both))
    assert len(got) == 2
    assert len(text.split()) == 12


@pytest.mark.parametrize(("fault", "rests"), [("refusal", False), ("error event", True)])
def test_a_refusal_amid_a_stream_is_no_fault_of_the_server(
    engine: VllmEngine, fakes: list[Fake], fault: str, rests: bool
) -> None:
    async def eight() -> None:
        for fake in fakes:
            fake.token_s = 0.05
        spoil(fakes, fault, 99)
        calls = [Call(PATH, STREAM, prompt_ids=(number,)) for number in range(8)]
        replies = await asyncio.gather(*(engine.forward(call) for call in calls))
        for reply in replies:
            with pytest.raises(MergerouteError):
                async for _ in reply.chunks():
                    pass
            await reply.close()

    asyncio.run(closing(engine, eight))
    assert [replica.breaker.is_open for replica in engine.replicas] == [rests, rests]


def test_a_server_that_breaks_off_every_stream_is_left_alone(
    engine: VllmEngine, fakes: list[Fake]
) -> None:
    """One after the other, so that each begins well after the failure of the one before."""
    broken, other = fakes
    spoil([broken], "break", 99)
    for number in range(40):
        with suppress(EngineError):
            run(engine, STREAM, prompt_ids=(number,))
    assert [replica.breaker.is_open for replica in engine.replicas] == [True, False]
    assert len(broken.seen) <= 5  # three, and what tried it after a rest
    assert len(other.seen) >= 35


def test_a_chunk_that_does_not_come_is_not_waited_for_for_ever(
    engine: VllmEngine, fakes: list[Fake]
) -> None:
    async def slow() -> None:
        reply = await engine.forward(Call(PATH, {**STREAM, "max_tokens": 50}))
        for fake in fakes:
            fake.token_s = 5
        try:
            with pytest.raises(EngineTimeoutError, match=r"within 0\.6 s"):
                async for _ in reply.chunks():
                    pass
        finally:
            await reply.close()

    for fake in fakes:
        fake.token_s = 0.02
    asyncio.run(closing(engine, slow))


def test_a_reply_that_is_closed_stops_the_server(engine: VllmEngine, fakes: list[Fake]) -> None:
    async def leave() -> None:
        reply = await engine.forward(Call(PATH, {**STREAM, "max_tokens": 500}))
        async for _ in reply.chunks():
            break
        await reply.close()

    for fake in fakes:
        fake.token_s = 0.02
    asyncio.run(closing(engine, leave))
    wait_for(lambda: sum(fake.aborted for fake in fakes) == 1)
    assert engine.replicas.in_flight == 0


def test_a_deadline_of_the_request_is_no_fault_of_the_server(
    engine: VllmEngine, fakes: list[Fake]
) -> None:
    spoil(fakes, "hang", 10)
    for _ in range(4):
        with pytest.raises(EngineTimeoutError):
            run(engine, BODY, deadline=time.monotonic() + 0.1)
    assert not any(replica.breaker.is_open for replica in engine.replicas)
    assert sum(len(fake.seen) for fake in fakes) == 4


def test_a_server_that_is_silent_loses_its_requests_to_another(
    engine: VllmEngine, fakes: list[Fake]
) -> None:
    """The stream that it has begun ends with an error; what it had not begun to answer goes on."""

    async def both() -> tuple[str, str]:
        for fake in fakes:
            fake.token_s = 0.05
        begun = await engine.forward(Call(PATH, {**STREAM, "max_tokens": 200}))
        silent = next(fake for fake in fakes if fake.streams or fake.seen)
        other = fakes[1 - fakes.index(silent)]
        silent.fault, silent.count, silent.token_s = "hang", 9, 30
        other.token_s = 0.0
        waiting = [
            asyncio.create_task(engine.forward(Call(PATH, BODY, prompt_ids=(k,)))) for k in range(8)
        ]
        await asyncio.sleep(0.1)
        assert silent.seen[1:]
        silent.is_silent = True
        replies = await asyncio.gather(*waiting)
        try:
            with pytest.raises(EngineError, match="broke off"):
                async for _ in begun.chunks():
                    pass
        finally:
            for reply in (begun, *replies):
                await reply.close()
        return str(len(replies)), str({reply.replica.name for reply in replies})

    count, names = asyncio.run(closing(engine, both))
    assert count == "8"
    assert names in ("{'vllm-0'}", "{'vllm-1'}")
    for fake in fakes:
        fake.is_silent = False
    wait_for(lambda: len(engine.replicas.ready) == 2)


def test_a_blend_goes_where_its_modules_are_alone(engine: VllmEngine, fakes: list[Fake]) -> None:
    digest = engine.load_module(make_module(make_model(), "a"))
    key = next(iter(engine.modules._store.keys()))
    wait_for(lambda: all(digest in replica.modules for replica in engine.replicas))
    fakes[0].lacks.add(key)
    for number in range(12):
        assert run(engine, BODY, blend=Blend({digest: 1}), prompt_ids=(number,))
    assert len(fakes[0].seen) <= 3  # it is asked again every few seconds, and told of it once
    before = len(fakes[0].seen)
    assert text_of(run(engine, BODY))
    fakes[1].lacks.add(key)
    with pytest.raises(ModuleUnavailableError, match="not registered"):
        run(engine, BODY, blend=Blend({digest: 1}))
    assert len(fakes[0].seen) <= before + 1
    assert text_of(run(engine, BODY))


def test_no_more_requests_wait_than_may(backbone: Backbone, tmp_path: Path) -> None:
    fake = Fake(token_s=0.2)
    options = EngineOptions(max_concurrency=1, max_waiting=1)
    with engine_on(backbone, tmp_path, [fake], options=options) as engine:

        async def three() -> list[Any]:
            calls = [engine.forward(Call(PATH, BODY)) for _ in range(3)]
            tasks = []
            for call in calls:
                tasks.append(asyncio.create_task(call))
                await asyncio.sleep(0.05)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            for one in found:
                if not isinstance(one, BaseException):
                    await one.close()
            return found

        *started, refused = asyncio.run(closing(engine, three))
        assert isinstance(refused, QueueFullError)
        assert len(started) == 2
        assert not any(isinstance(one, BaseException) for one in started)


def test_the_same_beginning_goes_to_the_same_server(engine: VllmEngine, fakes: list[Fake]) -> None:
    system = tuple(range(130))
    for number in range(10):
        run(engine, BODY, prompt_ids=(*system, number))
    assert sorted(len(fake.seen) for fake in fakes) == [0, 10]


def test_short_prompts_are_shared_out_evenly(engine: VllmEngine, fakes: list[Fake]) -> None:
    async def eight() -> list[int]:
        for fake in fakes:
            fake.token_s = 0.05
        calls = [Call(PATH, BODY, prompt_ids=(number,)) for number in range(8)]
        replies = await asyncio.gather(*(engine.forward(call) for call in calls))
        for reply in replies:
            await reply.close()
        return [len(fake.seen) for fake in fakes]

    assert asyncio.run(closing(engine, eight)) == [4, 4]
