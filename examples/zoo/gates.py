"""PHATGOOSE gates of the zoo's experts: per module and linear layer a vector that knows its tokens.

Source: Muqeeth et al. 2024, PHATGOOSE, arXiv:2402.05859, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module

from .model import load_model, load_tokenizer
from .tasks import Example
from .train import answer_loss, collate, has_fast_bfloat16

WARM_UP_SHARE = 0.06


@dataclass(frozen=True)
class GateSchedule:
    """How gates are trained; the defaults are the paper's, whose batch is 1,024."""

    steps: int = 100
    learning_rate: float = 5e-3
    batch_size: int = 16


class GatedLinear(nn.Module):
    """A frozen linear layer, and a frozen change of it times sigmoid(v·x): only v is trained."""

    def __init__(self, base: nn.Module, delta: LowRank) -> None:
        super().__init__()
        self.base, self.delta = base, delta
        self.gate = nn.Parameter(torch.zeros(delta.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] to [..., o]."""
        y: Tensor = self.base(x)
        return y + torch.sigmoid(x @ self.gate)[..., None] * self.delta.apply(x)


def train_gates(
    base: Path,
    lora: Path,
    examples: Sequence[Example],
    *,
    schedule: GateSchedule = GateSchedule(),
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Train the gates of one LoRA on its own examples; base and LoRA stay as they are.

    Returns a vector [i] by layer, for `Module.gates`.
    """
    model, tokenizer = load_model(base), load_tokenizer(base)
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    gates = _install(model, Module.load(lora, name=lora.name, layers=linear_layers(model)))
    optimizer = torch.optim.AdamW(gates.values(), lr=schedule.learning_rate, weight_decay=0.0)
    random = Random(f"gates {lora.name}")
    for step in range(schedule.steps):
        warm_up = min(1.0, (step + 1) / max(1.0, WARM_UP_SHARE * schedule.steps))
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * warm_up
        optimizer.zero_grad()
        batch = collate(random.choices(examples, k=schedule.batch_size), tokenizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step()
    return {layer: gate.detach().clone() for layer, gate in gates.items()}


def _install(model: LlamaForCausalLM, module: Module) -> dict[str, nn.Parameter]:
    """Put gated layers where the module changes the model; their gates by layer."""
    gates = {}
    for name, delta in module.deltas.items():
        parent, _, leaf = name.rpartition(".")
        layer = GatedLinear(model.get_submodule(name), delta)
        setattr(model.get_submodule(parent), leaf, layer)
        gates[name] = layer.gate
    return gates
