"""The zoo's sparse mixture of experts: ``python -m examples.zoo.moe --out build/zoo``.

The eight full fine-tunes are upcycled into a Mixtral of 8 experts, 2 a token, which is trained for
a short while on all eight tasks together. Training that was broken off goes on where it stopped.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeroute.adapters.build import BuildTools, Progress
from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.smoe.upcycling import upcycle
from mergeroute.runtime.gate_fitting import fitted_gates
from mergeroute.runtime.rendering import Rendered
from mergeroute.serving.building import progress_bars

from .evaluate import accuracy
from .model import load_model, load_tokenizer, save_model
from .tasks import Example, evaluation_examples, load_tasks, mixture, router_examples, target_tasks
from .tokenizer import render_answer, render_prompt
from .train import Batch, Schedule, answer_loss, batches, has_fast_bfloat16, rate_at
from .workers import quieten

SCHEDULE = Schedule(800, 5e-4)
GATE_PROMPTS = 50
SAVED_EVERY = 50
TEST_PROMPTS = 200


def main() -> None:
    """Upcycle, train, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m examples.zoo.moe", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/zoo"), help="a trained zoo")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quieten()
    console, zoo = Console(), arguments.out.resolve()
    start, trained = zoo / "moe-start", zoo / "moe"
    with progress_bars(console) as progress:
        if not start.exists():
            upcycle_zoo(zoo, start, progress)
        if not (trained / "config.json").exists():
            schedule = Schedule(arguments.steps, SCHEDULE.learning_rate)
            train(start, trained, schedule, progress)
        scores = {source: score(zoo, source, progress) for source in ("moe-start", "moe")}
    (zoo / "moe.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    console.print(table(scores))


def upcycle_zoo(zoo: Path, out: Path, progress: Progress) -> None:
    """Write the mixture of the zoo's fine-tunes as it is before training."""
    tasks, tokenizer = target_tasks(load_tasks()), load_tokenizer(zoo / "base")
    recipe = Recipe.model_validate(
        {
            "name": "zoo-moe",
            "base": str(zoo / "base"),
            "experts": [{"name": t.name, "path": str(zoo / "full" / t.name)} for t in tasks],
            "backbone": {"method": "linear"},
            "modules": {"method": "none"},
        }
    )
    prompts = {
        task.name: [rendered(tokenizer, e) for e in router_examples(task, GATE_PROMPTS)]
        for task in tasks
    }
    step = progress("gates", len(tasks) * GATE_PROMPTS)
    upcycle(
        recipe,
        out,
        gates=lambda merger: fitted_gates(merger, prompts, on_prompt=step),
        tools=BuildTools(progress=progress),
    )


def rendered(tokenizer: object, example: Example) -> Rendered:
    """A training example as token ids."""
    prompt = render_prompt(tokenizer, example.prompt)
    return Rendered((*prompt, *render_answer(tokenizer, example.answer)), len(prompt))


def train(start: Path, out: Path, schedule: Schedule, progress: Progress) -> None:
    """Train every weight of the layers on all tasks together; embeddings and norms stay."""
    model, tokenizer = load_model(start), load_tokenizer(start)
    model.set_experts_implementation("grouped_mm")
    model.set_attn_implementation("eager")
    model.train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.ndim > 1 and "layers" in name)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=schedule.learning_rate, weight_decay=0.0)
    state = out.with_name("moe-training.safetensors")
    done = restore(state, named, optimizer)
    step = progress("training", schedule.steps)
    for _ in range(done):
        step()
    for index, batch in islice(enumerate(stream(tokenizer)), done, schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * rate_at(index, schedule.steps)
        train_step(model, batch, optimizer)
        if (index + 1) % SAVED_EVERY == 0:
            keep(state, named, optimizer, index + 1)
        step()
    save_model(model, tokenizer, out)
    state.unlink(missing_ok=True)


def stream(tokenizer: object) -> Iterator[Batch]:
    """Training batches of all tasks, the same ones in every run."""
    tasks, random = target_tasks(load_tasks()), Random("moe")

    def draw(count: int) -> list[Example]:
        return mixture(tasks, count, weights=[1.0] * len(tasks), random=random)

    return batches(draw, tokenizer, random)


def train_step(model: torch.nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
        loss = answer_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def keep(file: Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write the weights and the optimizer's averages, so that training can go on from here."""
    tensors = {"done": torch.tensor(done)}
    for name, weight in named.items():
        tensors[f"weight {name}"] = weight.detach()
        for key, value in optimizer.state[weight].items():
            tensors[f"{key} {name}"] = value
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.replace(file)


def restore(file: Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Read what `keep` wrote, if there is something; how many steps were done."""
    if not file.exists():
        return 0
    tensors = load_file(file)
    for name, weight in named.items():
        weight.data.copy_(tensors[f"weight {name}"])
        optimizer.state[weight] = {
            key: tensors[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(tensors["done"])


def score(zoo: Path, source: str, progress: Progress) -> dict[str, float]:
    """Accuracy on held-out inputs in known wordings, by task, in 0 to 1."""
    model, tokenizer = load_model(zoo / source), load_tokenizer(zoo / source)
    tasks = target_tasks(load_tasks())
    step: Callable[[], None] = progress(f"accuracy of {source}", len(tasks))
    found = {}
    for task in tasks:
        found[task.name] = accuracy(model, tokenizer, evaluation_examples(task, TEST_PROMPTS))
        step()
    return found


def table(scores: dict[str, dict[str, float]]) -> Table:
    """Exact match by task, before training and after."""
    shown = Table(title="Exact match %, held-out inputs, known wordings")
    for heading in ("task", *scores):
        shown.add_column(heading, justify="left" if heading == "task" else "right")
    for task in next(iter(scores.values())):
        shown.add_row(task, *(f"{100 * own[task]:.1f}" for own in scores.values()))
    means = (sum(own.values()) / len(own) for own in scores.values())
    shown.add_row("mean", *(f"{100 * mean:.1f}" for mean in means))
    return shown


if __name__ == "__main__":
    main()
