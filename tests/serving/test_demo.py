"""The bundled bank through a real server and client: a sample of what benchmarks/zoo.py asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.cli import DEMO_BANK

from .process import serving

TEST_SET = Path(__file__).parents[2] / "examples" / "zoo" / "test.jsonl"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving("demo") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def lines(kind: str, every: int) -> list[dict[str, str]]:
    """Every so many-th prompt of a kind in known wordings; their inputs are held out."""
    chosen = [json.loads(line) for line in TEST_SET.read_text("utf-8").splitlines()]
    return [c for c in chosen if c["kind"] == kind and c["wording"] == "known"][::every]


def ask(client: openai.OpenAI, line: dict[str, str]) -> tuple[bool, str]:
    """Whether the streamed answer is right, and the blend that gave it."""
    with client.chat.completions.with_streaming_response.create(
        model="auto",
        messages=[{"role": "user", "content": line["prompt"]}],
        temperature=0,
        max_tokens=96,
        stream=True,
    ) as response:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in response.parse())
        return text == line["answer"], response.headers["x-mergeroute-blend"]


def test_the_router_picks_the_expert_and_the_right_answer_streams_back(
    client: openai.OpenAI,
) -> None:
    prompts = lines("expert", 4)
    assert len({line["task"] for line in prompts}) >= 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda line: ask(client, line), prompts))
    routed = [
        blend == f"{line['task']}=1" for (_, blend), line in zip(answers, prompts, strict=True)
    ]
    assert sum(routed) / len(routed) >= 0.98
    assert sum(right for right, _ in answers) / len(answers) >= 0.93


def test_prompts_of_no_expert_stay_on_the_backbone(client: openai.OpenAI) -> None:
    prompts = lines("generic", 8)
    assert len({line["task"] for line in prompts}) >= 6
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda line: ask(client, line), prompts))
    assert sum(blend == "none" for _, blend in answers) / len(answers) >= 0.9
    assert sum(right for right, _ in answers) / len(answers) >= 0.9


def test_text_beyond_the_training_data_comes_back_whole(client: openai.OpenAI) -> None:
    """Umlauts are two tokens each: no half characters in the stream."""
    stream = client.chat.completions.create(
        model="german",
        messages=[{"role": "user", "content": "Write 35 in German."}],
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "fünfunddreißig"


def test_the_bundled_bank_describes_its_modules() -> None:
    bank = Bank.open(DEMO_BANK)
    assert bank.name == "zoo"
    assert len(bank.modules) >= 8
    assert all(module.description and module.samples for module in bank.modules)
