"""What the engine is compared with: PEFT's mixed batch, and merging weights per request."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module

Outputs = list[list[int]]


@dataclass(frozen=True)
class Work:
    """One request. pair and dense: blends of two modules and of all."""

    prompt: tuple[int, ...]
    limit: int
    pair: Blend
    dense: Blend


def run_peft(workload: Sequence[Work], *, model: Any) -> Outputs:
    """One left-padded batch; what a row generates past its limit is of no use."""
    width = max(len(work.prompt) for work in workload)
    ids = torch.tensor([[0] * (width - len(w.prompt)) + list(w.prompt) for w in workload])
    out = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=max(work.limit for work in workload),
        do_sample=False,
        adapter_names=[max(work.pair, key=work.pair.__getitem__) for work in workload],
    )
    return [
        row[width : width + work.limit].tolist() for row, work in zip(out, workload, strict=True)
    ]


@torch.no_grad()
def run_merged(
    workload: Sequence[Work],
    *,
    model: Any,
    modules: Mapping[str, Module],
    originals: Mapping[str, torch.Tensor],
) -> Outputs:
    """Merge, generate, restore, for one request after the other."""
    weights = {layer: model.get_submodule(layer).weight for layer in originals}
    outputs = []
    for work in workload:
        for name, share in work.pair.items():
            for layer, delta in modules[name].deltas.items():
                weights[layer].addmm_(delta.left, delta.right, alpha=share)
        ids = torch.tensor([work.prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=work.limit, do_sample=False)
        outputs.append(out[0, len(work.prompt) :].tolist())
        for layer, original in originals.items():
            weights[layer].copy_(original)
    return outputs


def with_peft(model: Any, modules: Mapping[str, Module]) -> Any:
    """The model with every module as a PEFT adapter."""
    with tempfile.TemporaryDirectory() as folder:
        for name, module in modules.items():
            module.save(Path(folder, name))
        first, *others = modules
        wrapped = peft.PeftModel.from_pretrained(model, Path(folder, first), adapter_name=first)
        for name in others:
            wrapped.load_adapter(Path(folder, name), adapter_name=name)
    return wrapped.eval()
