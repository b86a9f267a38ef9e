"""What routing costs: its share of the time to the first token, and prompts routed in a second.

Random models of 100 M parameters and of the shape of a 0.5 B model, a prototype router fitted on
random prompts with the default signal, and one module blended in. For every length a fresh prompt
is routed and then answered with one token, in turn, so that drifts of the machine fall on both. The
time to the first token is the router's and the engine's; HTTP and the chat template would add to
it.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mergeroute.adapters.blend import Blend
from mergeroute.routers.base import Query
from mergeroute.routers.loading import signal_of
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.settings import DEFAULT_POLICY, SignalSettings
from mergeroute.routers.training import Labelled, fit
from mergeroute.runtime.loading import choose_device, choose_dtype
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams

from .engine import FULL_MODEL, QUICK_MODEL, make_module
from .machine import describe_machine

LENGTHS = (64, 512, 4096)
BARS = {64: 10.0, 512: 5.0, 4096: 5.0}
"""Largest share in percent, by number of tokens."""

HALF_BILLION = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
MODELS = {"100 M": FULL_MODEL, "0.5 B": HALF_BILLION}
MODULES = tuple(f"m{k}" for k in range(8))
FITTED_PER_MODULE = 10
NONE_PROMPTS = 240
ROUTED = 64
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Row:
    """Medians of one model and prompt length. milliseconds; share in percent."""

    model: str
    tokens: int
    router: float
    first_token: float
    share: float


@dataclass(frozen=True)
class Rate:
    """Prompts of 64 tokens routed in a second: one at a time, as a server does, and together."""

    model: str
    alone: float
    together: float


class Prompts:
    """Random prompts, no two alike."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._random = random.Random(0)

    def query(self, tokens: int) -> Query:
        """One prompt."""
        ids = self._random.choices(range(1, self._vocabulary), k=tokens)
        letters = "abcdefghijklmnopqrstuvwxyz     "
        return Query.of(
            ids, "".join(self._random.choices(letters, k=CHARACTERS_PER_TOKEN * tokens))
        )


def make_engine(shape: dict[str, int], *, dtype: str) -> TorchEngine:
    """A random model on the engine."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None
    )
    chosen = choose_dtype(dtype, choose_device("auto"))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen)
    options = EngineOptions(max_length=max(LENGTHS) + 1, max_concurrency=1)
    return TorchEngine(model.to(choose_device("auto")), options=options)


def make_router(engine: TorchEngine, prompts: Prompts, signal: SignalSettings) -> RequestRouter:
    """A prototype router on random prompts; what it decides does not matter here."""
    names = [name for name in MODULES for _ in range(FITTED_PER_MODULE)]
    examples = [Labelled(prompts.query(32), name) for name in names]
    examples += [Labelled(prompts.query(32), None) for _ in range(NONE_PROMPTS)]
    read = signal_of(signal, encode=engine.encode)
    scorer = fit("prototype", read, examples, modules=MODULES)
    return RequestRouter(scorer, Policy.parse(DEFAULT_POLICY))


def first_token(engine: TorchEngine, query: Query, blend: Blend) -> float:
    """Seconds from a request to its first token."""
    request = GenerationRequest(query.token_ids, blend, SamplingParams(max_tokens=1, temperature=0))
    started = time.perf_counter()
    list(engine.submit(request))
    return time.perf_counter() - started


def measure(name: str, shape: dict[str, int], arguments: Any) -> tuple[list[Row], Rate]:
    """All lengths of one model, interleaved."""
    prompts = Prompts(shape["vocab_size"])
    signal = SignalSettings(**arguments.signal).settled(shape["num_hidden_layers"])
    with make_engine(shape, dtype=arguments.dtype) as engine:
        router = make_router(engine, prompts, signal)
        digest = engine.load_module(make_module(engine.model, 0, rank=16))
        blend = Blend({digest: 1.0})
        routed: dict[int, list[float]] = {tokens: [] for tokens in arguments.lengths}
        answered: dict[int, list[float]] = {tokens: [] for tokens in arguments.lengths}
        for repeat in track(range(arguments.repeats + 1), name, console=Console(stderr=True)):
            for tokens in arguments.lengths:
                query = prompts.query(tokens)
                started = time.perf_counter()
                router.route(query)
                seconds = time.perf_counter() - started
                if repeat:  # the first warms up
                    routed[tokens].append(seconds)
                    answered[tokens].append(first_token(engine, query, blend))
                else:
                    first_token(engine, query, blend)
        rows = [row(name, tokens, routed[tokens], answered[tokens]) for tokens in routed]
        return rows, rate(name, router, prompts)


def row(name: str, tokens: int, routed: list[float], answered: list[float]) -> Row:
    """Medians; the share is the median of the repeats' own."""
    shares = [r / (r + a) for r, a in zip(routed, answered, strict=True)]
    totals = [r + a for r, a in zip(routed, answered, strict=True)]
    return Row(name, tokens, 1e3 * median(routed), 1e3 * median(totals), 100 * median(shares))


def rate(name: str, router: RequestRouter, prompts: Prompts) -> Rate:
    """Throughput of routing alone."""

    def per_second(route: Any) -> float:
        queries = [prompts.query(64) for _ in range(ROUTED)]
        started = time.perf_counter()
        route(queries)
        return ROUTED / (time.perf_counter() - started)

    return Rate(
        name, per_second(lambda qs: [router.route(q) for q in qs]), per_second(router.route_all)
    )


def show(rows: list[Row], rates: list[Rate], dtype: str) -> None:
    """The tables."""
    table = Table(title=f"router at its default setting, {dtype}")
    for column in ("model", "tokens", "router ms", "first token ms", "share %", "bar %"):
        table.add_column(column, justify="right")
    for each in rows:
        figures = f"{each.router:.1f}", f"{each.first_token:.1f}", f"{each.share:.1f}"
        table.add_row(each.model, str(each.tokens), *figures, f"{BARS.get(each.tokens, 0):g}")
    console = Console()
    console.print(table)
    for found in rates:
        console.print(
            f"{found.model}: {found.alone:.0f} prompts of 64 tokens routed in a second one at a "
            f"time, {found.together:.0f} together"
        )


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    layer: Annotated[int | None, typer.Option(help="default: the router's")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write figures")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: a smoke test")] = False,
) -> None:
    """Measure and print."""
    models = {"tiny": QUICK_MODEL} if quick else MODELS
    lengths = (64, 512) if quick else LENGTHS
    arguments = _Arguments(repeats, dtype, lengths, {} if layer is None else {"layer": layer})
    measured = [measure(name, shape, arguments) for name, shape in models.items()]
    rows = [each for found, _ in measured for each in found]
    rates = [found for _, found in measured]
    chosen = str(choose_dtype(dtype, choose_device("auto"))).removeprefix("torch.")
    show(rows, rates, chosen)
    document = {
        "machine": describe_machine(),
        "dtype": chosen,
        "rows": [asdict(each) for each in rows],
        "rates": [asdict(each) for each in rates],
    }
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n")


@dataclass(frozen=True)
class _Arguments:
    repeats: int
    dtype: str
    lengths: tuple[int, ...]
    signal: dict[str, int]


if __name__ == "__main__":
    typer.run(main)
