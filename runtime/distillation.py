"""Distillation: a model trained for a short while to answer as the one it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from ..adapters.errors import DataError
from .rendering import Batch, Rendered, batches

_POOL = 16
"""Batches that are drawn together, so that prompts of like length share one."""


@dataclass(frozen=True)
class DistillationSettings:
    """How a model is trained against its teacher.

    steps: at most so many. learning_rate: the peak, after the warm-up; it falls linearly to 0.
    kl: weight of the teacher's distribution beside the cross-entropy of the answers.
    every: steps between two looks at the held-out prompts. patience: looks without a lower loss
    after which training ends.
    """

    steps: int = 200
    learning_rate: float = 3e-4
    batch_size: int = 32
    kl: float = 0.2
    temperature: float = 2.0
    warm_up: int = 16
    weight_decay: float = 0.01
    every: int = 20
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """What training came to. losses: on held-out prompts, by steps done; 0 is before training."""

    losses: Mapping[int, float]

    @property
    def best(self) -> int:
        """The steps done when the held-out loss was lowest."""
        return min(self.losses, key=lambda step: self.losses[step])

    @property
    def steps(self) -> int:
        """The steps done in all."""
        return max(self.losses)


def distil(
    student: Any,  # noqa: ANN401 - transformers is untyped
    teacher: Any,  # noqa: ANN401
    prompts: Sequence[Rendered],
    *,
    held_out: Sequence[Rendered],
    settings: DistillationSettings = DistillationSettings(),
    on_step: Callable[[], None] = lambda: None,
) -> Distilled:
    """Train the weights of `student` that require a gradient, in place: cross-entropy of the
    answers plus `kl` times the divergence from the teacher, at answers alone; a prompt without an
    answer counts as a whole. It ends when the loss on held-out prompts falls no more, and the
    weights of the lowest one stay, be it the first.

    It departs from the reference code of MC-SMoE: the divergence at temperature T is scaled by T²,
    so that its gradient does not vanish with T, and is a mean over tokens, so that it does not grow
    with the length of answers; the student trains in training mode; padding is left out.

    student, teacher: on one device, where they stay; the teacher's parameters are not touched.
    on_step: called once per step.

    Raises:
        DataError: there are no prompts to train on, or none held out.

    Source: Li et al. 2024, MC-SMoE, arXiv:2310.01334, section 3.3 and appendix; the factor T²:
    Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if not prompts or not held_out:
        raise DataError("distillation needs prompts to train on and prompts held out: give more")
    accelerator = Accelerator(cpu=student.device.type == "cpu", device_placement=False)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    model, optimizer, schedule = accelerator.prepare(student, *_optimizer(weights, settings))
    objective = _Objective(model, teacher, settings)
    losses = {0: objective.held_out(held_out)}
    kept = _copies(weights)
    for step, batch in enumerate(_stream(prompts, settings), 1):
        model.train()
        optimizer.zero_grad()
        accelerator.backward(objective.loss(batch))
        accelerator.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        on_step()
        if step % settings.every == 0 or step == settings.steps:
            losses[step] = objective.held_out(held_out)
            if Distilled(losses).best == step:
                kept = _copies(weights)
            if _has_stalled(losses, settings.patience):
                break
    _restore(weights, kept)
    accelerator.free_memory()
    student.eval()
    return Distilled(losses)


def held_out_loss(
    student: Any,  # noqa: ANN401
    teacher: Any,  # noqa: ANN401
    prompts: Sequence[Rendered],
    *,
    settings: DistillationSettings = DistillationSettings(),
) -> float:
    """The loss that `distil` lowers, on prompts that were held out; it leaves the student in
    evaluation mode.
    """
    return _Objective(student, teacher, settings).held_out(prompts)


@dataclass(frozen=True)
class _Objective:
    """What training lowers."""

    student: Any
    teacher: Any
    settings: DistillationSettings

    def loss(self, batch: Batch) -> Tensor:
        """The mean over a batch's answer tokens."""
        total, count = self._sum(batch)
        return total / max(1, count)  # prompts of one token have nothing to be said

    @torch.no_grad()
    def held_out(self, prompts: Sequence[Rendered]) -> float:
        """The mean over all answer tokens of some prompts."""
        self.student.eval()
        found = [self._sum(batch) for batch in batches(prompts, size=self.settings.batch_size)]
        loss = float(sum(total for total, _ in found) / max(1, sum(count for _, count in found)))
        return loss if math.isfinite(loss) else math.inf  # what diverged is never the best

    def _sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The loss summed over answer tokens, and how many they are."""
        device = self.teacher.device
        token_ids, mask = batch.token_ids.to(device), batch.mask.to(device)
        said = batch.answers[:, 1:].to(device)  # what is said at a position, the one before tells
        logits = _logits(self.student, token_ids, mask, said)
        with torch.no_grad():
            wanted = _logits(self.teacher, token_ids, mask, said)
        own = cross_entropy(logits, token_ids[:, 1:][said], reduction="sum")
        return own + self.settings.kl * self._divergence(logits, wanted), len(logits)

    def _divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """T² KL(teacher ‖ student) at temperature T, summed over tokens."""
        warmth = self.settings.temperature
        one, other = ((x / warmth).log_softmax(-1) for x in (logits, wanted))
        return warmth**2 * kl_div(one, other, log_target=True, reduction="sum")


def _logits(model: Any, token_ids: Tensor, mask: Tensor, said: Tensor) -> Tensor:  # noqa: ANN401
    """Logits, float32, at the positions whose next token counts, [n, vocabulary]."""
    out = model(input_ids=token_ids, attention_mask=mask, use_cache=False)
    logits: Tensor = out.logits[:, :-1][said].float()
    return logits


def _optimizer(
    weights: Sequence[Tensor], settings: DistillationSettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with the paper's constants, and its schedule."""
    optimizer = torch.optim.AdamW(
        weights,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=settings.weight_decay,
    )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, settings.warm_up))
        return warm * (1 - step / settings.steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _stream(prompts: Sequence[Rendered], settings: DistillationSettings) -> Iterator[Batch]:
    """Batches in an order that the seed decides, as many as there are steps."""
    random, left = Random(settings.seed), settings.steps
    while left:
        shuffled = random.sample(prompts, len(prompts))
        size = settings.batch_size * _POOL
        for start in range(0, len(shuffled), size):
            found = list(batches(shuffled[start : start + size], size=settings.batch_size))
            random.shuffle(found)
            yield from found[:left]
            left -= min(left, len(found))


def _has_stalled(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` looks brought nothing."""
    seen = list(losses.values())
    return len(seen) > patience and min(seen[-patience:]) >= min(seen[:-patience])


def _copies(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


@torch.no_grad()
def _restore(weights: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for weight, copy in zip(weights, kept, strict=True):
        weight.copy_(copy)
