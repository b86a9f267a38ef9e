"""What a server does: requests a second and times by concurrency, what HTTP and routing cost over
the bare engine, and what a thousand modules do to it.

A random model, `mergeroute serve` in a process of its own, clients in this one, which share the
machine's cores. All requests are streamed chats of random prompts, none asked twice of one server,
greedy, in float32. What is compared runs in turn, so that drifts of the machine fall on all of it;
ratios are the medians of the turns' own. Beside the clock stands the CPU time of the process that
answers, which other programs on the machine disturb least.
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
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.types import SamplingParams
from mergeroute.serving.hosted import HostedBank
from mergeroute.serving.hosting import Placement, host_banks

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
QUICK = Scale(QUICK_MODEL, modules=1000, words=32, tokens=16, requests=8)


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
    """The same requests on the bare engine and routed, others by name, in turn."""
    count = CLIENTS * bench.scale.requests
    turns: Turns = {BARE: [], PINNED: [], AUTO: []}
    options = EngineOptions(max_length=MAX_LENGTH, max_concurrency=SLOTS)
    (hosted,) = host_banks([open_bank(bench.made.few)], Placement(dtype="float32", options=options))
    with bench.server(bench.made.few) as server, hosted.engine:
        run_engine(hosted, bench.asks(SLOTS))
        for repeat in range(bench.repeats):
            err.print(f"overhead, turn {repeat + 1} of {bench.repeats}")
            routed = bench.asks(count, lambda _: "auto")
            turns[BARE].append(run_engine(hosted, routed))
            turns[AUTO].append(server.ask(routed, clients=CLIENTS))
            turns[PINNED].append(server.ask(bench.asks(count), clients=CLIENTS))
    return {
        "bar": OVERHEAD_BAR,
        "rows": {row: relative(turns, row, BARE) for row in (PINNED, AUTO)},
        "figures": {row: median_figures(loads) for row, loads in turns.items()},
    }


Turns = dict[str, list[Load]]
"""Of each row, one load a turn."""


def relative(turns: Turns, row: str, other: str) -> dict[str, Any]:
    """Throughput of a row relative to another, by the clock and by CPU time, turn by turn."""
    pairs = list(zip(turns[row], turns[other], strict=True))
    by = {
        "wall": [theirs.seconds / own.seconds for own, theirs in pairs],
        "cpu": [theirs.cpu / own.cpu for own, theirs in pairs],
    }
    return {clock: {"median": median(each), "turns": each} for clock, each in by.items()}


def median_figures(loads: list[Load]) -> dict[str, float]:
    """Medians over the turns."""
    figures = [load.figures for load in loads]
    return {name: median(each[name] for each in figures) for name in figures[0]}


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

    before = time.process_time()
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client) for _ in range(CLIENTS)]
        answers = tuple(answer for each in running for answer in each.result())
    return Load(answers, time.process_time() - before)


def hot_modules(bench: Bench) -> dict[str, Any]:
    """The same traffic to HOT modules, where they are all there are, and where they are few of
    many, with the same memory for modules.
    """
    count = CLIENTS * bench.scale.requests
    turns: Turns = {"few": [], "many": []}
    with (
        bench.server(bench.made.few, room=ROOMS[0]) as few,
        bench.server(bench.made.many, room=ROOMS[0]) as many,
    ):
        for repeat in range(bench.repeats):
            err.print(f"hot modules, turn {repeat + 1} of {bench.repeats}")
            asks = bench.asks(count)
            turns["few"].append(few.ask(asks, clients=CLIENTS))
            turns["many"].append(many.ask(asks, clients=CLIENTS))
    return {
        "registered": bench.scale.modules,
        "hot": HOT,
        "room": ROOMS[0],
        "bar": HOT_BAR,
        "rows": {f"{bench.scale.modules} registered": relative(turns, "many", "few")},
        "figures": {row: median_figures(loads) for row, loads in turns.items()},
    }


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
        bar = 1 - part["bar"] / 100
        console.print(ratio_table(f"relative to the {BARE}, {CLIENTS} clients", part, bar))
        console.print(figures_table("medians", part["figures"]))
    if part := found.get("hot"):
        title = f"{HOT} hot modules, relative to {HOT} registered, {CLIENTS} clients"
        console.print(ratio_table(title, part, part["bar"]))
    if part := found.get("uniform"):
        console.print(figures_table(f"{part['registered']} registered, by room", part["rows"]))


def ratio_table(title: str, part: Mapping[str, Any], bar: float) -> Table:
    """Relative throughput by both clocks."""
    table = Table("", "by the clock", "by CPU time", "bar", title=title)
    for name, row in part["rows"].items():
        shown = [
            f"{row[clock]['median']:.3f} ({min(row[clock]['turns']):.3f} to "
            f"{max(row[clock]['turns']):.3f})"
            for clock in ("wall", "cpu")
        ]
        table.add_row(name, *shown, f"{bar:g}")
    return table


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
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small model: what does not hang on the model shows more."),
    ] = False,
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
            if json_file:
                document = {"machine": describe_machine(), "threads": threads, **found}
                json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
