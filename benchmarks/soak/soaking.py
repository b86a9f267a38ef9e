"""A soak from the first request to the server's end."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import WEIGHTS_FILE
from mergeroute.serving.cli import DEMO_BANK

from .hot import Changer
from .ledger import Ledger
from .references import HOT, Mix, References, contents_of, hot_mixes, mixes_of
from .server import Sample, Server
from .traffic import Question, Traffic, slow_transport

ROOM = 5
"""Modules that fit in memory, of eight and those that come and go."""

POOLS = (os.cpu_count() or 1) + 8
"""Threads that pools may add after the first third: they start one when all others are busy, and
asyncio's own has four more than there are cores."""

_PERIOD_S = 1.0
_SETTLES_WITHIN_S = 20
_CHANGE_EVERY_S = 0.3


@dataclass(frozen=True)
class Plan:
    """How long, and how much. prompts, count: of the table of answers.

    rss_share: by how much memory may grow between the thirds; the allocator and the caches need
    some minutes until it is flat.
    """

    seconds: float
    clients: int = 12
    prompts: int = 10
    count: int = 24
    rss_share: float = 0.02


@dataclass
class Result:
    """What a soak found. samples: of the process while it was under load."""

    plan: Plan
    ledger: Ledger = field(default_factory=Ledger)
    samples: list[Sample] = field(default_factory=list)
    idle: tuple[Sample, Sample] | None = None
    modules: int = 0
    exit_status: int | None = None

    def thirds(self, name: str) -> tuple[float, float]:
        """Medians of a figure in the first third after a warm-up of a tenth, and in the last."""
        values = [getattr(sample, name) for sample in self.samples[len(self.samples) // 10 :]]
        third = max(1, len(values) // 3)
        return median(values[:third]), median(values[-third:])


def soak(plan: Plan, folder: Path) -> Result:
    """Soak a server whose files lie in an empty folder. What is wrong is in the result's ledger."""
    references = References(Bank.open(DEMO_BANK), prompts=plan.prompts, count=plan.count)
    references.prepare(_mixes(references))
    _write_modules(references, folder / "loras")
    server = Server(folder, module_bytes=references.room_for(ROOM))
    result = Result(plan)
    try:
        asyncio.run(_drive(server, references, result))
    finally:
        result.exit_status = server.stop()
    result.ledger.check(
        result.exit_status == 0, f"exit status {result.exit_status}:\n{server.log_end()}"
    )
    _check_log(server, result.ledger)
    _check_flat(result)
    return result


async def _drive(server: Server, references: References, result: Result) -> None:
    plan, ledger = result.plan, result.ledger
    options: dict[str, Any] = {"base_url": server.url, "timeout": 60, "trust_env": False}
    async with httpx.AsyncClient(**options) as admin:
        routed = await _routes(admin, server.keys["one"], references)
        before = server.sample()
        changer = Changer(admin, server.keys["admin"], ledger)
        until = time.monotonic() + plan.seconds
        async with (
            httpx.AsyncClient(**options) as client,
            httpx.AsyncClient(**options, transport=slow_transport()) as slow_client,
        ):
            traffic = Traffic(
                client,
                slow_client,
                server.keys,
                references,
                _questions(references),
                routed,
                changer,
                ledger,
            )
            await asyncio.gather(
                *(traffic.run(until, seed) for seed in range(plan.clients)),
                changer.run(until, _CHANGE_EVERY_S, seed=99),
                _watch(server, result.samples, until),
            )
        await _check_idle(admin, server, ledger)
        await changer.settle()
        result.modules = await _check_modules(admin, server, changer, ledger)
        await _check_last(admin, server, references, ledger)
        result.idle = before, server.sample()


async def _watch(server: Server, samples: list[Sample], until: float) -> None:
    while time.monotonic() < until and server.is_running:
        samples.append(server.sample())
        await asyncio.sleep(_PERIOD_S)


async def _routes(
    client: httpx.AsyncClient, key: str, references: References
) -> tuple[Question, ...]:
    """What the router decides for every prompt, before anything else is asked."""
    routed = []
    for number, prompt in enumerate(references.prompts):
        body = {"messages": [{"role": "user", "content": prompt.text}]}
        headers = {"Authorization": f"Bearer {key}"}
        response = await client.post("/v1/route", json=body, headers=headers)
        blend: dict[str, float] = response.raise_for_status().json()["blend"]
        mix = tuple(sorted(blend.items()))
        references.prepare_once(mix)
        routed.append(Question(number, mix, "auto", Blend(blend).weights_text))
    return tuple(q for q in routed if references.find(q.number, q.mix))


def _mixes(references: References) -> Iterable[Mix]:
    """All that is asked for, of the bank and of the hot names."""
    yield from mixes_of(references.bank)
    for name in HOT:
        for content in contents_of(name):
            yield from (mix for _, mix in hot_mixes(name, content))


def _questions(references: References) -> tuple[Question, ...]:
    """Every prompt with every blend of the bank that the table has an answer for."""
    return tuple(
        Question(number, mix, _model(mix), Blend(dict(mix)).weights_text)
        for mix in mixes_of(references.bank)
        for number in range(len(references.prompts))
        if references.find(number, mix)
    )


def _model(mix: Mix) -> str:
    if not mix:
        return "zoo-base"
    if [weight for _, weight in mix] == [1.0]:
        return mix[0][0]
    return "blend:" + ",".join(f"{name}={weight}" for name, weight in mix)


def _write_modules(references: References, root: Path) -> None:
    """The hot names' contents, one that is cut short, and one outside the root."""
    references.save_contents(root)
    good = root / contents_of("hot0")[0]
    shutil.copytree(good, root.parent / "outside")
    shutil.copytree(good, root / "truncated")
    weights = root / "truncated" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:5000])


async def _check_idle(client: httpx.AsyncClient, server: Server, ledger: Ledger) -> None:
    """No slot is stuck and nobody waits, soon after the last client has gone."""
    names = ("engine_running", "engine_waiting", "requests_waiting_for_modules")
    headers = {"Authorization": f"Bearer {server.keys['one']}"}
    deadline = time.monotonic() + _SETTLES_WITHIN_S
    while True:
        lines = (await client.get("/metrics", headers=headers)).text.splitlines()
        busy = [
            line
            for line in lines
            if any(line.startswith(f"mergeroute_{name}{{") for name in names)
            and float(line.rpartition(" ")[2])
        ]
        if not busy or time.monotonic() > deadline:
            return ledger.check(not busy, f"still busy after the last request: {busy}")
        await asyncio.sleep(0.2)


async def _check_modules(
    client: httpx.AsyncClient, server: Server, changer: Changer, ledger: Ledger
) -> int:
    """The list is that of the bank and of what the changer left. Returns how many there are."""
    headers = {"Authorization": f"Bearer {server.keys['admin']}"}
    data = (await client.get("/v1/modules", headers=headers)).json()["data"]
    listed = {entry["name"]: entry for entry in data}
    expected = {m.name for m in Bank.open(DEMO_BANK).modules} | changer.names.keys()
    ledger.check(listed.keys() == expected, f"modules {sorted(listed)}, not {sorted(expected)}")
    failed = [name for name, entry in listed.items() if entry["state"] == "failed"]
    ledger.check(not failed, f"failed modules: {failed}")
    for name, hot in changer.names.items():
        found = listed[name]["generation"], listed[name]["path"]
        right = hot.generation, str(server.root / str(hot.content))
        ledger.check(found == right, f"{name} is {found}, not {right}")
    return len(listed)


async def _check_last(
    client: httpx.AsyncClient, server: Server, references: References, ledger: Ledger
) -> None:
    """The server still answers, from every module."""
    for question in {q.model: q for q in _questions(references)}.values():
        text = references.prompts[question.number].text
        body = {
            "model": question.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": references.count,
        }
        headers = {"Authorization": f"Bearer {server.keys['two']}"}
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
        said = response.json()["choices"][0]["message"]["content"]
        right = references.find(question.number, question.mix)
        assert right is not None
        ledger.check_answer("whole", said, [right.ended_text], f"the last of {question}")


def _check_log(server: Server, ledger: Ledger) -> None:
    """No traceback in the log: what is refused is refused on purpose."""
    log = server.log.read_text(errors="replace")
    where = log.find("Traceback")
    ledger.check(where < 0, f"the log has a traceback: {log[max(0, where - 500) : where + 2000]}")


def _check_flat(result: Result) -> None:
    """Memory, files and threads do not grow."""
    first, last = result.thirds("rss")
    share = last / first - 1
    told = f"memory went from {first / 1e6:.1f} to {last / 1e6:.1f} MB"
    result.ledger.check(share <= result.plan.rss_share, told)
    assert result.idle is not None
    before, after = result.idle
    said = f"{before.files} open files before, {after.files} after"
    result.ledger.check(after.files <= before.files + 5, said)
    first, last = result.thirds("threads")
    said = f"threads went from {first:g} to {last:g}"
    result.ledger.check(last <= first + POOLS, said)
