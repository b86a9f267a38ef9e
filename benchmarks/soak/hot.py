"""Modules that come, are replaced and go under load, and what their names may mean at a moment."""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass, field

import httpx

from .ledger import Ledger
from .references import HOT, contents_of

BROKEN = {"truncated": 400, "nowhere": 404, "../outside": 400}
"""Paths that cannot be loaded, and the status that says so."""


@dataclass
class _Meaning:
    """What a name meant for a while. content: None: nothing."""

    content: str | None
    begin: float
    end: float = math.inf


@dataclass
class HotName:
    """A name, and everything that it meant. One change at a time.

    generation: of the last load. A change counts from when it is asked for, and what it replaces
    counts until its answer is there.
    """

    name: str
    generation: int = 0
    _meanings: list[_Meaning] = field(default_factory=lambda: [_Meaning(None, -math.inf)])

    @property
    def content(self) -> str | None:
        """What it means now, while no change is under way."""
        return self._meanings[-1].content

    def begins(self, content: str | None) -> None:
        """A change is asked for."""
        self._meanings.append(_Meaning(content, time.monotonic()))

    def done(self) -> None:
        """The change has been made. What ended before any request of today is forgotten."""
        self._meanings[-2].end = time.monotonic()
        self._meanings = self._meanings[-50:]

    def failed(self) -> None:
        """The change has not been made, and never was seen."""
        self._meanings.pop()

    def meant(self, begin: float, end: float) -> list[str | None]:
        """Everything that it may have meant in a span of time."""
        return [m.content for m in self._meanings if m.begin <= end and m.end >= begin]


class Changer:
    """Loads, replaces and unloads the hot names, one change after the other for each of them."""

    def __init__(self, client: httpx.AsyncClient, key: str, ledger: Ledger) -> None:
        self.names = {name: HotName(name) for name in HOT}
        self._client, self._ledger = client, ledger
        self._headers = {"Authorization": f"Bearer {key}"}

    async def run(self, until: float, pause_s: float, seed: int) -> None:
        """Change something again and again until a moment."""
        dice = random.Random(seed)
        while time.monotonic() < until:
            await self.change(dice.choice(list(self.names.values())), dice)
            await asyncio.sleep(dice.uniform(0, 2 * pause_s))

    async def settle(self) -> None:
        """Leave every name loaded."""
        for hot in self.names.values():
            if hot.content is None:
                await self._load(hot, contents_of(hot.name)[0])

    async def change(self, hot: HotName, dice: random.Random) -> None:
        """One change, or one that must be refused."""
        draw = dice.random()
        if draw < 0.15:
            await self._load_what_is_broken(hot, dice)
        elif hot.content is None:
            await self._load(hot, dice.choice(contents_of(hot.name)))
        elif draw < 0.25:
            await self._load_without_saying_in_place(hot)
        elif draw < 0.45:
            await self._unload(hot)
        else:
            await self._load(hot, dice.choice(contents_of(hot.name)))

    async def _load(self, hot: HotName, content: str) -> None:
        is_there = hot.content is not None
        hot.begins(content)
        expected = {"expected_generation": hot.generation} if is_there else {}
        body = {"lora_path": content, "load_inplace": is_there, **expected}
        response = await self._post("load", hot, body)
        if response.status_code == 200:
            hot.generation = int(response.headers["x-mergeroute-generation"])
            hot.done()
        else:
            hot.failed()
        self._expect(response, 200, "replace" if is_there else "load")

    async def _unload(self, hot: HotName) -> None:
        hot.begins(None)
        response = await self._post("unload", hot, {"expected_generation": hot.generation})
        (hot.done if response.status_code == 200 else hot.failed)()
        self._expect(response, 200, "unload")

    async def _load_what_is_broken(self, hot: HotName, dice: random.Random) -> None:
        path, status = dice.choice(list(BROKEN.items()))
        is_there = hot.content is not None
        response = await self._post("load", hot, {"lora_path": path, "load_inplace": is_there})
        self._expect(response, status, "refused load")

    async def _load_without_saying_in_place(self, hot: HotName) -> None:
        body: dict[str, object] = {"lora_path": contents_of(hot.name)[0]}
        self._expect(await self._post("load", hot, body), 400, "refused load")
        stale = {**body, "load_inplace": True, "expected_generation": hot.generation + 1}
        self._expect(await self._post("load", hot, stale), 409, "refused load")

    async def _post(self, verb: str, hot: HotName, body: dict[str, object]) -> httpx.Response:
        with self._ledger.timed(verb):
            return await self._client.post(
                f"/v1/{verb}_lora_adapter",
                json={"lora_name": hot.name, **body},
                headers=self._headers,
            )

    def _expect(self, response: httpx.Response, status: int, what: str) -> None:
        self._ledger.changes[what] += 1
        self._ledger.statuses[response.status_code] += 1
        said = f"{what}: {response.status_code} instead of {status}: {response.text[:300]}"
        self._ledger.check(response.status_code == status, said)
