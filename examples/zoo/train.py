"""Training of the base, the LoRA experts and the full fine-tunes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .model import add_lora, load_model, load_tokenizer, new_base, save_lora, save_model
from .tasks import Example, Task, generic_tasks, load_tasks, mixture, target_tasks
from .tokenizer import render_answer, render_prompt

BATCH_SIZE = 64
BATCHES_PER_POOL = 16
LENGTH_STEP = 8
TARGET_WEIGHT = 0.35
GENERIC_WEIGHT = 0.6
IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. learning_rate is the peak."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. token_ids, targets: [b, t]; targets hold -100 but at answers."""

    token_ids: Tensor
    targets: Tensor


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Render and pad examples; a target stands one position before the token it names.

    Lengths are rounded up so that few shapes occur: each new one costs the CPU kernels a set-up.
    """
    prompts = [render_prompt(tokenizer, example.prompt) for example in examples]
    answers = [render_answer(tokenizer, example.answer) for example in examples]
    longest = max(len(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True))
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    token_ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    targets = torch.full((len(examples), length), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return Batch(token_ids, targets)


def batches(
    draw: Callable[[int], list[Example]], tokenizer: PreTrainedTokenizerFast, random: Random
) -> Iterator[Batch]:
    """Yield batches of examples of like length, without end."""
    while True:
        pool = draw(BATCH_SIZE * BATCHES_PER_POOL)
        pool.sort(key=lambda example: len(example.prompt) + len(example.answer))
        starts = list(range(0, len(pool), BATCH_SIZE))
        random.shuffle(starts)
        for start in starts:
            yield collate(pool[start : start + BATCH_SIZE], tokenizer)


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the mean cross-entropy at answer positions; logits are computed only there."""
    hidden = model.model(input_ids=batch.token_ids).last_hidden_state  # [b, t, d]
    kept = batch.targets != IGNORED
    logits = model.lm_head(hidden[kept])  # [answers, vocabulary]
    return cross_entropy(logits.float(), batch.targets[kept])


def optimizers(
    model: torch.nn.Module, learning_rate: float, *, muon: bool
) -> list[torch.optim.Optimizer]:
    """Make the optimizers of all trainable weights.

    muon: train the matrices of the layers by Muon, and only the rest by AdamW.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if not muon:
        return [torch.optim.AdamW([w for _, w in named], lr=learning_rate, weight_decay=0.0)]
    matrices = [weight for name, weight in named if weight.ndim == 2 and "layers" in name]
    rest = [weight for name, weight in named if weight.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a short warm-up, then linear decay to 5 %."""
    warm_up = min(1.0, (step + 1) / max(1, steps // 20))
    return warm_up * (1 - 0.95 * step / steps)


def fit(
    model: LlamaForCausalLM,
    stream: Iterator[Batch],
    *,
    schedule: Schedule,
    muon: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train the trainable weights of a model in place."""
    chosen = optimizers(model, schedule.learning_rate, muon=muon)
    model.train()
    model.set_attn_implementation("eager")  # twice as fast as sdpa's backward on short rows
    for step in range(schedule.steps):
        for optimizer in chosen:
            factor = rate_at(step, schedule.steps)
            optimizer.param_groups[0]["lr"] = schedule.learning_rate * factor
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = answer_loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
        on_step()


def has_fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def train_base(folder: Path, schedule: Schedule, *, on_step: Callable[[], None]) -> None:
    """Pretrain the base on the mixture of all tasks and save it."""
    tasks = load_tasks()
    targets, generics = target_tasks(tasks), generic_tasks(tasks)
    weights = [TARGET_WEIGHT] * len(targets) + [GENERIC_WEIGHT] * len(generics)
    random = Random("base")

    def draw(count: int) -> list[Example]:
        return mixture([*targets, *generics], count, weights=weights, random=random)

    model, tokenizer = new_base(seed=0)
    stream = batches(draw, tokenizer, random)
    fit(model, stream, schedule=schedule, muon=True, on_step=on_step)
    save_model(model, tokenizer, folder)


def expert_stream(task: Task, tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[Batch]:
    """Yield training batches of one task, in an order that the seed decides."""
    random = Random(seed)

    def draw(count: int) -> list[Example]:
        return [task.example(random, split="train") for _ in range(count)]

    return batches(draw, tokenizer, random)


def train_full(base: Path, folder: Path, task: Task, schedule: Schedule) -> None:
    """Fine-tune every matrix of the layers on one task; embeddings and norms stay frozen."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.ndim == 2 and "layers" in name)
    fit(model, expert_stream(task, tokenizer, f"full {task.name}"), schedule=schedule)
    save_model(model, tokenizer, folder)


def train_lora(base: Path, folder: Path, task: Task, schedule: Schedule, *, seed: int) -> None:
    """Train a LoRA on one task and save it as a PEFT folder."""
    tokenizer = load_tokenizer(base)
    adapted = add_lora(load_model(base), seed=seed)
    stream = expert_stream(task, tokenizer, f"lora {task.name}")
    fit(adapted.get_base_model(), stream, schedule=schedule)
    save_lora(adapted, folder)
