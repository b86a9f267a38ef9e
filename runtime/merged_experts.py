"""MergedExperts: experts that share centres, each with its own residual, in a transformers model.

An expert is its group's centre plus its residual. What the experts of a token have in common is
computed once: one product with a centre's gate_up for each of its groups, and one with that
centre's down matrix, as what goes into it may be summed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.delta import LowRank
from ..adapters.errors import CheckpointError
from ..adapters.smoe.layout import ExpertWeights
from ..adapters.smoe.residuals import Residual
from ..adapters.smoe.router import group_gates, group_logits
from ..adapters.smoe.stored import StoredLayer, read_layers, read_report
from .blended import add_gated
from .blending import Segment
from .sparse_blocks import activated, sparse_blocks


class StackedResiduals(nn.Module):
    """What one matrix of all experts has beside its centre, stacked as resident modules are: an
    expert's components are a slice of a [R, i] and b [R, o], its whole rows one of values [N, i].

    ranks, counts: how many components and whole rows each expert has.
    """

    rows: Tensor

    def __init__(self, residuals: Sequence[Residual]) -> None:
        super().__init__()
        self.ranks = [own.low_rank.rank for own in residuals]
        self.counts = [len(own.rows) for own in residuals]
        self.a = nn.Parameter(torch.cat([own.low_rank.right for own in residuals]))
        self.b = nn.Parameter(torch.cat([own.low_rank.left.T for own in residuals]))
        self.values = nn.Parameter(torch.cat([own.values for own in residuals]))
        self.register_buffer("rows", torch.cat([own.rows for own in residuals]), persistent=False)

    def add_to(self, y: Tensor, x: Tensor, runs: Sequence[Run], gates: Tensor) -> None:
        """Add to y [p, o] what experts make of x [p, i]. gates: [p, 1]. runs: of all rows."""
        ranks, places = _slices(self.ranks), _slices(self.counts)
        segments = [Segment(run.start, run.stop, (ranks[run.expert],)) for run in runs]
        add_gated(y, x, (self.a, self.b), segments, gates.expand(-1, len(self.a)))
        for run in runs:
            low, high = places[run.expert]
            if low < high:
                own = slice(run.start, run.stop)
                added = F.linear(x[own], self.values[low:high]) * gates[own]
                y[own].index_add_(1, self.rows[low:high], added.to(y.dtype))

    def split(self) -> list[Residual]:
        """Each expert's, float32."""
        parts = zip(
            *(torch.split(each.float(), self.ranks) for each in (self.a, self.b)),
            *(torch.split(each, self.counts) for each in (self.rows, self.values.float())),
            strict=True,
        )
        return [Residual(LowRank(b.T, a), rows, values) for a, b, rows, values in parts]


class ExpertResiduals(nn.Module):
    """What the experts of one layer have beside their centres."""

    def __init__(self, gate_up: Sequence[Residual], down: Sequence[Residual]) -> None:
        super().__init__()
        self.gate_up = StackedResiduals(gate_up)
        self.down = StackedResiduals(down)


@dataclass(frozen=True)
class Run:
    """Rows of one expert, side by side."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Choices:
    """Which token goes to which expert, sorted by group, then by expert. tokens, experts, groups,
    gates: [p].
    """

    tokens: Tensor
    experts: Tensor
    groups: Tensor
    gates: Tensor

    @staticmethod
    def sorted(choice: Tensor, gates: Tensor, groups: Tensor) -> Choices:
        """Those with a gate above 0. choice, gates: [t, k]. groups: [E], each expert's."""
        tokens, places = torch.nonzero(gates > 0, as_tuple=True)
        experts = choice[tokens, places]
        of = groups[experts]
        order = torch.argsort(of * len(groups) + experts, stable=True)
        found = (tokens, experts, of, gates[tokens, places])
        return Choices(*(each[order] for each in found))

    def by_group(self) -> Iterator[tuple[int, Choices]]:
        """The groups that are chosen, each with its part."""
        found, counts = torch.unique_consecutive(self.groups, return_counts=True)
        for group, (low, high) in zip(found.tolist(), _slices(counts.tolist()), strict=True):
            fields = (self.tokens, self.experts, self.groups, self.gates)
            yield group, Choices(*(each[low:high] for each in fields))

    def runs(self) -> list[Run]:
        """The rows of each expert."""
        found, counts = torch.unique_consecutive(self.experts, return_counts=True)
        spans = _slices(counts.tolist())
        return [Run(expert, *span) for expert, span in zip(found.tolist(), spans, strict=True)]


class MergedExperts(nn.Module):
    """The experts of one sparse layer, in the place of transformers' own.

    centres: [G], as parameters gate_up [G, p F, D] and down [G, D, F]. groups: [E], each expert's
    centre. residuals: of gate_up and of down, by expert; without them the experts of a group are
    one, and a token that chose several of them computes it once.
    """

    groups: Tensor

    def __init__(
        self,
        centres: ExpertWeights,
        groups: Tensor,
        residuals: tuple[list[Residual], list[Residual]] | None,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(centres.gate_up)
        self.down = nn.Parameter(centres.down)
        self.register_buffer("groups", groups, persistent=False)
        self.residuals = None if residuals is None else ExpertResiduals(*residuals)
        self.act_fn = act

    def forward(self, hidden: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
        """The gated sum of the chosen experts' outputs, [t, D].

        hidden: [t, D]. choice: [t, k], each one of E experts. gates: [t, k].
        """
        if self.residuals is None:
            _, gates = group_gates(choice, gates, self.groups)
        output = torch.zeros_like(hidden)
        for group, choices in Choices.sorted(choice, gates, self.groups).by_group():
            self._add_group(output, group, hidden, choices)
        return output

    def _add_group(self, output: Tensor, group: int, hidden: Tensor, choices: Choices) -> None:
        """Add to output [t, D] what the experts of one group make of the tokens that chose them."""
        tokens, places = torch.unique(choices.tokens, return_inverse=True)
        runs, gates = choices.runs(), choices.gates[:, None]
        inner = F.linear(hidden[tokens], self.gate_up[group])[places]  # once for all of a token's
        if self.residuals is not None:
            own = hidden[choices.tokens]
            self.residuals.gate_up.add_to(inner, own, runs, gates.new_ones(1, 1).expand_as(gates))
        inner = activated(inner, self.act_fn, width=self.down.shape[2])
        summed = inner.new_zeros(len(tokens), inner.shape[1])
        summed.index_add_(0, places, (inner * gates).to(inner.dtype))
        output.index_add_(0, tokens, F.linear(summed, self.down[group]))
        if self.residuals is not None:
            added = torch.zeros_like(hidden[choices.tokens])
            self.residuals.down.add_to(added, inner, runs, gates)
            output.index_add_(0, choices.tokens, added)


def _slices(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Where parts of these lengths begin and end."""
    ends = list(accumulate(counts))
    return list(zip([0, *ends], ends, strict=False))


class GroupRouter(nn.Module):
    """A router of groups: the probabilities of a group's members are summed, and a token is sent to
    the top-k groups.

    gate: the router in whose place it stands. groups: [E], each expert's group.
    """

    groups: Tensor

    def __init__(self, gate: Any, groups: Tensor, *, top_k: int) -> None:  # noqa: ANN401
        super().__init__()
        self.weight = gate.weight
        self.register_buffer("groups", groups, persistent=False)
        self.top_k = min(top_k, int(groups.max()) + 1)
        self._normalises = getattr(gate, "norm_topk_prob", True)  # Mixtral always does

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [t, G], gates [t, k] and chosen groups [t, k] of hidden states [..., D]."""
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        grouped = group_logits(logits.float(), self.groups)
        gates, chosen = grouped.softmax(-1).topk(self.top_k, dim=-1)
        if self._normalises:
            gates = gates / gates.sum(-1, keepdim=True)
        return grouped, gates, chosen


def install_merged_experts(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Put what a folder holds beside its plain checkpoint into the model of that: the original
    router, and its experts. Nothing where there is nothing beside it.

    Raises:
        CheckpointError: what is beside it is damaged, or does not fit the model.
    """
    report = read_report(folder)
    if report is None or report.router == "compact":
        return
    blocks = sparse_blocks(model)
    for name, layer in read_layers(folder, blocks):
        block = blocks[name]
        _check_fits(folder, name, block, layer, report.top_k)
        weight = block.gate.weight
        block.gate.weight = nn.Parameter(layer.router.to(weight))
        block.gate.top_k = report.top_k
        block.gate.num_experts = len(layer.router)
        if report.router == "groups":
            block.gate = GroupRouter(block.gate, layer.groups.to(weight.device), top_k=report.top_k)
            layer = replace(layer, groups=torch.arange(int(layer.groups.max()) + 1))
        block.experts = _merged(block.experts, layer)


def _merged(plain: Any, layer: StoredLayer) -> MergedExperts:  # noqa: ANN401
    """The centres of the plain checkpoint and those beside it, with residuals."""
    gate_up, down = plain.gate_up_proj.detach(), plain.down_proj.detach()
    if len(layer.extra):
        gate_up = torch.cat([gate_up, layer.extra.gate_up.to(gate_up)])
        down = torch.cat([down, layer.extra.down.to(down)])
    centres = ExpertWeights(gate_up, down)
    merged = MergedExperts(centres, layer.groups, layer.residuals, plain.act_fn)
    return merged.to(device=gate_up.device, dtype=gate_up.dtype)


def _check_fits(folder: Path, name: str, block: Any, layer: StoredLayer, top_k: int) -> None:  # noqa: ANN401
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    expected = {
        "router": (layer.router.shape[1:], gate_up.shape[2:]),
        "extra_gate_up": (layer.extra.gate_up.shape[1:], gate_up.shape[1:]),
        "extra_down": (layer.extra.down.shape[1:], down.shape[1:]),
    }
    for part, matrix, residuals in zip(
        ("gate_up", "down"), (gate_up, down), layer.residuals or (), strict=False
    ):
        shapes = {own.low_rank.shape for own in residuals} | {tuple(matrix.shape[1:])}
        expected[part] = (torch.Size(max(shapes)), torch.Size(min(shapes)))
    for part, (found, wanted) in expected.items():
        if found != wanted:
            raise CheckpointError(
                f"{folder} has {part} of {name} in shape {list(found)}, the model has "
                f"{list(wanted)}: its files are of different builds"
            )
    centres = len(gate_up) + len(layer.extra)
    if int(layer.groups.max()) >= centres or top_k > len(layer.router):
        raise CheckpointError(
            f"{folder} says of {name} group {int(layer.groups.max())} of {centres} and top_k "
            f"{top_k} of {len(layer.router)} experts: its files are of different builds"
        )
