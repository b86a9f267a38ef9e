"""What a server does: requests a second and times by concurrency, what HTTP and routing cost over
the bare engine, and what a thousand modules do to it.

A random model, `mergeroute serve` in a process of its own, clients in this one, which share the
machine's cores. All requests are streamed chats of random prompts, none asked twice of one server,
greedy, in float32. What is compared runs in turn, so that drifts of the machine fall on all of it;
ratios are the medians of the turns' own.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from mergeroute.routers.base import Decision, Query
from mergeroute.runtime.torch_engine import EngineOptions
from mergeroute.runtime.types import SamplingParams
from mergeroute.serving.hosting import HostedBank, Placement, host_banks

from .engine import FULL_MODEL, QUICK_MODEL
from .machine import describe_machine
from .server_bank import HOT, Made, make_banks, make_prompt, module_name, open_bank
from .server_load import Answer, Ask, Load, Server

CONCURRENCY = (1, 4, 16, 64)
CLIENTS = 16
SLOTS = 16
MAX_LENGTH = 256
OVERHEAD_BAR = 10.0
"""Percent, at most, of the bare engine's throughput that HTTP and routing may cost."""

HOT_BAR = 0.95
"""Least throughput of many registered modules, few of them hot, relative to few registered."""

ROOMS = (64, 128)
PARTS = ("concurrency", "overhead", "hot", "uniform")
BARE, PINNED, AUTO = "bare engine", "HTTP, module named", "HTTP, model auto"
err = Console(stderr=True)


@dataclass(frozen=True)
class Scale:
    """words: of a prompt. tokens: of an answer. requests: of a client and turn."""

    model: Mapping[str, int]
    modules: int
    words: int = 48
    tokens: int = 24
    requests: int = 2


FULL = Scale(FULL_MODEL, modules=1000)
QUICK = Scale(QUICK_MODEL, modules=200, words=16, tokens=4)


@dataclass
class Bench:
    """What all parts need. fresh: of random words."""

    scale: Scale
    made: Made
    threads: int
    repeats: int
    fresh: random.Random = field(default_factory=lambda: random.Random(1))

    @contextmanager
    def server(self, bank: Path, *, room: int | None = None) -> Iterator[Server]:
        """A warm server. room: how many modules fit its memory; None: all."""
        options = ["--max-length", MAX_LENGTH, "--max-concurrency", SLOTS, "--dtype", "float32"]
        if room is not None:
            options += ["--module-memory", room * self.made.module_bytes]
        with Server(bank, self.threads, *map(str, options)) as server:
            server.ask(self.asks(SLOTS), clients=SLOTS)
            yield server

    def asks(self, count: int, model: Callable[[int], str] | None = None) -> list[Ask]:
        """Requests for hot modules in turn, or what is named by number; prompts fit the module."""
        return [
            Ask(
                model(index) if model else module_name(index % HOT),
                make_prompt(self.fresh, self.scale.words, index % HOT),
                self.scale.tokens,
            )
            for index in range(count)
        ]


def by_concurrency(bench: Bench) -> dict[str, Any]:
    """Figures of routed requests by number of clients."""
    rows = {}
    with bench.server(bench.made.few) as server:
        for clients in CONCURRENCY:
            err.print(f"{clients} clients")
            count = max(8, bench.scale.requests * clients)
            rows[str(clients)] = server.ask(
                bench.asks(count, lambda _: "auto"), clients=clients
            ).figures
    return {"rows": rows}


def overhead(bench: Bench) -> dict[str, Any]:
    """The same requests on the bare engine, by name and routed, in turn."""
    count = CLIENTS * bench.scale.requests
    seconds: dict[str, list[float]] = {BARE: [], PINNED: [], AUTO: []}
    options = EngineOptions(max_length=MAX_LENGTH, max_concurrency=SLOTS)
    (hosted,) = host_banks([open_bank(bench.made.few)], Placement(dtype="float32", options=options))
    with bench.server(bench.made.few) as server, hosted.engine:
        run_engine(hosted, bench.asks(SLOTS))
        for repeat in range(bench.repeats):
            err.print(f"overhead, turn {repeat + 1} of {bench.repeats}")
            routed = bench.asks(count, lambda _: "auto")
            seconds[BARE].append(run_engine(hosted, routed).seconds)
            seconds[AUTO].append(server.ask(routed, clients=CLIENTS).seconds)
            seconds[PINNED].append(server.ask(bench.asks(count), clients=CLIENTS).seconds)
    costs = {
        row: [100 * (1 - bare / own) for bare, own in zip(seconds[BARE], seconds[row], strict=True)]
        for row in (PINNED, AUTO)
    }
    shown = {row: {"percent": median(each), "turns": each} for row, each in costs.items()}
    return {"seconds": seconds, "overhead": shown, "bar": OVERHEAD_BAR}


def decided(hosted: HostedBank, ask: Ask) -> Decision:
    """What the router decides for a prompt, as the server's does."""
    assert hosted.router is not None
    return hosted.router.route(
        Query.of(tuple(hosted.tokenizer(ask.prompt)["input_ids"]), ask.prompt)
    )


def run_engine(hosted: HostedBank, asks: list[Ask]) -> Load:
    """Requests, decided on beforehand, as so many threads put them to the engine."""
    ready = iter(
        [
            hosted.request(
                tuple(hosted.tokenizer(ask.prompt)["input_ids"]),
                decided(hosted, ask),
                SamplingParams(max_tokens=ask.tokens, temperature=0),
            )
            for ask in asks
        ]
    )

    def client() -> list[Answer]:
        answers = []
        for request in ready:
            sent = time.perf_counter()
            arrivals = tuple(time.perf_counter() for _ in hosted.engine.submit(request))
            answers.append(Answer(sent, arrivals))
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client) for _ in range(CLIENTS)]
        return Load(tuple(answer for each in running for answer in each.result()))


def hot_modules(bench: Bench) -> dict[str, Any]:
    """The same traffic to HOT modules, where they are all there are, and where they are few of
    many, with the same memory for modules.
    """
    count = CLIENTS * bench.scale.requests
    seconds: dict[str, list[float]] = {"few": [], "many": []}
    with (
        bench.server(bench.made.few, room=ROOMS[0]) as few,
        bench.server(bench.made.many, room=ROOMS[0]) as many,
    ):
        for repeat in range(bench.repeats):
            err.print(f"hot modules, turn {repeat + 1} of {bench.repeats}")
            asks = bench.asks(count)
            seconds["few"].append(few.ask(asks, clients=CLIENTS).seconds)
            seconds["many"].append(many.ask(asks, clients=CLIENTS).seconds)
    ratios = [few / many for few, many in zip(seconds["few"], seconds["many"], strict=True)]
    names = {"registered": bench.scale.modules, "hot": HOT, "room": ROOMS[0]}
    return {**names, "seconds": seconds, "ratio": median(ratios), "turns": ratios, "bar": HOT_BAR}


def uniform(bench: Bench) -> dict[str, Any]:
    """Requests for any of many modules, by room; beside them hot ones on the same server."""
    count = 2 * CLIENTS * bench.scale.requests
    rows = {}
    for room in ROOMS:
        with bench.server(bench.made.many, room=room) as server:
            err.print(f"{bench.scale.modules} modules, room for {room}")
            hot = server.ask(bench.asks(count), clients=CLIENTS)
            before = server.cold_loads()
            chosen = random.Random(2)
            asks = bench.asks(
                count,
                lambda _: module_name(chosen.randrange(bench.scale.modules)),  # noqa: B023
            )
            spread = server.ask(asks, clients=CLIENTS).figures
            cold = server.cold_loads() - before
            rows[f"{room}, hot"] = {**hot.figures, "cold_loads": 0}
            rows[f"{room}, all"] = {**spread, "cold_loads": cold}
    return {"registered": bench.scale.modules, "rows": rows}


def figures_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row of figures each."""
    table = Table(title=title)
    columns = {
        "req/s": "requests_per_second",
        "tok/s": "tokens_per_second",
        "first p50 ms": "first_token_p50",
        "p99": "first_token_p99",
        "between p50 ms": "between_tokens_p50",
        "p99 ": "between_tokens_p99",
        "whole p50 ms": "latency_p50",
        "p99  ": "latency_p99",
        "cold": "cold_loads",
    }
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, figures in rows.items():
        shown = [figures.get(key, float("nan")) for key in columns.values()]
        table.add_row(name, *(f"{n:.2f}" if n < 10 else f"{n:.0f}" for n in shown))
    return table


def show(found: Mapping[str, Any]) -> None:
    """Tables, and the bars."""
    console = Console()
    if part := found.get("concurrency"):
        console.print(figures_table("by clients, model auto", part["rows"]))
    if part := found.get("overhead"):
        for row, cost in part["overhead"].items():
            turns = ", ".join(f"{turn:.1f}" for turn in cost["turns"])
            console.print(f"{row}: {cost['percent']:.1f} % over the bare engine ({turns})")
        console.print(f"bar: {part['bar']:g} % with model auto, {CLIENTS} clients")
    if part := found.get("hot"):
        turns = ", ".join(f"{turn:.3f}" for turn in part["turns"])
        console.print(
            f"{part['registered']} registered, {HOT} hot: {part['ratio']:.3f} of the throughput of "
            f"{HOT} registered ({turns}); bar {part['bar']}"
        )
    if part := found.get("uniform"):
        console.print(figures_table(f"{part['registered']} registered, by room", part["rows"]))


MEASURES = {
    "concurrency": by_concurrency,
    "overhead": overhead,
    "hot": hot_modules,
    "uniform": uniform,
}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of what is compared.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, to try it out.")] = False,
) -> None:
    """Measure a server."""
    torch.set_num_threads(threads)
    scale = QUICK if quick else FULL
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = make_banks(Path(scratch), dict(scale.model), count=scale.modules)
        bench = Bench(scale, made, threads, repeats)
        for part in parts or PARTS:
            load = os.getloadavg()[0]
            found[part] = {**MEASURES[part](bench), "load_average": round(load, 1)}
            show({part: found[part]})
    document = {"machine": describe_machine(), "threads": threads, **found}
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
