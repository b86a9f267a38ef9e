"""Clients of every temper. Each complete greedy answer is compared with the merged model's."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from .hot import Changer
from .ledger import Ledger
from .references import Answer, Mix, References, hot_mixes
from .refusals import REFUSALS, check_refusal
from .server import SLOW_KEY_REQUESTS

_CHAT = "/v1/chat/completions"
_SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["m", "kg"]}, "exact": {"type": "boolean"}},
    "required": ["unit", "exact"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """What is asked. model: as the client names it. blend: as the response's header has it."""

    number: int
    mix: Mix
    model: str
    blend: str


@dataclass
class Traffic:
    """Everything that clients share. routed: by prompt, what `auto` decides for it.
    sampled: answers to seeded requests, the first time they were asked.
    """

    client: httpx.AsyncClient
    slow_client: httpx.AsyncClient
    keys: Mapping[str, str]
    references: References
    questions: tuple[Question, ...]
    routed: tuple[Question, ...]
    changer: Changer
    ledger: Ledger
    sampled: dict[tuple[Question, int], str] = field(default_factory=dict)

    async def run(self, until: float, seed: int) -> None:
        """One client that asks again and again until a moment."""
        dice = random.Random(seed)
        kinds, weights = zip(*KINDS.items(), strict=True)
        while time.monotonic() < until:
            kind = dice.choices(kinds, weights)[0]
            name = kind.__name__
            self.ledger.requests[name] += 1
            try:
                await kind(self, dice)
            except Exception as error:  # whatever it is, the soak tells of it
                self.ledger.check(False, f"{name}: {type(error).__name__}: {error}")

    def headers(self, dice: random.Random) -> dict[str, str]:
        """Of one of the keys that may ask anything."""
        return {"Authorization": f"Bearer {self.keys[dice.choice(('one', 'two'))]}"}

    def body(self, question: Question, **more: object) -> dict[str, Any]:
        """A greedy chat request."""
        text = self.references.prompts[question.number].text
        return {
            "model": question.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.references.count,
            **more,
        }

    def pick(self, dice: random.Random) -> Question:
        """A question that the table can answer."""
        return dice.choice(self.questions)

    def answer(self, question: Question) -> Answer:
        """What the merged model says."""
        found = self.references.find(question.number, question.mix)
        assert found is not None
        return found

    async def post(self, dice: random.Random, path: str, body: object) -> httpx.Response:
        """A request that is answered as a whole."""
        response = await self.client.post(path, json=body, headers=self.headers(dice))
        self.ledger.statuses[response.status_code] += 1
        return response

    async def whole(self, dice: random.Random, body: dict[str, Any]) -> dict[str, Any]:
        """A chat that must succeed."""
        response = await self.post(dice, _CHAT, body)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.text[:300]} to {body}")
        found: dict[str, Any] = response.json()
        return {**found, "blend": response.headers["x-mergeroute-blend"]}

    async def events(
        self, client: httpx.AsyncClient, dice: random.Random, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream that must succeed, `[DONE]` as an empty one. Leaving early closes
        the connection.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        sent = client.stream("POST", _CHAT, json=asked, headers=self.headers(dice))
        async with sent as response:
            self.ledger.statuses[response.status_code] += 1
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code} {await response.aread()!r} to {body}")
            yield {"blend": response.headers["x-mergeroute-blend"]}
            async for line in response.aiter_lines():
                if line.startswith("event: error"):
                    raise RuntimeError(f"a stream ended with an error: {body}")
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    yield {} if data == "[DONE]" else json.loads(data)


async def plain(t: Traffic, dice: random.Random) -> None:
    """A whole answer, compared token by token."""
    question = t.pick(dice)
    with t.ledger.timed("plain"):
        found = await t.whole(dice, t.body(question, return_token_ids=True))
    choice, right = found["choices"][0], t.answer(question)
    said = choice["message"]["content"], tuple(choice["token_ids"]), found["blend"]
    allowed = [(right.ended_text, right.ended_tokens, question.blend)]
    t.ledger.check_answer("whole", said, allowed, str(question))
    usage = found["usage"]["completion_tokens"], found["usage"]["prompt_tokens"]
    lengths = len(right.ended_tokens), len(t.references.prompts[question.number].ids)
    t.ledger.check(usage == lengths, f"usage {usage} instead of {lengths}: {question}")


async def stream(t: Traffic, dice: random.Random) -> None:
    """A stream to its end."""
    question = t.pick(dice)
    began = time.monotonic()
    with t.ledger.timed("stream"):
        texts, _ = await _read(t, t.client, dice, t.body(question))
    t.ledger.first_s.append(texts.first_at - began)
    t.ledger.check_answer(
        "whole", texts.by_index, [{0: t.answer(question).ended_text}], str(question)
    )


async def several(t: Traffic, dice: random.Random) -> None:
    """Choices of one prompt, or several prompts of token ids in one body: all are the same answer,
    or each has its own.
    """
    first = t.pick(dice)
    alike = [q for q in t.questions if q.model == first.model][:3]
    prompts = [list(t.references.prompts[q.number].ids) for q in alike]
    body = {"model": first.model, "prompt": prompts, "n": 2, "temperature": 0}
    with t.ledger.timed("several"):
        response = await t.post(dice, "/v1/completions", {**body, "max_tokens": t.references.count})
    texts = [choice["text"] for choice in response.raise_for_status().json()["choices"]]
    right = [t.answer(q).ended_text for q in alike for _ in range(2)]
    t.ledger.check_answer("whole", texts, [right], str(alike))


async def auto(t: Traffic, dice: random.Random) -> None:
    """Routed, in a conversation of its own, which the server has to remember for a while."""
    question = dice.choice(t.routed)
    body = t.body(question, conversation=f"c-{dice.random()}")
    with t.ledger.timed("auto"):
        found = await t.whole(dice, body)
    said = found["choices"][0]["message"]["content"], found["blend"]
    allowed = [(t.answer(question).ended_text, question.blend)]
    t.ledger.check_answer("whole", said, allowed, str(question))


async def hot(t: Traffic, dice: random.Random) -> None:
    """A name whose module changes: the answer is of what it meant when it was asked for."""
    name = dice.choice(list(t.changer.names.values()))
    number = dice.randrange(len(t.references.prompts))
    way = dice.randrange(2)
    blend = hot_mixes(name.name, "")[way][0]
    model = "blend:" + ",".join(f"{n}={w}" for n, w in blend.items())
    body = t.body(Question(number, (), model, ""))
    began = time.monotonic()
    if dice.random() < 0.5:
        with t.ledger.timed("hot"):
            response = await t.post(dice, _CHAT, body)
        status, until = response.status_code, time.monotonic()
        said = response.json()["choices"][0]["message"]["content"] if status == 200 else None
    else:
        said, until = await _hot_stream(t, dice, body)
    allowed: list[object] = []
    for content in name.meant(began, until):
        right = content and t.references.find(number, hot_mixes(name.name, content)[way][1])
        if content and not right:
            return  # a near tie
        allowed.append(right.ended_text if right else None)
    t.ledger.check_answer("whole", said, allowed, f"{model}, prompt {number}")


async def _hot_stream(
    t: Traffic, dice: random.Random, body: dict[str, Any]
) -> tuple[str | None, float]:
    """The text, None where there is no such model; and until when its meaning was open."""
    try:
        texts, headers_at = await _read(t, t.client, dice, body)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        return None, time.monotonic()
    return texts.by_index[0], headers_at


async def sampled(t: Traffic, dice: random.Random) -> None:
    """The same seed, the same text, whatever else is in the batch."""
    question, seed = t.questions[dice.randrange(8) % len(t.questions)], dice.randrange(2)
    body = t.body(question, temperature=0.8, top_p=0.95, seed=seed, n=2)
    found = await t.whole(dice, body)
    for choice in found["choices"]:
        key = question, seed + choice["index"]
        said = choice["message"]["content"]
        t.ledger.check_answer("seeded", said, [t.sampled.setdefault(key, said)], str(key))


async def cancel(t: Traffic, dice: random.Random) -> None:
    """A stream that is left after a few chunks; what came of it was right."""
    question, wanted = t.pick(dice), dice.randrange(2, 12)
    said = ""
    body = t.body(question, max_tokens=300, ignore_eos=True)
    async with aclosing(t.events(t.client, dice, body)) as events:
        async for chunk in events:
            wanted -= 1
            if chunk.get("choices"):
                said += chunk["choices"][0]["delta"].get("content") or ""
            if not wanted:
                break
    right = t.answer(question).text
    size = min(len(said), len(right))
    t.ledger.check_answer("begun", said[:size], [right[:size]], str(question))


async def disconnect(t: Traffic, dice: random.Random) -> None:
    """A client that sends a request, or a part of it, and is gone."""
    body = json.dumps(t.body(t.pick(dice), max_tokens=300, ignore_eos=True, n=2)).encode()
    cut = dice.choice((len(body), len(body), len(body) // 2))
    head = {**t.headers(dice), "Host": "x", "Content-Length": str(len(body))}
    lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
    url = httpx.URL(str(t.client.base_url))
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"POST {_CHAT} HTTP/1.1\r\n{lines}\r\n".encode() + body[:cut])
    await writer.drain()
    await asyncio.sleep(dice.uniform(0, 0.2))
    writer.transport.abort()


async def slow(t: Traffic, dice: random.Random) -> None:
    """A client that reads little by little: it gets everything all the same."""
    question = t.pick(dice)
    body = t.body(question, ignore_eos=True, n=4, logprobs=True, top_logprobs=20)
    texts, _ = await _read(t, t.slow_client, dice, body, pause_s=0.01)
    right = t.answer(question).text
    t.ledger.check_answer("whole", texts.by_index, [dict.fromkeys(range(4), right)], str(question))


async def stalled(t: Traffic, dice: random.Random) -> None:
    """A client that stops reading is cut off after a while; nobody else waits for it."""
    body = t.body(
        t.pick(dice), max_tokens=200, ignore_eos=True, n=4, logprobs=True, top_logprobs=20
    )
    async with aclosing(t.events(t.slow_client, dice, body)) as events:
        await anext(events)
        await asyncio.sleep(5)


async def refused(t: Traffic, dice: random.Random) -> None:
    """A request that must be refused, with the right status and code."""
    await check_refusal(dice.choice(REFUSALS), t.client, t.keys, t.ledger)


async def limited(t: Traffic, dice: random.Random) -> None:
    """A key that may not ask much: it gets its answer, or is told when to ask again."""
    question = t.pick(dice)
    headers = {"Authorization": f"Bearer {t.keys['slow']}"}
    response = await t.client.post(_CHAT, json=t.body(question, max_tokens=1), headers=headers)
    t.ledger.statuses[response.status_code] += 1
    right = response.status_code == 200 or (
        response.status_code == 429 and int(response.headers["retry-after"]) >= 0
    )
    shown = response.headers.get("x-ratelimit-limit-requests")
    t.ledger.check(right and shown == str(SLOW_KEY_REQUESTS), f"limited: {response.text[:300]}")


async def structured(t: Traffic, dice: random.Random) -> None:
    """An answer of a form."""
    form = {"type": "json_schema", "json_schema": {"name": "unit", "schema": _SCHEMA}}
    body = t.body(t.pick(dice), max_tokens=120, response_format=form)
    choice = (await t.whole(dice, body))["choices"][0]
    if choice["finish_reason"] == "stop":  # else blanks took the room
        said = json.loads(choice["message"]["content"])
        is_right = said["unit"] in ("m", "kg") and isinstance(said["exact"], bool)
        t.ledger.check(is_right and len(said) == 2, f"structured: {said}")


async def embed(t: Traffic, dice: random.Random) -> None:
    """Text to numbers, and tokens there and back."""
    text = dice.choice(t.references.prompts).text
    response = await t.post(dice, "/v1/embeddings", {"model": "zoo-base", "input": text})
    vector = response.raise_for_status().json()["data"][0]["embedding"]
    t.ledger.check(abs(sum(x * x for x in vector) - 1) < 1e-3, "an embedding of another length")
    ids = (await t.post(dice, "/tokenize", {"prompt": text})).json()["tokens"]
    back = (await t.post(dice, "/detokenize", {"tokens": ids})).json()["prompt"]
    t.ledger.check(text in back, f"tokenized: {text!r} became {back!r}")


async def look(t: Traffic, dice: random.Random) -> None:
    """Health, metrics and models, as a gateway polls them."""
    path = dice.choice(("/health", "/metrics", "/v1/models", "/live", "/version"))
    response = await t.client.get(path, headers=t.headers(dice))
    t.ledger.statuses[response.status_code] += 1
    t.ledger.check(response.status_code == 200, f"{path}: {response.status_code}")


@dataclass
class _Texts:
    """Text by choice. first_at: when the first of it came."""

    by_index: dict[int, str] = field(default_factory=dict)
    first_at: float = 0.0


async def _read(
    t: Traffic,
    client: httpx.AsyncClient,
    dice: random.Random,
    body: dict[str, Any],
    *,
    pause_s: float = 0.0,
) -> tuple[_Texts, float]:
    """A stream to its end, and when its headers came."""
    texts, headers_at, last = _Texts(), 0.0, None
    async for chunk in t.events(client, dice, body):
        headers_at = headers_at or time.monotonic()
        for choice in chunk.get("choices", ()):
            content = choice["delta"].get("content")
            texts.by_index.setdefault(choice["index"], "")
            if content:
                texts.first_at = texts.first_at or time.monotonic()
                texts.by_index[choice["index"]] += content
        last = chunk
        if pause_s:
            await asyncio.sleep(pause_s)
    texts.first_at = texts.first_at or time.monotonic()
    t.ledger.check(last == {}, f"a stream ended without [DONE]: {body}")
    return texts, headers_at


def slow_transport() -> httpx.AsyncHTTPTransport:
    """Connections that take in little at a time."""
    return httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])


KINDS: dict[Callable[[Traffic, random.Random], Awaitable[None]], float] = {
    plain: 22,
    stream: 22,
    several: 5,
    auto: 12,
    hot: 14,
    sampled: 4,
    cancel: 6,
    disconnect: 4,
    slow: 1,
    stalled: 0.3,
    refused: 8,
    limited: 2,
    structured: 2,
    embed: 1,
    look: 3,
}
"""What clients do, and how often."""
