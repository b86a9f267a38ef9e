"""Routing by token on the demo bank, beside blends: `python -m benchmarks.token_routing`.

Arrow, SpectR and PHATGOOSE weigh the eight experts anew for every token and layer. Measured are the
choices they make, the answers that come of it (as a share of each expert's own) and what it costs.
The gates of PHATGOOSE, which the demo bank does not ship, are trained first.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.zoo.gates import GateSchedule, train_gates
from examples.zoo.tasks import load_tasks
from examples.zoo.tokenizer import render_prompt
from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.blended import BlendedLinear
from mergeroute.runtime.directions import GateTables
from mergeroute.runtime.gating import GateTable, running_means
from mergeroute.runtime.module_stack import ResidentModule
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import GenerationRequest, SamplingParams, TokenGate

from .engine import FULL, make_model, make_module
from .machine import describe_machine
from .zoo import DATA, Prompt

ROOT = Path(__file__).parent.parent
BANK = ROOT / "serving" / "demo_bank"
OUT = ROOT / "docs" / "token_routing.json"
WORDINGS = ("known", "held-out")
TRAINING_EXAMPLES = 1000
CHOICE_SHARE = 5
"""Choices are counted on every fifth prompt."""
COUNT = 8
"""Modules beside the larger model, as many as the bank has."""
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64, 32

ROUTINGS = {
    "arrow, top 1": TokenRouting("arrow", top_k=1),
    "arrow, top 2": TokenRouting("arrow", top_k=2),
    "arrow, top 3": TokenRouting("arrow"),
    "arrow, top 3, raw": TokenRouting("arrow", norm="raw"),
    "arrow, top 3, smoothed": TokenRouting("arrow", smoothing=0.9),
    "spectr, top 3": TokenRouting("spectr"),
    "spectr, 4 directions, top 3": TokenRouting("spectr", directions=4),
    "phatgoose, top 1": TokenRouting("phatgoose", top_k=1),
    "phatgoose, top 2": TokenRouting("phatgoose"),
    "phatgoose, top 2, smoothed": TokenRouting("phatgoose", smoothing=0.9),
}
UNIFORM, ORACLE, BACKBONE = "uniform average", "its own module", "backbone"
ONE_MODULE = "blend of one module"
TIMED = (
    "arrow, top 1",
    "arrow, top 3",
    "arrow, top 3, smoothed",
    "spectr, top 3",
    "phatgoose, top 2",
)


@dataclass(frozen=True)
class Zoo:
    """A running engine with the demo bank's modules, by name."""

    engine: TorchEngine
    modules: Mapping[str, Module]
    digests: Mapping[str, str]

    def request(self, prompt: Prompt, row: str, *, max_tokens: int) -> GenerationRequest:
        """A prompt, served as a row of the table says."""
        ids = tuple(render_prompt(self.engine.tokenizer, prompt.prompt))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        if row in ROUTINGS:
            gate = TokenGate(ROUTINGS[row], tuple(self.digests.values()))
            return GenerationRequest(ids, Blend(), sampling, gate)
        weights = {
            UNIFORM: dict.fromkeys(self.digests.values(), 1 / len(self.digests)),
            ORACLE: {self.digests[prompt.task]: 1.0},
            BACKBONE: {},
        }
        return GenerationRequest(ids, Blend(weights[row]), sampling)


def gated_modules(bank: Bank, *, steps: int) -> list[Module]:
    """The bank's modules with trained gates."""
    tasks = load_tasks()
    modules = []
    for entry in track(bank.modules, "training gates", console=Console(stderr=True)):
        chance = random.Random(f"gates of {entry.name}")
        task = tasks[entry.name]
        examples = [task.example(chance, split="train") for _ in range(TRAINING_EXAMPLES)]
        gates = train_gates(
            bank.backbone.path, entry.path, examples, schedule=GateSchedule(steps=steps)
        )
        modules.append(replace(bank.load(entry), gates=gates))
    return modules


def accuracies(zoo: Zoo, prompts: Sequence[Prompt], row: str) -> dict[str, float]:
    """Share of right answers by task."""
    running = [
        zoo.engine.submit(zoo.request(p, row, max_tokens=len(p.answer.encode()) + 1))
        for p in prompts
    ]
    found: dict[str, list[float]] = {}
    for prompt, generation in zip(prompts, running, strict=True):
        events = list(generation)
        text = "".join(event.text for event in events)
        is_right = text == prompt.answer and events[-1].finish_reason == "stop"
        found.setdefault(prompt.task, []).append(float(is_right))
    return {task: mean(own) for task, own in found.items()}


def table_of(zoo: Zoo, row: str) -> GateTable:
    """What a row's gate knows of the modules."""
    gate = TokenGate(ROUTINGS[row], tuple(zoo.digests.values()))
    names = {digest: name for name, digest in zoo.digests.items()}
    residents = {
        d: ResidentModule(names[d], d, zoo.modules[names[d]].deltas, zoo.modules[names[d]].gates)
        for d in gate.modules
    }
    return GateTables(residents.__getitem__, device=torch.device("cpu")).table(gate)


@contextmanager
def watching(model: Any, table: GateTable, choices: list[torch.Tensor]) -> Iterator[None]:
    """Note which module every token takes first in every layer that runs in the block."""
    routing = table.gate.routing

    def watch(layer: BlendedLinear, inputs: tuple[torch.Tensor]) -> None:
        scores = table.layers[layer.name].scores(inputs[0][0], routing)
        if routing.smoothing:
            scores = running_means(scores, None, share=routing.smoothing)
        choices.append(scores.argmax(1))

    layers = [layer for layer in model.modules() if isinstance(layer, BlendedLinear)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def right_choices(zoo: Zoo, prompts: Sequence[Prompt], row: str) -> float:
    """Percentage of first choices, over layers and the prompts' tokens, that are right."""
    table = table_of(zoo, row)
    right = total = 0
    for prompt in prompts:
        choices: list[torch.Tensor] = []
        with watching(zoo.engine.model, table, choices):
            list(zoo.engine.submit(zoo.request(prompt, row, max_tokens=1)))
        chosen = torch.cat(choices)
        right += int((chosen == table.gate.modules.index(zoo.digests[prompt.task])).sum())
        total += len(chosen)
    return 100 * right / total


def quality(zoo: Zoo, prompts: Sequence[Prompt], choices: int) -> list[dict[str, Any]]:
    """One entry per row and kind of wording."""
    found = []
    by_wording = {w: [prompt for prompt in prompts if prompt.wording == w] for w in WORDINGS}
    best = {wording: accuracies(zoo, own, ORACLE) for wording, own in by_wording.items()}
    rows = [ORACLE, BACKBONE, UNIFORM, *ROUTINGS]
    for row in track(rows, "answering", console=Console(stderr=True)):
        for wording, own in by_wording.items():
            right = accuracies(zoo, own, row)
            ratios = [right[task] / best[wording][task] for task in right]
            entry = {"row": row, "wording": wording, "normalised": round(100 * mean(ratios), 1)}
            if row in ROUTINGS:
                entry["right_choices"] = round(right_choices(zoo, own[::choices], row), 1)
            found.append(entry)
    return found


def tokens_per_second(
    engine: TorchEngine, digests: Sequence[str], *, vocabulary: int, repeats: int
) -> dict[str, float]:
    """Generated tokens a second of process time, 16 requests at once; medians of interleaved runs.

    All tokens count, those of the prompts too.
    """
    gates = {row: TokenGate(ROUTINGS[row], tuple(digests)) for row in TIMED}
    for gate in gates.values():
        engine.prepare_gate(gate)
    speeds: dict[str, list[float]] = {row: [] for row in (BACKBONE, ONE_MODULE, UNIFORM, *TIMED)}
    chance = random.Random(0)
    for _ in track(range(repeats), "timing", console=Console(stderr=True)):
        for row, own in speeds.items():
            weights = {
                UNIFORM: dict.fromkeys(digests, 1 / len(digests)),
                ONE_MODULE: {digests[0]: 1},
            }
            blend = Blend(weights.get(row, {}))
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
            requests = [
                GenerationRequest(
                    tuple(chance.choices(range(vocabulary), k=PROMPT_TOKENS)),
                    blend,
                    sampling,
                    gates.get(row),
                )
                for _ in range(REQUESTS)
            ]
            started = time.process_time()
            for generation in [engine.submit(one) for one in requests]:
                list(generation)
            own.append(REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS) / (time.process_time() - started))
    return {row: median(own) for row, own in speeds.items()}


def with_random_gates(module: Module) -> Module:
    """Gates that cost what trained ones do."""
    chance = torch.Generator().manual_seed(0)
    gates = {n: torch.randn(d.shape[1], generator=chance) for n, d in module.deltas.items()}
    return replace(module, gates=gates)


def costs(zoo: Zoo, *, repeats: int) -> dict[str, dict[str, float]]:
    """Speed of rows as a share of that of one module, on the demo bank and on a larger model."""
    speeds = {
        "zoo": tokens_per_second(
            zoo.engine, list(zoo.digests.values()), vocabulary=256, repeats=repeats
        )
    }
    large = make_model(FULL)
    modules = [with_random_gates(make_module(large, k, rank=FULL.rank)) for k in range(COUNT)]
    with TorchEngine(large) as engine:
        digests = [engine.load_module(module) for module in modules]
        speeds["100 M"] = tokens_per_second(
            engine, digests, vocabulary=FULL.model["vocab_size"], repeats=max(1, repeats // 2)
        )
    return {
        name: {
            ONE_MODULE + ", tokens/s": round(own[ONE_MODULE], 1),
            **{row: round(speed / own[ONE_MODULE], 3) for row, speed in own.items()},
        }
        for name, own in speeds.items()
    }


def show(report: Mapping[str, Any]) -> None:
    """The table."""
    table = Table(
        title="normalised score, right choices (chance 12.5), speed beside a blend of one"
    )
    sizes = list(report["costs"])
    for column in ("row", *(f"{w}: score, choices" for w in WORDINGS), *sizes):
        table.add_column(column, justify="left" if column == "row" else "right")
    rows = dict.fromkeys([e["row"] for e in report["quality"]] + [BACKBONE, ONE_MODULE])
    for row in rows:
        own = [e for e in report["quality"] if e["row"] == row]
        cells = [f"{e['normalised']:.1f}, {e.get('right_choices', '-')}" for e in own] or ["", ""]
        speeds = [str(report["costs"][size].get(row, "")) for size in sizes]
        table.add_row(row, *cells, *speeds)
    Console().print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_routing", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of training the gates")
    parser.add_argument("--prompts", type=int, default=25, help="per task and wording")
    parser.add_argument("--repeats", type=int, default=5, help="of timing")
    parser.add_argument("--json", type=Path, default=OUT)
    arguments = parser.parse_args()
    bank = Bank.open(BANK)
    prompts = [Prompt(**json.loads(line)) for line in DATA.read_text("utf-8").splitlines()]
    experts = [prompt for prompt in prompts if prompt.kind == "expert"]
    kept = [
        prompt
        for _, own in groupby(experts, key=lambda p: (p.task, p.wording))
        for prompt in list(own)[: arguments.prompts]
    ]
    modules = {module.name: module for module in gated_modules(bank, steps=arguments.steps)}
    with TorchEngine.load(bank.backbone.path, device="cpu", dtype="float32") as engine:
        digests = {name: engine.load_module(module) for name, module in modules.items()}
        zoo = Zoo(engine, modules, digests)
        report = {
            "quality": quality(zoo, kept, CHOICE_SHARE),
            "costs": costs(zoo, repeats=arguments.repeats),
            "prompts": arguments.prompts,
            "gate_steps": arguments.steps,
            "machine": describe_machine(),
        }
    show(report)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
