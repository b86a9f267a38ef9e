"""Answers of a served bank on held-out prompts, over HTTP: `python -m benchmarks.zoo`.

Every prompt of the test set, all tasks interleaved, is asked with model="auto", and again with its
own expert (generic prompts: with the backbone) as the reference; greedy, several clients at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import openai
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .machine import describe_machine

DATA = Path(__file__).parent.parent / "examples" / "zoo" / "test.jsonl"
BACKBONE = "zoo-base"
MAX_TOKENS = 96


@dataclass(frozen=True)
class Prompt:
    """A line of the test set. kind: expert or generic. wording: known or held-out."""

    task: str
    prompt: str
    answer: str
    kind: str
    wording: str

    @property
    def reference(self) -> str:
        """What should serve it."""
        return self.task if self.kind == "expert" else BACKBONE


@dataclass(frozen=True)
class Outcome:
    """What came back. routed_to: module with the largest weight, or none."""

    prompt: Prompt
    is_right: bool
    reference_is_right: bool
    routed_to: str


@dataclass(frozen=True)
class Figures:
    """Percentages over one kind of wording.

    normalised: mean over tasks of accuracy through `auto` over the expert's own accuracy.
    routing: prompts of a task that went to its module. generic_kept: accuracy on generic prompts
    through `auto` over the backbone's own.
    """

    wording: str
    prompts: int
    normalised: float
    expert: float
    routing: float
    generic_kept: float
    abstained_generic: float


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, str]:
    """The answer, and the module that weighed most."""
    raw = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    weights = raw.headers["x-mergeroute-blend"]
    pairs = [part.split("=") for part in weights.split(",") if "=" in part]
    best = max(pairs, key=lambda pair: float(pair[1]))[0] if pairs else "none"
    return raw.parse().choices[0].message.content or "", best


async def measure(url: str, prompts: Sequence[Prompt], clients: int) -> list[Outcome]:
    """Ask everything, `clients` requests at a time."""
    gate = asyncio.Semaphore(clients)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("asking", total=len(prompts))

            async def one(prompt: Prompt) -> Outcome:
                async with gate:
                    answer, best = await ask(client, "auto", prompt.prompt)
                    reference, _ = await ask(client, prompt.reference, prompt.prompt)
                progress.advance(bar)
                right = answer == prompt.answer
                return Outcome(prompt, right, reference == prompt.answer, best)

            return await asyncio.gather(*(one(prompt) for prompt in prompts))


def summarise(outcomes: Sequence[Outcome], wording: str) -> Figures:
    """The figures of one kind of wording."""
    chosen = [o for o in outcomes if o.prompt.wording == wording]
    experts = [o for o in chosen if o.prompt.kind == "expert"]
    generic = [o for o in chosen if o.prompt.kind == "generic"]
    tasks = sorted({o.prompt.task for o in experts})
    by_task = [[o for o in experts if o.prompt.task == task] for task in tasks]
    ratios = [share(right(own)) / share(reference(own)) for own in by_task]
    return Figures(
        wording=wording,
        prompts=len(chosen),
        normalised=100 * sum(ratios) / len(ratios),
        expert=100 * share(reference(experts)),
        routing=100 * share([o.routed_to == o.prompt.task for o in experts]),
        generic_kept=100 * share(right(generic)) / share(reference(generic)),
        abstained_generic=100 * share([o.routed_to == "none" for o in generic]),
    )


def right(outcomes: Sequence[Outcome]) -> list[bool]:
    """Whether `auto` answered right."""
    return [o.is_right for o in outcomes]


def reference(outcomes: Sequence[Outcome]) -> list[bool]:
    """Whether the reference answered right."""
    return [o.reference_is_right for o in outcomes]


def share(flags: Sequence[bool]) -> float:
    """Share of True."""
    return sum(flags) / len(flags)


@contextmanager
def demo_server() -> Iterator[str]:
    """`mergeroute demo` on a free port, for the length of the block."""
    command = [str(Path(sys.executable).parent / "mergeroute"), "demo", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would fill up
        server = subprocess.Popen(command, stderr=log, text=True)
        try:
            yield wait_until_ready(server, log)
        finally:
            server.terminate()
            server.wait()


def wait_until_ready(server: subprocess.Popen[str], log: TextIO) -> str:
    """The URL that the server prints once it serves."""
    while server.poll() is None:
        log.seek(0)
        for line in log:
            if line.startswith("ready:"):
                return line.split()[1]
        time.sleep(0.2)
    raise SystemExit("the demo server did not start")


def show(figures: Sequence[Figures]) -> None:
    """The table."""
    table = Table(title="held-out inputs through model=auto, in percent")
    for column in Figures.__dataclass_fields__:
        table.add_column(column.replace("_", " "), justify="right")
    for row in figures:
        values = list(asdict(row).values())
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in values))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--url", help="a running server's .../v1; default: start the demo")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    lines = arguments.data.read_text("utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    random.Random(0).shuffle(prompts)
    if arguments.url:
        outcomes = asyncio.run(measure(arguments.url, prompts, arguments.clients))
    else:
        with demo_server() as url:
            outcomes = asyncio.run(measure(url, prompts, arguments.clients))
    figures = [summarise(outcomes, wording) for wording in ("known", "held-out")]
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in figures], indent=2) + "\n")


if __name__ == "__main__":
    main()
