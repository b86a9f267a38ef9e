"""Residency: more modules than fit, each answer that of the merged model, and nobody starves."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import (
    EngineError,
    EngineStoppedError,
    ModuleError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
    UnknownModuleError,
)
from mergeroute.adapters.lora import Module
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.module_stack import ModuleStack
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.residency import Residency
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams, TokenGate

from ..tiny import make_model, make_module, make_prompt, make_rich_module, reference_tokens

PLAIN = make_model()
RANK = 4
MODULES = {f"m{k}": make_module(PLAIN, f"m{k}", rank=RANK, seed=k + 1) for k in range(12)}
_STACK = ModuleStack(make_model())
ONE = _STACK.room.needed([_STACK.prepare(MODULES["m0"]).footprint])
"""Bytes of one of them in memory."""

BLEND = "blend:m1=0.5,m2=0.25,m3=0.25"


STATM = Path("/proc/self/statm")


@contextmanager
def resident(
    *, room: int | None, patience_s: float = 1.0, retry_s: float = 5.0, max_waiting: int = 1024
) -> Iterator[Residency]:
    """room: for so many modules."""
    options = EngineOptions(
        max_concurrency=8,
        max_waiting=max_waiting,
        module_bytes=None if room is None else room * ONE,
    )
    residency = Residency(
        TorchEngine(make_model(), options=options), patience_s=patience_s, retry_s=retry_s
    )
    try:
        yield residency
    finally:
        residency.stop()


def register(residency: Residency, *names: str, is_pinned: bool = False) -> dict[str, str]:
    return {
        name: residency.register(
            MODULES[name], partial(MODULES.__getitem__, name), is_pinned=is_pinned
        )
        for name in names or MODULES
    }


async def tokens(
    residency: Residency, digests: dict[str, str], blend: Blend, *, seed: int = 0, count: int = 8
) -> list[int]:
    renamed = blend.renamed(digests)
    sampling = SamplingParams(max_tokens=count, temperature=0)
    async with residency.hold(tuple(renamed)):
        generation = residency.engine.submit(
            GenerationRequest(make_prompt(12, seed=seed), renamed, sampling)
        )
    return [event.token_id async for event in generation if event.token_id is not None]


def there(residency: Residency, digests: dict[str, str]) -> list[str]:
    return [name for name, digest in digests.items() if residency.info(digest).is_resident]


def stack_bytes(residency: Residency) -> int:
    assert isinstance(residency.engine, TorchEngine)
    return sum(buffer.nbytes for buffer in residency.engine.model.buffers())


def test_answers_are_those_of_the_merged_model_over_more_modules_than_fit() -> None:
    blends = [Blend({f"m{k % 12}": 1.0, f"m{(k * 5 + 1) % 12}": -0.5}) for k in range(36)]
    expected = {
        k: reference_tokens(PLAIN, MODULES, blend, make_prompt(12, seed=k), 8)
        for k, blend in enumerate(blends)
    }

    async def ask(residency: Residency, digests: dict[str, str]) -> list[list[int]]:
        return await asyncio.gather(
            *(tokens(residency, digests, blend, seed=k) for k, blend in enumerate(blends))
        )

    with resident(room=4, patience_s=0.05) as residency:
        bare = stack_bytes(residency)
        digests = register(residency)
        assert there(residency, digests) == ["m0", "m1", "m2", "m3"]
        found = asyncio.run(ask(residency, digests))
        assert stack_bytes(residency) - bare <= 4 * ONE
        assert residency.engine.stats().modules == 4
    assert dict(enumerate(found)) == expected
    cold = sum(residency.info(digest).cold_loads for digest in digests.values())
    assert cold >= 8


def test_mixed_ranks_and_vectors_are_exact_and_keep_to_the_budget() -> None:
    """What moves in memory to make room moves under requests that run."""
    modules = {f"r{k}": make_module(PLAIN, f"r{k}", rank=1 + 3 * (k % 4), seed=k) for k in range(8)}
    modules |= {f"v{k}": make_rich_module(PLAIN, f"v{k}", rank=2 + k, seed=k) for k in range(2)}
    expected = {
        name: reference_tokens(PLAIN, modules, Blend({name: 1.0}), make_prompt(12, seed=0), 40)
        for name in modules
    }

    async def ask(residency: Residency, digests: dict[str, str]) -> None:
        for _ in range(3):
            jobs = [tokens(residency, digests, Blend({n: 1.0}), count=40) for n in modules]
            found = await asyncio.gather(*jobs)
            assert dict(zip(modules, found, strict=True)) == expected
            assert stack_bytes(residency) - bare <= budget

    with resident(room=6, patience_s=0.02) as residency:
        bare, budget = stack_bytes(residency), 6 * ONE
        digests = {
            name: residency.register(module, partial(modules.__getitem__, name))
            for name, module in modules.items()
        }
        asyncio.run(ask(residency, digests))


def test_the_least_recently_used_goes_and_a_pinned_one_never() -> None:
    with resident(room=3) as residency:
        digests = register(residency, "m0", is_pinned=True) | register(residency, "m1", "m2", "m3")
        assert there(residency, digests) == ["m0", "m1", "m2"]
        for name in ("m2", "m1"):
            asyncio.run(tokens(residency, digests, Blend({name: 1.0})))
        asyncio.run(tokens(residency, digests, Blend({"m3": 1.0})))
        assert there(residency, digests) == ["m0", "m1", "m3"]
        asyncio.run(tokens(residency, digests, Blend({"m2": 1.0, "m3": 1.0})))
        assert there(residency, digests) == ["m0", "m2", "m3"]
        info = residency.info(digests["m3"])
        assert (info.rank, info.bytes, info.hits, info.cold_loads) == (RANK, ONE, 2, 1)
        assert time.time() - info.last_used < 60
        assert residency.info(digests["m0"]).is_pinned


def test_who_waits_for_what_a_pin_makes_impossible_is_told() -> None:
    async def run(residency: Residency, digests: dict[str, str]) -> None:
        async with residency.hold([digests["m0"]]):
            blocked = asyncio.create_task(tokens(residency, digests, Blend.parse(BLEND)))
            await asyncio.sleep(0.1)
            assert residency.stats().waiting == 1
        await blocked  # there was room for all three
        async with residency.hold([digests["m0"]]):
            blocked = asyncio.create_task(tokens(residency, digests, Blend.parse(BLEND)))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(register, residency, "m5", is_pinned=True)
            with pytest.raises(RequestError, match="pinned"):
                await asyncio.wait_for(blocked, 5)
        assert residency.stats().waiting == 0

    with resident(room=3) as residency:
        asyncio.run(run(residency, register(residency, "m0", "m1", "m2", "m3")))


def test_without_a_budget_all_stay() -> None:
    with resident(room=None) as residency:
        digests = register(residency)
        assert there(residency, digests) == list(MODULES)


def test_many_that_wait_for_a_module_have_it_read_once_and_streams_go_on_meanwhile() -> None:
    reads, may_read = [], threading.Event()

    def slow() -> Module:
        reads.append(1)
        may_read.wait(30)
        return MODULES["m1"]

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        cold = [
            asyncio.ensure_future(tokens(residency, digests, Blend({"m1": 1.0}))) for _ in range(5)
        ]
        await asyncio.sleep(0)
        await tokens(residency, digests, Blend({"m0": 1.0}), count=60)
        assert not any(task.done() for task in cold)
        may_read.set()
        expected = reference_tokens(PLAIN, MODULES, Blend({"m1": 1.0}), make_prompt(12, seed=0), 8)
        assert await asyncio.gather(*cold) == [expected] * 5
        assert len(reads) == 1

    with resident(room=2) as residency:
        digests = register(residency, "m0", "m2")
        digests["m1"] = residency.register(MODULES["m1"], slow)
        asyncio.run(run(residency, digests))


def test_complaint_16_hot_modules_do_not_starve_a_cold_one() -> None:
    """The hot ones are always in use: without patience the cold one would never find room."""

    async def keep_hot(residency: Residency, digests: dict[str, str], name: str) -> int:
        count = 0
        while not done.is_set():
            count += len(await tokens(residency, digests, Blend({name: 1.0}), count=40))
        return count

    async def run(residency: Residency, digests: dict[str, str]) -> list[int]:
        hot = [
            asyncio.ensure_future(keep_hot(residency, digests, name))
            for name in ("m0", "m1")
            for _ in range(3)
        ]
        await asyncio.sleep(0.1)
        cold = [tokens(residency, digests, Blend({f"m{k}": 1.0})) for k in (2, 3)]
        await asyncio.wait_for(asyncio.gather(*cold), 20)
        done.set()
        return await asyncio.gather(*hot)

    done = threading.Event()
    with resident(room=2, patience_s=0.1) as residency:
        digests = register(residency)
        assert min(asyncio.run(run(residency, digests))) > 0


def test_cold_requests_are_served_in_order_of_arrival() -> None:
    order: list[str] = []

    def source(name: str) -> Callable[[], Module]:
        def read() -> Module:
            order.append(name)
            return MODULES[name]

        return read

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        names = [f"m{k}" for k in (5, 1, 4, 2, 3)]
        await asyncio.gather(*(tokens(residency, digests, Blend({n: 1.0})) for n in names))
        assert order == names

    with resident(room=1) as residency:
        digests = {n: residency.register(m, source(n)) for n, m in MODULES.items()}
        asyncio.run(run(residency, digests))


def test_a_module_that_cannot_be_read_fails_its_own_requests_and_comes_back() -> None:
    files = {"m1": MODULES["m1"]}

    def read() -> Module:
        if "m1" not in files:
            raise ModuleError("/loras/m1 is no folder")
        return files["m1"]

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        del files["m1"]
        jobs = [tokens(residency, digests, Blend({name: 1.0})) for name in ("m1", "m2", "m0", "m1")]
        found = await asyncio.gather(*jobs, return_exceptions=True)
        for failed in (found[0], found[3]):
            assert isinstance(failed, ModuleUnavailableError)
            assert "'m1'" in str(failed)
        assert all(isinstance(fine, list) for fine in found[1:3])
        info = residency.info(digests["m1"])
        assert (info.state, info.error) == ("failed", "/loras/m1 is no folder")
        files["m1"] = MODULES["m3"]
        with pytest.raises(ModuleUnavailableError):
            await tokens(residency, digests, Blend({"m1": 1.0}))
        assert "changed since" in str(residency.info(digests["m1"]).error)
        files["m1"] = MODULES["m1"]
        await tokens(residency, digests, Blend({"m1": 1.0}))
        info = residency.info(digests["m1"])
        assert (info.state, info.error) == ("resident", None)
        assert info.cold_loads in (3, 4)  # the fourth of the jobs may come once the first failed

    with resident(room=1, retry_s=0) as residency:
        digests = register(residency, "m0", "m2")
        digests["m1"] = residency.register(MODULES["m1"], read)
        asyncio.run(run(residency, digests))


def test_one_that_failed_is_not_read_again_at_once() -> None:
    reads: list[int] = []

    def read() -> Module:
        reads.append(1)
        raise OSError("disk full")

    with resident(room=1) as residency:
        register(residency, "m0")
        digest = residency.register(MODULES["m1"], read)
        for _ in range(3):
            with pytest.raises(ModuleUnavailableError, match="cannot be read any more"):
                asyncio.run(tokens(residency, {"m1": digest}, Blend({"m1": 1.0})))
        assert len(reads) == 1


def test_what_never_fits_is_refused_by_name() -> None:
    with resident(room=2) as residency:
        digests = register(residency, "m0", "m1", "m2")
        with pytest.raises(RequestError, match=rf"m0, m1, m2 takes {3 * ONE:,}.*{2 * ONE:,}"):
            asyncio.run(tokens(residency, digests, Blend(dict.fromkeys(digests, 1.0))))
        huge = make_module(PLAIN, "huge", rank=9)
        with pytest.raises(ModuleError, match="'huge' takes"):
            residency.register(huge, lambda: huge)
        residency.register(MODULES["m3"], lambda: MODULES["m3"], is_pinned=True)
        with pytest.raises(RequestError, match="pinned"):
            asyncio.run(tokens(residency, digests, Blend({"m0": 1.0, "m1": 1.0})))
        with pytest.raises(ModuleError, match=r"'m4' takes .* pinned"):
            register(residency, "m0", "m4", is_pinned=True)
        asyncio.run(tokens(residency, digests, Blend({"m0": 1.0})))
        with pytest.raises(EngineError, match="the budget is"):
            residency.engine.load_module(make_module(PLAIN, "beside", rank=4, seed=77))


def test_too_many_that_wait_are_refused() -> None:
    may_read = threading.Event()

    def slow(name: str) -> Callable[[], Module]:
        def read() -> Module:
            may_read.wait(30)
            return MODULES[name]

        return read

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        jobs = [
            asyncio.ensure_future(tokens(residency, digests, Blend({f"m{k}": 1.0})))
            for k in range(1, 6)
        ]
        await asyncio.sleep(0)
        may_read.set()
        found = await asyncio.gather(*jobs, return_exceptions=True)
        refused = [one for one in found if isinstance(one, BaseException)]
        assert [type(one) for one in refused] == [QueueFullError] * 2

    with resident(room=1, max_waiting=2) as residency:
        digests = {n: residency.register(m, slow(n)) for n, m in MODULES.items()}
        asyncio.run(run(residency, digests))


def test_one_that_gives_up_waiting_leaves_no_hold_behind() -> None:
    may_read = threading.Event()

    def slow() -> Module:
        may_read.wait(30)
        return MODULES["m1"]

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        jobs = [
            asyncio.ensure_future(tokens(residency, digests, Blend({name: 1.0})))
            for name in ("m1", "m2")
        ]
        await asyncio.sleep(0.05)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        may_read.set()
        for name in ("m2", "m0", "m1"):
            await asyncio.wait_for(tokens(residency, digests, Blend({name: 1.0})), 20)

    with resident(room=1) as residency:
        digests = register(residency, "m0", "m2")
        digests["m1"] = residency.register(MODULES["m1"], slow)
        asyncio.run(run(residency, digests))


def test_one_taken_away_runs_on_for_who_has_it_and_is_unknown_to_who_waits() -> None:
    expected = reference_tokens(PLAIN, MODULES, Blend({"m0": 1.0}), make_prompt(12, seed=0), 100)

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        running = asyncio.ensure_future(tokens(residency, digests, Blend({"m0": 1.0}), count=100))
        await asyncio.sleep(0.02)
        waits = asyncio.ensure_future(tokens(residency, digests, Blend({"m1": 1.0})))
        await asyncio.sleep(0)
        for name in ("m1", "m0"):
            await asyncio.to_thread(residency.unregister, digests[name], sources[name])
        with pytest.raises(UnknownModuleError):
            await waits
        with pytest.raises(UnknownModuleError):
            await tokens(residency, digests, Blend({"m0": 1.0}))
        assert await running == expected

    sources = {name: partial(MODULES.__getitem__, name) for name in ("m0", "m1")}
    with resident(room=1) as residency:
        digests = {n: residency.register(MODULES[n], read) for n, read in sources.items()}
        asyncio.run(run(residency, digests))
        with pytest.raises(UnknownModuleError):
            residency.info(digests["m0"])
        again = register(residency, "m2")
        assert there(residency, again) == ["m2"]


def test_registrations_are_counted_and_the_newest_files_count() -> None:
    def gone() -> Module:
        raise ModuleError("gone")

    def here() -> Module:
        return MODULES["m0"]

    with resident(room=1) as residency:
        digest = residency.register(MODULES["m0"], gone)
        residency.register(MODULES["m0"], here)
        digests = {"m0": digest} | register(residency, "m1")
        for name in ("m1", "m0"):
            asyncio.run(tokens(residency, digests, Blend({name: 1.0})))
        residency.unregister(digest, gone)
        with pytest.raises(UnknownModuleError):
            residency.unregister(digest, gone)
        asyncio.run(tokens(residency, digests, Blend({"m0": 1.0})))
        residency.unregister(digest, here)
        with pytest.raises(UnknownModuleError):
            residency.unregister(digest, here)


def test_later_registrations_that_went_leave_the_first_ones_files() -> None:
    def gone() -> Module:
        raise ModuleError("gone")

    with resident(room=1) as residency:
        digests = register(residency, "m0", "m1")
        for _ in range(2):
            residency.register(MODULES["m0"], gone)
            residency.unregister(digests["m0"], gone)
        for name in ("m1", "m0"):
            asyncio.run(tokens(residency, digests, Blend({name: 1.0})))


def test_one_that_leaves_before_it_is_read_is_read_for_those_that_were_there() -> None:
    readers_busy = threading.Event()

    def slow() -> Module:
        readers_busy.wait(30)
        return MODULES["m0"]

    def read() -> Module:
        return MODULES["m1"]

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        names = ("m0", "m2", "m1")  # as many readers as modules before it
        jobs = [asyncio.ensure_future(tokens(residency, digests, Blend({n: 1.0}))) for n in names]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(residency.unregister, digests["m1"], read)
        readers_busy.set()
        found = await asyncio.gather(*jobs)
        for name, answer in zip(names, found, strict=True):
            expected = reference_tokens(
                PLAIN, MODULES, Blend({name: 1.0}), make_prompt(12, seed=0), 8
            )
            assert answer == expected

    def also_slow() -> Module:
        readers_busy.wait(30)
        return MODULES["m2"]

    with resident(room=3) as residency:
        digests = register(residency, "m3", "m4", "m5")
        for name, source in (("m0", slow), ("m1", read), ("m2", also_slow)):
            digests[name] = residency.register(MODULES[name], source)
        asyncio.run(run(residency, digests))


def test_a_pin_lasts_as_long_as_its_registration() -> None:
    def read() -> Module:
        return MODULES["m0"]

    async def hold(residency: Residency, digests: Collection[str]) -> None:
        async with residency.hold(digests):
            pass

    with resident(room=2) as residency:
        digests = register(residency, "m0", "m1", "m2")
        residency.register(MODULES["m0"], read, is_pinned=True)
        with pytest.raises(RequestError, match="pinned"):
            asyncio.run(hold(residency, [digests["m1"], digests["m2"]]))
        residency.unregister(digests["m0"], read)
        assert not residency.info(digests["m0"]).is_pinned
        asyncio.run(hold(residency, [digests["m1"], digests["m2"]]))
        assert there(residency, digests) == ["m1", "m2"]


def test_who_waits_when_the_engine_stops_is_told() -> None:
    may_read = threading.Event()

    def slow() -> Module:
        may_read.wait(30)
        return MODULES["m1"]

    async def run(residency: Residency, digests: dict[str, str]) -> None:
        jobs = [
            asyncio.ensure_future(tokens(residency, digests, Blend({name: 1.0})))
            for name in ("m1", "m2")
        ]
        await asyncio.sleep(0.05)
        residency.stop()
        may_read.set()
        found = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(one) for one in found] == [EngineStoppedError] * 2
        with pytest.raises(EngineStoppedError):
            await tokens(residency, digests, Blend({"m0": 1.0}))

    with resident(room=1) as residency:
        digests = register(residency, "m0", "m2")
        digests["m1"] = residency.register(MODULES["m1"], slow)
        asyncio.run(run(residency, digests))


@pytest.mark.skipif(not STATM.exists(), reason="tells memory on Linux alone")
def test_complaint_07_memory_is_flat_over_a_thousand_loads() -> None:
    """Loads, evictions, unloads, and a gate over them every now and then."""
    modules = [make_module(PLAIN, "m", rank=RANK, seed=100 + k) for k in range(20)]

    def cycle(residency: Residency, number: int) -> None:
        module = modules[number % len(modules)]

        def read() -> Module:
            return module

        digest = residency.register(module, read)
        others: Collection[str] = (kept["m0"], kept["m1"])
        if number % 10 == 0:
            gate = TokenGate(TokenRouting("arrow"), (digest, kept["m0"]))
            others = gate.modules
        with residency.hold_now((digest,)):
            pass
        with residency.hold_now(others):
            if number % 10 == 0:
                residency.engine.prepare_gate(gate)
        residency.unregister(digest, read)

    with resident(room=2) as residency:
        kept = register(residency, "m0", "m1")
        for number in range(200):
            cycle(residency, number)
        before, size = pages(), stack_bytes(residency)
        for number in range(1_000):
            cycle(residency, number)
        assert stack_bytes(residency) == size
        assert pages() - before < 0.02 * before
        assert residency.engine.stats().modules <= 2


def pages() -> int:
    """Pages of memory that this process has."""
    gc.collect()
    return int(STATM.read_text().split()[1])
