"""Distillation on a tiny mixture of experts: the loss falls, and training ends where it stays."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from mergeroute.adapters.errors import DataError
from mergeroute.runtime.distillation import DistillationSettings, distil
from mergeroute.runtime.rendering import Rendered


def teacher_model() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def damaged(teacher: Any, *, scale: float = 0.3) -> Any:
    """A copy whose experts alone are changed, and alone are trained."""
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("experts" in name)
            if "experts" in name:
                parameter.add_(torch.randn_like(parameter) * scale * parameter.std())
    return student


def prompts(count: int, *, seed: int, answered: bool = True) -> list[Rendered]:
    """Random tokens of several lengths, the last third an answer."""
    random = Random(seed)
    found = []
    for _ in range(count):
        length = random.randint(6, 18)
        ids = tuple(random.randrange(1, 40) for _ in range(length))
        found.append(Rendered(ids, 2 * length // 3 if answered else length))
    return found


SETTINGS = DistillationSettings(
    steps=30, learning_rate=3e-3, batch_size=8, kl=5.0, warm_up=4, every=10
)


def taught(teacher: Any, count: int, *, seed: int) -> list[Rendered]:
    """Prompts with what the teacher itself goes on with as their answers."""
    found = []
    for prompt in prompts(count, seed=seed):
        start = torch.tensor([prompt.token_ids[: prompt.prompt_length]])
        whole = teacher.generate(start, max_new_tokens=4, do_sample=False, pad_token_id=0)
        found.append(Rendered(tuple(whole[0].tolist()), prompt.prompt_length))
    return found


def test_the_loss_on_held_out_prompts_falls() -> None:
    teacher = teacher_model()
    student = damaged(teacher)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    told = []
    found = distil(
        student,
        teacher,
        taught(teacher, 24, seed=2),
        held_out=taught(teacher, 8, seed=3),
        settings=SETTINGS,
        on_step=lambda: told.append(1),
    )
    assert found.losses[found.best] < 0.85 * found.losses[0]
    assert len(told) == found.steps
    assert not student.training
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "experts" in n}


def test_the_weights_are_those_of_the_lowest_loss_and_training_ends_early() -> None:
    """What diverges leaves everything as it was."""
    teacher = teacher_model()
    student = damaged(teacher)
    before = [p.detach().clone() for p in student.parameters()]
    settings = DistillationSettings(
        steps=500, learning_rate=50.0, batch_size=8, warm_up=1, every=2, patience=3
    )
    found = distil(
        student,
        teacher,
        taught(teacher, 8, seed=2),
        held_out=taught(teacher, 4, seed=3),
        settings=settings,
    )
    assert (found.best, found.steps) == (0, 6)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.mark.parametrize("answered", [True, False])
def test_the_loss_is_the_papers_with_its_temperature_squared(answered: bool) -> None:
    """Against sums over single prompts, without padding; without an answer, every token counts."""
    teacher = teacher_model()
    student = damaged(teacher)
    held_out = prompts(9, seed=4, answered=answered)
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for prompt in held_out:
            ids = torch.tensor([prompt.token_ids])
            first = prompt.prompt_length if answered else 1
            own, wanted = (m(ids).logits[0, first - 1 : -1] for m in (student, teacher))
            p, q = (wanted / 2).softmax(-1), (own / 2).softmax(-1)
            total = total + cross_entropy(own, ids[0, first:], reduction="sum")
            total = total + 0.2 * 4 * (p * (p / q).log()).sum()
            count += len(own)
    settings = DistillationSettings(steps=1, learning_rate=0.0, batch_size=4)
    found = distil(student, teacher, held_out, held_out=held_out, settings=settings)
    assert found.losses[0] == pytest.approx(float(total / count), rel=1e-4)


def test_the_seed_decides_the_result() -> None:
    teacher = teacher_model()
    losses = []
    for seed in (0, 0, 1):
        settings = DistillationSettings(steps=3, batch_size=4, every=3, seed=seed)
        student = damaged(teacher)
        found = distil(
            student, teacher, prompts(20, seed=2), held_out=prompts(8, seed=3), settings=settings
        )
        losses.append(found.losses)
    assert losses[0] == losses[1] != losses[2]


def test_the_student_is_moved_to_no_other_device() -> None:
    """accelerate's own choice is the first GPU, whichever one was asked for."""
    teacher = teacher_model()
    student, moves = damaged(teacher), []

    def noted(*arguments: object, **_options: object) -> Any:
        moves.append(arguments)
        return student

    student.to = noted
    some = prompts(4, seed=2)
    distil(student, teacher, some, held_out=some, settings=DistillationSettings(steps=1))
    assert not moves


def test_prompts_are_needed_on_both_sides() -> None:
    teacher = teacher_model()
    some = prompts(4, seed=2)
    for train, held_out in ((some, []), ([], some)):
        with pytest.raises(DataError, match="prompts held out"):
            distil(damaged(teacher), teacher, train, held_out=held_out)


def test_prompts_of_one_token_teach_nothing() -> None:
    teacher, alone = teacher_model(), [Rendered((3,), 1)]
    student = damaged(teacher)
    settings = DistillationSettings(steps=1, batch_size=1, weight_decay=0.0, every=1)
    assert distil(student, teacher, alone, held_out=alone, settings=settings).losses == {0: 0, 1: 0}
    assert all(weight.isfinite().all() for weight in student.parameters())
