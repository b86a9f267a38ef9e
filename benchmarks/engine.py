"""Throughput of the torch engine on sixteen blends at once, beside PEFT and merging per request.

Sixteen requests with sixteen blends over sixteen random modules, greedy, float32. Every repeat runs
all rows in turn, so that drifts of the machine fall on all of them. With one thread the clock is
the process's CPU time, which other processes on the machine disturb least; else wall time.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.blend import UNITS, Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams

from .machine import describe_machine
from .rivals import Outputs, Work, run_merged, run_peft, with_peft

COUNT = 16
"""Modules, and requests."""

LENGTHS_SEED = 480
"""The first whose totals are within 2 % of 2,268 prompt and 960 output tokens, the workload that
the bars were set on.
"""

FACTOR_SCALE = 0.05
BARE, BACKBONE, TOP_2 = "engine without modules", "engine, backbone alone", "engine, top-2 blends"
DENSE, PEFT, MERGED = "engine, dense blends", "PEFT, one adapter a row", "merging per request"
BARS = (
    (TOP_2, BACKBONE, 0.78),
    (DENSE, BACKBONE, 0.66),
    (TOP_2, PEFT, 1.8),
    (TOP_2, MERGED, 2.4),
)
"""Throughput of the first relative to the second, and the least it should be."""

NOTES = f"""\
{BACKBONE}: empty blends on the engine that has all {COUNT} modules loaded.
{PEFT}: generate(adapter_names=[...]), left-padded. PEFT cannot blend per row, so
each row runs the heavier module of its pair, and runs to the batch's longest output.
{MERGED}: W += sum of w B A (top-2), generate, restore, one request after another."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the model, its modules and the requests; ranges hold both ends."""

    model: Mapping[str, int]
    rank: int
    prompt: tuple[int, int]
    output: tuple[int, int]


FULL_MODEL = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}
QUICK_MODEL = {**FULL_MODEL, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256}
FULL = Scale(FULL_MODEL, rank=16, prompt=(32, 256), output=(16, 128))
QUICK = Scale(QUICK_MODEL, rank=4, prompt=(4, 24), output=(2, 8))


Seconds = dict[str, dict[str, list[float]]]
"""By row and clock (cpu, wall), one per repeat."""
Run = Callable[[Sequence[Work]], Outputs]


def make_model(scale: Scale) -> Any:
    """A random Llama that never ends by itself."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **scale.model,
        initializer_range=0.04,  # at the default 0.02, outputs soon repeat one token
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_module(model: Any, index: int, *, rank: int) -> Module:
    """A random module over all seven kinds of linear layers."""
    generator = torch.Generator().manual_seed(index)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * FACTOR_SCALE

    deltas = {
        layer: LowRank(factor(o, rank), factor(rank, i))
        for layer, (o, i) in linear_layers(model).items()
    }
    return Module(f"m{index}", deltas)


def make_workload(scale: Scale, *, seed: int) -> list[Work]:
    """Lengths and blends are always the same; the prompts differ by seed, so that no repeat can
    reuse what an earlier one left in the cache.
    """
    shape, content, lengths = random.Random(0), random.Random(seed), random.Random(LENGTHS_SEED)
    workload = []
    for first, second in shape.sample(list(combinations(range(COUNT), 2)), COUNT):
        length, limit = lengths.randint(*scale.prompt), lengths.randint(*scale.output)
        share = shape.randint(UNITS // 4, UNITS // 2 - 1)
        prompt = tuple(content.randrange(1, scale.model["vocab_size"]) for _ in range(length))
        pair = Blend({f"m{first}": share / UNITS, f"m{second}": 1 - share / UNITS})
        dense = Blend({f"m{k}": shape.randint(1, 8) / UNITS for k in range(COUNT)})
        workload.append(Work(prompt, limit, pair, dense))
    return workload


def run_engine(
    workload: Sequence[Work],
    *,
    engine: TorchEngine,
    digests: Mapping[str, str],
    blend_of: Callable[[Work], Blend],
) -> Outputs:
    """All requests at once."""
    running = [
        engine.submit(
            GenerationRequest(
                work.prompt,
                blend_of(work).renamed(digests),
                SamplingParams(max_tokens=work.limit, temperature=0),
            )
        )
        for work in workload
    ]
    return [[e.token_id for e in events if e.token_id is not None] for events in running]


def make_rows(scale: Scale) -> dict[str, Run]:
    """What is compared, in the order in which it runs. The engines end with the process."""
    model = make_model(scale)
    modules = {f"m{k}": make_module(model, k, rank=scale.rank) for k in range(COUNT)}
    options = EngineOptions(max_length=scale.prompt[1] + scale.output[1], max_concurrency=COUNT)
    bare = TorchEngine(copy.deepcopy(model), options=options)
    engine = TorchEngine(copy.deepcopy(model), options=options)
    digests = {name: engine.load_module(module) for name, module in modules.items()}
    blended = partial(run_engine, engine=engine, digests=digests)
    originals = {
        layer: model.get_submodule(layer).weight.detach().clone() for layer in linear_layers(model)
    }
    return {
        BARE: partial(run_engine, engine=bare, digests={}, blend_of=lambda _: Blend()),
        BACKBONE: partial(blended, blend_of=lambda _: Blend()),
        TOP_2: partial(blended, blend_of=lambda work: work.pair),
        DENSE: partial(blended, blend_of=lambda work: work.dense),
        PEFT: partial(run_peft, model=with_peft(copy.deepcopy(model), modules)),
        MERGED: partial(run_merged, model=model, modules=modules, originals=originals),
    }


def measure(rows: Mapping[str, Run], scale: Scale, *, repeats: int) -> tuple[Seconds, list[int]]:
    """Times, and in how many requests of each repeat top-2 gave the merged models' tokens."""
    warm_up = make_workload(replace(scale, prompt=QUICK.prompt, output=QUICK.output), seed=0)
    for run in rows.values():
        run(warm_up)
    seconds: Seconds = {name: {"cpu": [], "wall": []} for name in rows}
    outputs: dict[str, Outputs] = {}
    equal: list[int] = []
    steps = [(repeat, name) for repeat in range(1, repeats + 1) for name in rows]
    for repeat, name in track(steps, "measuring", console=Console(stderr=True)):
        workload = make_workload(scale, seed=repeat)
        cpu, wall = time.process_time(), time.perf_counter()
        outputs[name] = rows[name](workload)
        seconds[name]["cpu"].append(time.process_time() - cpu)
        seconds[name]["wall"].append(time.perf_counter() - wall)
        if name == MERGED:
            pairs = zip(outputs[TOP_2], outputs[MERGED], strict=True)
            equal.append(sum(ours == theirs for ours, theirs in pairs))
    return seconds, equal


def ratios(seconds: Seconds, row: str, other: str, *, clock: str) -> list[float]:
    """Throughput of a row relative to another, per repeat; both give the same useful tokens."""
    pairs = zip(seconds[row][clock], seconds[other][clock], strict=True)
    return [theirs / ours for ours, theirs in pairs]


def times_table(seconds: Seconds, *, clock: str) -> Table:
    """Medians by row."""
    table = Table("row", "CPU s", "wall s", "relative throughput", title=f"by {clock} time")
    for name, taken in seconds.items():
        relative = spread(ratios(seconds, name, BACKBONE, clock=clock))
        table.add_row(name, f"{median(taken['cpu']):.2f}", f"{median(taken['wall']):.2f}", relative)
    return table


def bars_table(seconds: Seconds, *, clock: str) -> Table:
    """The ratios that must hold at full size."""
    table = Table("throughput ratio", "median (least to most)", "bar", "")
    for row, other, bar in BARS:
        values = ratios(seconds, row, other, clock=clock)
        verdict = "met" if median(values) >= bar else "missed"
        table.add_row(f"{row} / {other}", spread(values), f"{bar:.2f}", verdict)
    return table


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, to try it out.")] = False,
) -> None:
    """Measure the torch engine beside PEFT and merging per request."""
    torch.set_num_threads(threads)
    scale, clock = QUICK if quick else FULL, "cpu" if threads == 1 else "wall"
    seconds, equal = measure(make_rows(scale), scale, repeats=repeats)
    machine, console = describe_machine(), Console()
    console.print(times_table(seconds, clock=clock), bars_table(seconds, clock=clock))
    limits = [work.limit for work in make_workload(scale, seed=0)]
    useful = sum(limits) / (COUNT * max(limits))
    console.print(NOTES, f"useful share of the tokens that PEFT generates: {useful:.2f}", sep="\n")
    console.print(f"top-2 tokens equal the merged models': {min(equal)}/{COUNT}")
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if json_file:
        result = {"machine": machine, "scale": asdict(scale), "seconds": seconds, "equal": equal}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if min(equal) < COUNT:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
