"""Blends inside vLLM: throughput and time to the first token, beside the backbone in the same
server and beside what vLLM does by itself.

Three servers run one after another, each with rows of its own; every repeat runs a server's rows in
turn, so that drifts of the machine fall on all of them, and figures are ratios to the backbone's
row of the same repeat. Sixteen requests are in flight; prompts and blends were never seen before.
On a CPU the clock of throughput is the CPU time of vLLM's processes, which others on the machine
disturb least; wall time is told beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import httpx
import psutil
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from mergeroute.adapters.blend import UNITS, Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.vllm.blends import lora_name
from mergeroute.runtime.vllm.launch import PluginOptions, padded_rank

from .machine import describe_machine

COUNT, MODULES = 16, 8
"""Requests in flight, and modules registered."""

BASE, ONE, THREE, TWO, ALL = "backbone", "one module", "3 modules", "2 of 8 modules", "8 modules"
ALONE, ALONE_NEW = "backbone, alone", "new blend, alone"
VIRTUAL, STOCK, MATERIALISED = "virtual blends", "vLLM's LoRA", "materialised blends"
STARTS_WITHIN_S = 1200
Clock = Literal["cpu", "wall"]
CPU: Clock = "cpu"
WALL: Clock = "wall"

_LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
_LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
SHAPES: Mapping[str, dict[str, int]] = {
    "quick": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000},
    "m100": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048}
    | {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000},
    "1b": _LLAMA_1B | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": _LLAMA_8B | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}


@dataclass(frozen=True)
class Plan:
    """What is run. prompt, output: tokens."""

    model: str
    device: Literal["cpu", "cuda"]
    rank: int
    prompt: int = 32
    output: int = 32

    @property
    def dtype(self) -> str:
        """vLLM would run a float32 model in half precision."""
        return "float32" if self.device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Measured:
    """One row once. tokens: of all requests. wall_s, cpu_s: for all of them, CPU time of all of
    vLLM's processes. first_token_s: the median.
    """

    tokens: int
    wall_s: float
    cpu_s: float
    first_token_s: float

    def speed(self, clock: Clock) -> float:
        """Tokens a second."""
        return self.tokens / (self.cpu_s if clock == "cpu" else self.wall_s)


Results = dict[str, dict[str, list[Measured]]]
"""By server and row, one per repeat."""


def write_model(plan: Plan, folder: Path) -> Shapes:
    """Configuration and tokenizer; vLLM makes the weights up. Returns the model's shapes."""
    shape = SHAPES[plan.model]
    config = transformers.LlamaConfig(
        **shape,
        architectures=["LlamaForCausalLM"],
        dtype=plan.dtype,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    words = {f"w{index}": index for index in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # type: ignore[call-arg, unused-ignore]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.device("meta"):
        return Shapes.of(transformers.AutoModelForCausalLM.from_config(config))


def make_module(shapes: Shapes, index: int, *, rank: int) -> Module:
    """A random module over all inner linear layers."""
    generator = torch.Generator().manual_seed(index)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    deltas = {n: LowRank(factor(o, rank), factor(rank, i)) for n, (o, i) in shapes.linear.items()}
    return Module(f"m{index}", deltas)


def make_blend(digests: Sequence[str], count: int, content: random.Random, index: int) -> str:
    """A blend's name; weights are drawn anew each time."""
    chosen = [digests[index % len(digests)]] if count == 1 else content.sample(digests, count)
    weights = [1.0] if count == 1 else [content.randint(1, 2 * UNITS) / UNITS for _ in chosen]
    return lora_name(Blend(dict(zip(chosen, weights, strict=True))))


def rows_of(server: str, digests: Sequence[str]) -> dict[str, Callable[[random.Random, int], str]]:
    """What each request of a row names, by row. The three modules are always the same."""

    def blends(known: Sequence[str], count: int) -> Callable[[random.Random, int], str]:
        return lambda content, index: make_blend(known, count, content, index)

    every: dict[str, Callable[[random.Random, int], str]] = {
        BASE: lambda *_: "base",
        ONE: blends(digests, 1),
        THREE: blends(digests[:3], 3),
        TWO: blends(digests, 2),
        ALL: blends(digests, MODULES),
        ALONE: lambda *_: "base",
        ALONE_NEW: blends(digests[:3], 3),
    }
    kept = {VIRTUAL: tuple(every), STOCK: (BASE, ONE), MATERIALISED: (BASE, THREE)}
    return {row: every[row] for row in kept[server]}


@dataclass(frozen=True)
class Running:
    """A server: its address, and its process."""

    url: str
    process: psutil.Process

    @property
    def cpu_s(self) -> float:
        """Seconds that it and its children took so far."""
        times = [one.cpu_times() for one in (self.process, *self.process.children(recursive=True))]
        return sum(time.user + time.system for time in times)


@contextmanager
def serving(server: str, plan: Plan, model: Path, modules: Path) -> Iterator[Running]:
    """A server that runs for the length of a block."""
    mode: Literal["virtual", "materialise"] = "virtual" if server == VIRTUAL else "materialise"
    options = PluginOptions(modules, slots=MODULES, rank=padded_rank(plan.rank), mode=mode)
    flags = options.arguments(COUNT)
    if server != VIRTUAL:  # as many and as large as needed, and no larger: padding costs it dear
        rank = padded_rank(plan.rank * (1 if server == STOCK else 3))
        numbers = {"max-lora-rank": rank, "max-loras": COUNT, "max-cpu-loras": 64}
        flags = ["--enable-lora", "--max-num-seqs", str(COUNT)]
        flags += [text for n, value in numbers.items() for text in (f"--{n}", str(value))]
        flags += ["--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"]
        flags += ["gate_proj", "up_proj", "down_proj"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "base", *flags]
    command += ["--load-format", "dummy", "--generation-config", "vllm", "--max-model-len", "1024"]
    command += ["--dtype", plan.dtype]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    one_thread = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (model / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **quiet, **one_thread, **options.environment},
            stdout=log,
            stderr=log,
        )
    try:
        _wait(f"http://127.0.0.1:{port}", process, model / "vllm.log")
        yield Running(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    process.kill()
    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-4000:]}")


def measure_row(
    running: Running,
    plan: Plan,
    name_of: Callable[[random.Random, int], str],
    *,
    seed: str,
    alone: bool,
) -> Measured:
    """All requests at once, or one after another."""
    content = random.Random(seed)
    vocabulary = SHAPES[plan.model]["vocab_size"]
    bodies = [
        {
            "model": name_of(content, index),
            "prompt": [content.randrange(vocabulary) for _ in range(plan.prompt)],
            "max_tokens": 2 if alone else plan.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        for index in range(COUNT)
    ]
    wall, cpu = time.perf_counter(), running.cpu_s
    firsts = asyncio.run(_ask_all(running.url, bodies, clients=1 if alone else COUNT))
    wall, cpu = time.perf_counter() - wall, running.cpu_s - cpu
    return Measured(COUNT * (2 if alone else plan.output), wall, cpu, median(firsts))


async def _ask_all(url: str, bodies: Sequence[Any], *, clients: int) -> list[float]:
    turn = asyncio.Semaphore(clients)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def first_token_s(body: Any) -> float:
            async with turn:
                sent, first = time.perf_counter(), 0.0
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code != 200:
                        raise RuntimeError((await response.aread()).decode())
                    async for line in response.aiter_lines():
                        if not first and line.startswith("data: {"):
                            first = time.perf_counter() - sent
                return first

        return list(await asyncio.gather(*map(first_token_s, bodies)))


def measure(plan: Plan, servers: Sequence[str], *, repeats: int) -> Results:
    """All rows of all servers."""
    results: Results = {}
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        shapes = write_model(plan, model)
        store = PluginOptions(Path(folder, "modules"), MODULES, padded_rank(plan.rank)).store
        modules = [make_module(shapes, k, rank=plan.rank) for k in range(MODULES)]
        for module in modules:
            store.add(module, shapes)
        digests = [module.digest for module in modules]
        for server in servers:
            with serving(server, plan, model, store.folder) as running:
                rows = rows_of(server, digests)
                results[server] = measure_server(running, plan, rows, name=server, repeats=repeats)
    return results


def measure_server(
    running: Running,
    plan: Plan,
    rows: Mapping[str, Callable[[random.Random, int], str]],
    *,
    name: str,
    repeats: int,
) -> dict[str, list[Measured]]:
    """A server's rows in turn, after a round that does not count."""
    found: dict[str, list[Measured]] = {row: [] for row in rows}
    steps = [(repeat, row) for repeat in range(repeats + 1) for row in rows]
    for repeat, row in track(steps, name, console=Console(stderr=True)):
        seed = f"{name} {row} {repeat}"  # other prompts and blends every time
        alone = row in (ALONE, ALONE_NEW)
        one = measure_row(running, plan, rows[row], seed=seed, alone=alone)
        if repeat:
            found[row].append(one)
    return found


def throughputs(results: Results, server: str, row: str, clock: Clock) -> list[float]:
    """Of a row relative to the backbone in the same server and repeat."""
    pairs = zip(results[server][row], results[server][BASE], strict=True)
    return [ours.speed(clock) / base.speed(clock) for ours, base in pairs]


def delays(results: Results, row: str, base: str) -> list[float]:
    """Times to the first token relative to another row of the same repeat."""
    pairs = zip(results[VIRTUAL][row], results[VIRTUAL][base], strict=True)
    return [ours.first_token_s / theirs.first_token_s for ours, theirs in pairs]


def bars(
    results: Results, plan: Plan
) -> dict[str, tuple[list[float], Callable[[float], bool], str]]:
    """What must hold: values per repeat, whether their median does, and the bar in words."""
    two, clock = (0.8, CPU) if plan.device == "cpu" else (0.9, WALL)
    found: dict[str, tuple[list[float], Callable[[float], bool], str]] = {
        f"{THREE} / {BASE}": (
            throughputs(results, VIRTUAL, THREE, clock),
            lambda v: v >= 0.9,
            ">= 0.9",
        ),
        f"{TWO} / {BASE}": (
            throughputs(results, VIRTUAL, TWO, clock),
            lambda v: v >= two,
            f">= {two}",
        ),
        "first token of a new blend / of the backbone": (
            delays(results, ALONE_NEW, ALONE),
            lambda v: v <= 1.5,
            "<= 1.5",
        ),
    }
    if MATERIALISED in results:
        theirs = median(throughputs(results, MATERIALISED, THREE, clock))
        values = [value / theirs for value in throughputs(results, VIRTUAL, THREE, clock)]
        found[f"{VIRTUAL} / {MATERIALISED}"] = (values, lambda v: v >= 2.5, ">= 2.5")
    return found


def tables(results: Results, plan: Plan) -> list[Table]:
    """Rows of all servers, and the bars."""
    rows = Table("server", "row", "tokens/s", "by wall time", "by CPU time", "first token, ms")
    for server, measured in results.items():
        for row, values in measured.items():
            speed = median(value.speed(WALL) for value in values)
            shares = [spread(throughputs(results, server, row, clock)) for clock in (WALL, CPU)]
            shares = ["", ""] if row in (ALONE, ALONE_NEW) else shares
            first = 1e3 * median(value.first_token_s for value in values)
            rows.add_row(server, row, f"{speed:.0f}", *shares, f"{first:.0f}")
    held = Table("ratio", "median (least to most)", "bar", "")
    for name, (values, holds, rule) in bars(results, plan).items():
        held.add_row(name, spread(values), rule, "met" if holds(median(values)) else "missed")
    return [rows, held]


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row.")] = 5,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "m100",
    rank: Annotated[int, typer.Option(help="Of every module.")] = 8,
    server: Annotated[list[str] | None, typer.Option(help="Only these servers.")] = None,
) -> None:
    """Measure blends inside vLLM; on a GPU where there is one, in bfloat16 with CUDA graphs."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    plan, console = Plan(model, device, rank), Console()
    results = measure(plan, server or (VIRTUAL, STOCK, MATERIALISED), repeats=repeats)
    where = {**describe_machine(), "device": device, "vllm": version("vllm")}
    console.print(*tables(results, plan))
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    if json_file:
        seconds = {
            s: {r: [asdict(v) for v in m] for r, m in rows.items()} for s, rows in results.items()
        }
        document = {"machine": where, "plan": asdict(plan), "results": seconds}
        json_file.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
