"""Faults of files, clocks and processes: what they hit fails by name, the rest goes on.

More of them: kill -9 and a full disk in modules/test_state.py, connections that are opened and
dropped in test_pressure.py, files that go or change in test_residency.py.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import torch

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.runtime.module_stack import ModuleStack

from ..tiny import make_model, make_module, make_prompt, make_tokenizer, reference_tokens
from .access.conftest import make_key
from .conftest import write_checkpoint
from .process import serving

MODULES = {f"m{k}": make_module(make_model(), f"m{k}", seed=k + 1) for k in range(5)}
PROMPT = make_prompt(10, seed=3)
DAY_S = 86_400


def expected(blend: dict[str, float], count: int = 8) -> str:
    tokens = reference_tokens(make_model(), MODULES, Blend(blend), PROMPT, count)
    decoded: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
    return decoded


def ask(url: str, model: str, count: int = 8, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": [list(PROMPT)], "max_tokens": count, "temperature": 0, **more}
    return httpx.post(url + "/v1/completions", json=body, timeout=60, trust_env=False)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@dataclass(frozen=True)
class Process:
    """A server of its own process, with room for three of five modules. folder: of its bank."""

    url: str
    folder: Path
    server: serving

    def signal(self, which: signal.Signals) -> None:
        self.server.process.send_signal(which)


def write_many(folder: Path) -> None:
    """A bank of its own files throughout, that a fault may spoil."""
    backbone = write_checkpoint(folder / "tiny")
    for name, module in MODULES.items():
        module.save(folder / "loras" / name)
    modules = [BankModule(name, folder / "loras" / name) for name in MODULES]
    write_bank(folder / "many", name="many", backbone=backbone, modules=modules)


def room_for(count: int) -> int:
    stack = ModuleStack(make_model())
    footprints = [stack.prepare(module).footprint for module in list(MODULES.values())[:count]]
    return stack.room.needed(footprints)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("faults")
    write_many(folder)
    config = folder / "serve.yaml"
    config.write_text(
        f"banks: [many]\ndtype: float32\nport: 0\nstate: state\nmodule_roots: [loras]\n"
        f"module_memory: {room_for(3)}\n"
        "pressure: {watchdog_seconds: 1, stalled_reader_seconds: 1}\n"
    )
    server = serving("serve", "--config", config)
    with server as url:
        yield Process(url, folder / "many", server)


class Streaming:
    """A long request in the background, for the length of a block."""

    def __init__(self, url: str, model: str) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._answer: Future[httpx.Response] = self._pool.submit(
            ask, url, model, 200, ignore_eos=True
        )

    def __enter__(self) -> Future[httpx.Response]:
        time.sleep(0.1)
        return self._answer

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def test_stopped_and_continued_it_goes_on_where_it_was(process: Process) -> None:
    with Streaming(process.url, "m0") as answer:
        process.signal(signal.SIGSTOP)
        time.sleep(2.5)  # longer than the watchdog and the patience with readers
        was_done = answer.done()
        process.signal(signal.SIGCONT)
        assert text_of(answer.result()) == expected({"m0": 1}, 200)
    assert not was_done
    wait_until(lambda: httpx.get(process.url + "/health").status_code == 200)
    assert text_of(ask(process.url, "m0")) == expected({"m0": 1})


def test_a_module_that_overflows_fails_its_own_request_alone(process: Process) -> None:
    deltas = make_module(make_model(), "huge").deltas
    huge = {
        name: LowRank(torch.full_like(delta.left, 1e38), torch.ones_like(delta.right))
        for name, delta in deltas.items()
    }
    Module("huge", huge).save(process.folder.parent / "loras" / "huge")
    assert load(process.url, "huge", "huge").status_code == 200
    with Streaming(process.url, "m1") as neighbour:
        for _ in range(3):
            assert code_of(ask(process.url, "huge")) == (500, "engine_failed")
        streamed = ask(process.url, "huge", stream=True).text
        assert "event: error" in streamed
        assert "[DONE]" not in streamed
        assert text_of(neighbour.result()) == expected({"m1": 1}, 200)
    assert unload(process.url, "huge").status_code == 200


def test_a_disk_that_fills_up_loses_log_lines_and_refuses_loads(process: Process) -> None:
    """Log and state can grow no more; whoever asks for answers gets them."""
    url, pid = process.url, process.server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        assert load(url, "late", "m1").status_code == 507
        for name in MODULES:
            assert text_of(ask(url, name)) == expected({name: 1})
        assert code_of(ask(url, "late")) == (404, "model_not_found")
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert load(url, "late", "m1").status_code == 200
    assert text_of(ask(url, "late")) == expected({"m1": 1})
    assert unload(url, "late").status_code == 200


def load(url: str, name: str, path: str) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path}
    return httpx.post(url + "/v1/load_lora_adapter", json=body)


def unload(url: str, name: str) -> httpx.Response:
    return httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": name})


@pytest.mark.parametrize("spoil", ["truncated", "overwritten", "empty"])
def test_files_that_are_spoilt_while_serving_hit_cold_loads_alone(
    process: Process, spoil: str
) -> None:
    """Weights in memory are copies: no file that changes under them is looked at again."""
    url, files = process.url, process.folder
    mapped = Path("/proc", str(process.server.process.pid), "maps").read_text()
    state = files.parent / "state"  # SQLite maps a file of its own there
    of_modules = [line for line in mapped.splitlines() if str(state) not in line]
    assert str(files.parent) not in "\n".join(of_modules)
    assert {text_of(ask(url, m)) for m in ("m0", "m1", "m2")}  # resident now; m3 and m4 are not
    spoilt = [*files.rglob("*.safetensors"), *files.parent.glob("tiny/*.safetensors")]
    kept = {file: file.read_bytes() for file in spoilt}
    with Streaming(url, "m0") as running:
        for file, content in kept.items():
            file.write_bytes(spoilt_content(spoil, content))  # in place: mapped pages see it
        for name in ("m1", "m2"):
            assert text_of(ask(url, name)) == expected({name: 1})
        assert code_of(ask(url, "m3")) == (503, "module_unavailable")
        assert text_of(ask(url, "tiny")) == expected({})
        assert text_of(running.result()) == expected({"m0": 1}, 200)
    listed = httpx.get(url + "/v1/modules/m3").json()
    assert listed["state"] == "failed"
    assert listed["error"]
    for file, content in kept.items():
        file.write_bytes(content)
    wait_until(lambda: ask(url, "m3").status_code == 200)  # it is tried again after a while
    assert text_of(ask(url, "m3")) == expected({"m3": 1})


def spoilt_content(how: str, content: bytes) -> bytes:
    if how == "truncated":
        return content[: len(content) // 2]
    return b"" if how == "empty" else content[:-1000] + b"\xff" * 1000


def wait_until(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} seconds"
        time.sleep(0.1)


_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {
  char text[32] = {0};
  int file = open(getenv("CLOCK_FILE"), O_RDONLY);
  if (file < 0) return 0;
  if (read(file, text, 31) < 0) text[0] = 0;
  close(file);
  return atol(text);
}
int clock_gettime(clockid_t which, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(which, now);
  if (which == CLOCK_REALTIME && !status) now->tv_sec += offset();
  return status;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec precise;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""


@dataclass(frozen=True)
class Jumping:
    """A server whose clock of the day can be set, and keys. tokens: by name."""

    url: str
    clock: Path
    keys: Path
    tokens: dict[str, str]

    def jump(self, seconds: int) -> None:
        """Set its clock so far from the true one."""
        new = self.clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self.clock)

    def chat(self, key: str, text: str = "shout the word 7", **more: object) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": 2, "temperature": 0, **more}
        headers = {"Authorization": f"Bearer {self.tokens[key]}"}
        return httpx.post(self.url + "/v1/chat/completions", json=body, headers=headers, timeout=60)


@pytest.fixture
def jumping(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jumping]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the clock is set by a few lines of C: a compiler is needed")
    library, source = tmp_path / "clock.so", tmp_path / "clock.c"
    source.write_text(_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    keys = tmp_path / "keys.yaml"
    values: dict[str, dict[str, object]] = {
        "any": {},
        "soon": {"expires": soon},
        "slow": {"requests_per_minute": 2},
    }
    tokens = {name: make_key(keys, name, **more) for name, more in values.items()}
    monkeypatch.setenv("CLOCK_FILE", str(tmp_path / "offset"))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    folder = bank.modules[0].path.parents[1]
    server = serving("serve", folder, "--dtype", "float32", "--api-keys", keys)
    monkeypatch.undo()  # this process keeps its clock
    with server as url:
        yield Jumping(url, tmp_path / "offset", keys, tokens)


def test_a_clock_that_jumps_moves_nothing_but_dates(jumping: Jumping) -> None:
    """Rates, deadlines, conversations and files that are watched go by a clock of their own."""
    assert [jumping.chat("slow").status_code for _ in range(3)] == [200, 200, 429]
    assert blend_of(jumping.chat("any", conversation="c")) == "upper=1"
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(lambda: jumping.chat("any", max_tokens=200, ignore_eos=True))
        for days in (1, -1, 300, 0):
            jumping.jump(days * DAY_S)
            answer = jumping.chat("any")
            assert abs(answer.json()["created"] - time.time() - days * DAY_S) < 60
            assert jumping.chat("soon").status_code == (401 if days > 0 else 200)
            refused = jumping.chat("slow")
            assert refused.status_code == 429
            assert 0 < int(refused.headers["retry-after"]) <= 60
            kept = jumping.chat("any", "thanks", conversation="c")  # no module's: it is kept
            assert blend_of(kept) == "upper=1"
            assert httpx.get(jumping.url + "/health").status_code == 200
        assert long.result().status_code == 200
    jumping.jump(-DAY_S)
    jumping.tokens["new"] = make_key(jumping.keys, "new")
    wait_until(lambda: jumping.chat("new").status_code == 200)


def blend_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-mergeroute-blend"]


@pytest.mark.slow
def test_killed_again_and_again_it_keeps_what_it_said_it_did(
    bank: Bank, checkpoint: Backbone, tmp_path: Path
) -> None:
    """At any moment of a load, a replacement or an unload, for the same state folder."""
    write_bank(tmp_path / "plain", name="zoo", backbone=checkpoint, modules=bank.modules)
    for name, module in MODULES.items():
        module.save(tmp_path / "loras" / name)
    options = ("--dtype", "float32", "--module-root", tmp_path / "loras", "--state", tmp_path / "s")
    said: dict[str, int] = {}
    dice = random.Random(0)
    for _ in range(6):
        server = serving("serve", tmp_path / "plain", *options)
        with server as url:
            listed = httpx.get(url + "/v1/modules").json()["data"]
            found = {e["name"]: e["generation"] for e in listed if e["name"] in MODULES}
            assert all(found[name] - g in (0, 1) for name, g in said.items() if name in found)
            assert sum(found.get(name, 0) != g for name, g in said.items()) <= 1
            for name in found:
                assert ask(url, name).status_code == 200
            said = found
            changing = threading.Thread(target=change_many, args=(url, said, dice))
            changing.start()
            time.sleep(dice.uniform(0.05, 1.5))
            server.process.send_signal(signal.SIGKILL)
            changing.join()


def change_many(url: str, said: dict[str, int], dice: random.Random) -> None:
    """Load, replace and unload until the server has gone. said: what it said that it did."""
    while True:
        name = dice.choice(list(MODULES))
        verb = "unload" if name in said and dice.random() < 0.3 else "load"
        body = {"lora_name": name, "lora_path": name, "load_inplace": name in said}
        body = {"lora_name": name} if verb == "unload" else body
        try:
            response = httpx.post(f"{url}/v1/{verb}_lora_adapter", json=body)
        except httpx.HTTPError:
            return
        assert response.status_code == 200, response.text
        if verb == "unload":
            del said[name]
        else:
            said[name] = int(response.headers["x-mergeroute-generation"])
