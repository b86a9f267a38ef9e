"""More modules than fit in memory behind a real server."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import UnknownTargetError
from mergeroute.runtime.module_stack import ModuleStack
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.residency import Residency
from mergeroute.serving import choices
from mergeroute.serving.assigning import Assignment
from mergeroute.serving.errors import SettingsError, UsageError
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.schemas.completions import CompletionRequest
from mergeroute.serving.service import Service, ServiceOptions
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings
from mergeroute.serving.terms import NO_TERMS

from ..tiny import make_model, make_module, make_prompt, make_tokenizer, reference_tokens
from .conftest import running

MODULES = {f"m{k}": make_module(make_model(), f"m{k}", seed=k + 1) for k in range(6)}
_STACK = ModuleStack(make_model())
ONE = _STACK.room.needed([_STACK.prepare(MODULES["m0"]).footprint])
PROMPT = make_prompt(10, seed=3)


def expected(*names: str) -> str:
    blend = Blend(dict.fromkeys(names, 1.0))
    tokens = reference_tokens(make_model(), MODULES, blend, PROMPT, 8)
    decoded: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
    return decoded


@dataclass(frozen=True)
class Tight:
    """A server with room for two of six modules."""

    url: str
    service: Service
    folders: Path

    @property
    def residency(self) -> Residency:
        return self.service.hosted[0].residency

    def there(self) -> list[str]:
        digests = self.service.hosted[0].digests
        return [name for name, d in digests.items() if self.residency.info(d).is_resident]

    def ask(self, model: str, **more: object) -> httpx.Response:
        body = {"model": model, "prompt": [list(PROMPT)], "max_tokens": 8, "temperature": 0, **more}
        return httpx.post(self.url + "/v1/completions", json=body, timeout=60)


def adhoc(backbone: Backbone, folders: Path) -> Bank:
    for name, module in MODULES.items():
        module.save(folders / name)
    return Bank.adhoc("many", backbone, [BankModule(name, folders / name) for name in MODULES])


def placement(**more: object) -> Placement:
    options = EngineOptions(max_concurrency=8, module_bytes=2 * ONE)
    return Placement(dtype="float32", options=options, **more)  # type: ignore[arg-type]


@pytest.fixture
def tight(checkpoint: Backbone, tmp_path: Path) -> Iterator[Tight]:
    hosted = host_banks([adhoc(checkpoint, tmp_path)], placement())
    service = Service(hosted, ServiceOptions(module_roots=(tmp_path,)))
    with running(service) as url:
        yield Tight(url, service, tmp_path)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_answers_are_exact_and_say_what_had_to_be_read(tight: Tight) -> None:
    assert tight.there() == ["m0", "m1"]
    warm, cold = tight.ask("m1"), tight.ask("m4")
    assert (text_of(warm), text_of(cold)) == (expected("m1"), expected("m4"))
    assert "x-mergeroute-cold" not in warm.headers
    assert cold.headers["x-mergeroute-cold"] == "m4"
    assert tight.there() == ["m1", "m4"]
    both = tight.ask("blend:m2=1,m3=1")
    assert text_of(both) == expected("m2", "m3")
    assert both.headers["x-mergeroute-cold"] == "m2,m3"


def test_complaint_16_more_modules_than_room_under_load(tight: Tight) -> None:
    wanted = {name: expected(name) for name in MODULES}
    names = [f"m{(k * 5) % 6}" for k in range(60)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda name: text_of(tight.ask(name)), names))
    assert found == [wanted[name] for name in names]


def test_several_prompts_get_their_modules_one_after_the_other(tight: Tight) -> None:
    """All of them together would not fit: each starts when its own are there."""
    body = {"model": "blend:m4=1,m5=1", "prompt": [list(PROMPT)] * 3, "n": 2, "max_tokens": 2}
    response = httpx.post(tight.url + "/v1/completions", json=body, timeout=60)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(6))


def test_one_cancelled_again_and_again_leaves_nothing_running(tight: Tight) -> None:
    async def assigned(model: str) -> tuple[CompletionRequest, list[Assignment]]:
        body = CompletionRequest(model=model, prompt=list(PROMPT), max_tokens=50, ignore_eos=True)
        return body, await tight.service.assign(body)

    async def run() -> None:
        _, cold = await assigned("blend:m2=1,m3=1")
        body, warm = await assigned("m1")
        async with tight.residency.hold([tight.service.hosted[0].digests["m0"]]):
            task = asyncio.ensure_future(choices.start(body, [*warm * 8, *cold], NO_TERMS))
            for _ in range(3):
                await asyncio.sleep(0)
            while not task.done():
                await asyncio.sleep(0)
                task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)  # the loop of a server goes on

    asyncio.run(run())
    engine = tight.service.hosted[0].engine
    deadline = time.monotonic() + 10
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.stats().running
    assert engine.stats().generated_tokens < 8 * 50
    assert tight.residency.stats().waiting == 0


def test_a_blend_that_never_fits_is_400_and_says_how_much_there_is(tight: Tight) -> None:
    response = tight.ask("blend:m0=1,m1=1,m2=1")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert f"{3 * ONE:,}" in error["message"]
    assert f"{2 * ONE:,}" in error["message"]


def test_files_that_have_gone_fail_their_own_requests(tight: Tight) -> None:
    shutil.rmtree(tight.folders / "m5")
    response = tight.ask("m5")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "module_unavailable")
    assert response.headers["retry-after"]
    assert "'m5'" in error["message"]
    assert str(tight.folders) not in error["message"]
    assert text_of(tight.ask("m4")) == expected("m4")
    info = tight.residency.info(tight.service.hosted[0].digests["m5"])
    assert info.state == "failed"
    assert str(tight.folders / "m5") in str(info.error)


def test_files_that_changed_are_not_served_under_the_old_digest(tight: Tight) -> None:
    make_module(make_model(), "m5", seed=99).save(tight.folders / "m5")
    assert tight.ask("m5").status_code == 503
    body = {"lora_name": "m5", "lora_path": "m5", "load_inplace": True}
    assert httpx.post(tight.url + "/v1/load_lora_adapter", json=body).status_code == 200
    assert tight.ask("m5").status_code == 200


def test_a_preview_reads_nothing(tight: Tight) -> None:
    for body in ({"model": "m5"}, {"model": "many", "routing": "arrow"}):
        response = httpx.post(tight.url + "/v1/route", json={"prompt": "x", **body})
        assert response.status_code == 200
    assert tight.there() == ["m0", "m1"]


def test_routing_by_token_takes_all_modules(tight: Tight) -> None:
    response = tight.ask("many", routing="arrow")
    assert response.status_code == 400
    assert "m0, m1, m2, m3, m4, m5" in response.json()["error"]["message"]
    for name in ("m2", "m3", "m4", "m5"):
        body = {"lora_name": name}
        assert httpx.post(tight.url + "/v1/unload_lora_adapter", json=body).status_code == 200
    assert tight.ask("m0").status_code == 200
    assert tight.ask("many", routing="arrow").status_code == 200


def test_pinned_and_prefetched_modules(checkpoint: Backbone, tmp_path: Path) -> None:
    bank = adhoc(checkpoint, tmp_path)
    told: list[str] = []
    named = placement(pinned=("many:m3",), prefetch=("m4",))
    service = Service(host_banks([bank], named, report=told.append))
    with running(service) as url:
        tight = Tight(url, service, tmp_path)
        assert tight.there() == ["m3", "m4"]
        assert sum("read when it is asked for" in line for line in told) == 4
        for name in ("m0", "m1"):
            assert text_of(tight.ask(name)) == expected(name)
        assert tight.there() == ["m1", "m3"]
    with pytest.raises(UnknownTargetError, match="'m9' is to be pinned or prefetched"):
        host_banks([bank], placement(pinned=("m9",)))


def test_settings_say_how_much_memory_and_what_stays_in_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("banks: [zoo]\nmodule_memory: 2GB\npinned_modules: [a]\nprefetch_modules: [b]")
    told = read_settings(file, {}).placement
    assert (told.options.module_bytes, told.pinned, told.prefetch) == (2 * 10**9, ("a",), ("b",))
    told = read_settings(file, {"module_memory": "500 MB"}).placement
    assert told.options.module_bytes == 500 * 10**6
    plain = ServeSettings(banks=("zoo",)).placement
    assert (plain.options.module_bytes, plain.pinned, plain.prefetch) == (None, (), None)
    with pytest.raises(UsageError, match="module_memory: 'much' is no size"):
        read_settings(None, {"banks": ("zoo",), "module_memory": "much"})
    file.write_text("banks: [zoo]\npinned_modules: [a]")
    with pytest.raises(SettingsError, match="need module_memory"):
        read_settings(file, {})
