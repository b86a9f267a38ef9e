"""The merge itself: experts of one base into a backbone, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .checkpoint import MODEL_DTYPES, all_finite
from .checkpoint_writer import checkpoint_writer
from .delta import LowRank
from .errors import CheckpointError
from .experts import Base, Expert, LoraExpert
from .kinds import Kind, Parameter
from .merging.depth import l1_of_sum, lines_alpha, lines_factor
from .merging.elementwise import linear
from .merging.methods import Method, find_method
from .merging.stack import Block, Context, Merged, Stack, rows_per_block
from .recipe import Recipe
from .truncation import on, truncated

CACHED_BYTES = 160_000_000
"""Deltas of one parameter up to this size are kept while a method reads them several times."""


class Statistics(Protocol):
    """What experts do on calibration prompts, asked for in the order in which parameters are
    merged: outside the blocks first, then block by block.
    """

    def moments(self, layer: str) -> Sequence[Tensor]:
        """Mean of x xᵀ over each expert's inputs of a linear layer, [i, i] each."""

    def fishers(self, parameter: str) -> Sequence[Tensor]:
        """Each expert's Fisher diagonal of a parameter, in its shape."""

    def merged(self, parameter: str, weight: Tensor) -> None:
        """Be told of a parameter of the backbone, once it is merged."""


@dataclass(frozen=True)
class Merger:
    """Merges the parameters of experts as a recipe says.

    statistics: for methods that look at data. device: where blocks are computed.
    """

    base: Base
    experts: Sequence[Expert]
    recipe: Recipe
    statistics: Statistics | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _factored: dict[str, LowRank] = field(default_factory=dict, init=False, repr=False)

    @property
    def method(self) -> Method:
        """The recipe's merge method."""
        return find_method(self.recipe.backbone.method)

    @property
    def is_factored(self) -> bool:
        """Whether the merged change of linear layers comes in factors all along: the experts are
        LoRAs, and the method keeps them low-rank.
        """
        keeps_rank = self.method.space == "spectral" or self.method.factored is not None
        return keeps_rank and all(isinstance(expert, LoraExpert) for expert in self.experts)

    @property
    def names(self) -> list[str]:
        """The base's parameters in the order in which they are merged."""
        depths = {name: p.depth for name, p in self.base.parameters.items()}
        return sorted(depths, key=lambda name: -1.0 if (d := depths[name]) is None else d)

    def write_backbone(self, folder: Path, *, on_parameter: Callable[[], None]) -> None:
        """Write the backbone's tensors: the base plus the merged change, or the base alone where
        the recipe keeps the change beside it.

        on_parameter: called after each parameter.

        Raises:
            CheckpointError: no room on the disk, or NaN or inf in an expert or the result.
        """
        stored = self.base.checkpoint.tensors
        tensors = {name: (stored[name].shape, self.dtype_of(name)) for name in self.names}
        with checkpoint_writer(folder, tensors) as writer:
            for name in tensors:
                rows = self.backbone_rows(name)
                writer.write(name, self._told(name, rows))
                on_parameter()

    def shared_deltas(self) -> dict[str, LowRank]:
        """The merged change of every linear layer in factors, by layer; see `is_factored`."""
        factors = self._depth_factors
        return {
            parameter.layer: on(self._low_rank(parameter).scaled(factors.get(name, 1.0)), "cpu")
            for name, parameter in self.base.parameters.items()
            if parameter.kind is Kind.LINEAR and self._is_merged(name)
        }

    def change(self, name: str) -> Merged | None:
        """The merged change of one parameter, in blocks of stored rows; None: there is none."""
        parameter = self.base.parameters[name]
        if not self._is_merged(name):
            return None
        if parameter.kind is Kind.LINEAR and (self.is_factored or self.method.space == "spectral"):
            if self.method.dense is not None and not self.is_factored:
                dense = self._dense(parameter)
                return iter(torch.split(dense, rows_per_block(dense.shape[1])))
            return self._rows_of(name, self._low_rank(parameter))
        stack = self.stack(name)
        if self.method.space == "spectral":
            return linear(stack)
        merged: Merged = self.method.function(stack, **self._parameters(name))
        return merged

    def stack(self, name: str) -> Stack:
        """Every expert's delta of a parameter, read block by block."""
        info = self.base.checkpoint.tensors[name]
        rows = rows_per_block(info.columns)
        weights = torch.tensor([e.weight for e in self.recipe.experts], device=self.device)

        def read() -> Iterator[Block]:
            for index, start in enumerate(range(0, info.rows, rows)):
                yield self._block(name, start, min(start + rows, info.rows), weights, index)

        parameter = self.base.parameters[name]
        context = Context(
            name=name,
            experts=tuple(expert.name for expert in self.experts),
            seed=self.recipe.seed,
            depth=parameter.depth,
            is_transposed=parameter.is_transposed or parameter.kind is Kind.EMBEDDING,
        )
        size = 4 * len(self.experts) * info.rows * info.columns
        if size <= CACHED_BYTES:
            return Stack(_once(read), len(self.experts), context)
        return Stack(read, len(self.experts), context)

    def _block(self, name: str, start: int, stop: int, weights: Tensor, index: int) -> Block:
        base = self._base_rows(name, start, stop)
        x = base.new_empty(len(self.experts), *base.shape)
        for row, expert in zip(x, self.experts, strict=True):
            row.copy_(expert.delta_rows(name, start, stop, base))
        return Block(x, weights.view(-1, 1, 1), base, index)

    def _base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base in float32, where blocks are computed."""
        return self._stored_rows(name, start, stop).to(self.device, torch.float32)

    def _stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base as they are stored.

        Raises:
            CheckpointError: NaN or inf.
        """
        rows = self.base.checkpoint.read_rows(name, start, stop)
        if rows.is_floating_point() and not all_finite(rows):
            raise CheckpointError(
                f"the base {self.base.path} holds NaN or inf in {name!r}: fetch it again"
            )
        return rows

    def _is_merged(self, name: str) -> bool:
        parameter = self.base.parameters[name]
        kinds = self.recipe.kinds
        dropped = {
            Kind.EMBEDDING: kinds.embedding,
            Kind.HEAD: kinds.head,
            Kind.NORM: kinds.norm,
            Kind.BIAS: kinds.bias,
        }
        return (
            self.method.space != "none"
            and parameter.kind is not Kind.BUFFER
            and dropped.get(parameter.kind) != "drop"
            and self.base.checkpoint.tensors[name].dtype.is_floating_point
            and any(expert.changes(name) for expert in self.experts)
        )

    def _low_rank(self, parameter: Parameter) -> LowRank:
        """The merged change of a linear layer in factors; kept when they are small."""
        if parameter.layer in self._factored:
            return self._factored[parameter.layer]
        function = self.method.factored or self.method.function
        deltas = [self._factors(expert, parameter) for expert in self.experts]
        weights = [entry.weight for entry in self.recipe.experts]
        merged: LowRank = function(deltas, weights=weights, **self._parameters(parameter.name))
        if self.is_factored:
            self._factored[parameter.layer] = merged
        return merged

    def _factors(self, expert: Expert, parameter: Parameter) -> LowRank:
        """An expert's delta of a linear layer in factors, exact; [out, in] also where the weight
        is stored transposed.
        """
        if not isinstance(expert, LoraExpert):
            dense = self._delta(expert, parameter)
            return truncated(dense, rank=min(dense.shape))
        info = self.base.checkpoint.tensors[parameter.name]
        columns, rows = info.shape if parameter.is_transposed else info.shape[::-1]
        empty = LowRank(torch.zeros(rows, 0), torch.zeros(0, columns))
        return on(expert.factors(parameter.name) or empty, self.device)

    def _delta(self, expert: Expert, parameter: Parameter) -> Tensor:
        """An expert's delta of a linear layer, [out, in] also where it is stored transposed."""
        info = self.base.checkpoint.tensors[parameter.name]
        base = self._base_rows(parameter.name, 0, info.rows)
        dense = expert.delta_rows(parameter.name, 0, info.rows, base)
        return dense.T if parameter.is_transposed else dense

    def _dense(self, parameter: Parameter) -> Tensor:
        """The merged change of a linear layer as stored, by a method's dense form."""
        assert self.method.dense is not None
        deltas = [self._delta(expert, parameter) for expert in self.experts]
        weights = [entry.weight for entry in self.recipe.experts]
        merged: Tensor = self.method.dense(
            deltas, weights=weights, **self._parameters(parameter.name)
        )
        return merged.T if parameter.is_transposed else merged

    def _parameters(self, name: str) -> dict[str, Any]:
        """What the method's function takes for one parameter."""
        taken = signature(self.method.function).parameters
        extra: dict[str, Any] = {}
        if "seed" in taken:
            extra["seed"] = self.recipe.seed
        if self.method.needs is not None:
            assert self.statistics is not None
            layer = self.base.parameters[name].layer
            if self.method.needs == "fishers":
                extra["diagonals"] = self.statistics.fishers(name)
            else:
                extra["grams"] = self.statistics.moments(layer)
        return {**self.recipe.backbone.parameters, **extra}

    def _rows_of(self, name: str, delta: LowRank) -> Merged:
        """A change in factors as blocks of stored rows."""
        info = self.base.checkpoint.tensors[name]
        left, right = delta.left.to(self.device), delta.right.to(self.device)
        if self.base.parameters[name].is_transposed:
            left, right = right.T, left.T
        rows = rows_per_block(info.columns)
        return (left[start : start + rows] @ right for start in range(0, info.rows, rows))

    def backbone_rows(self, name: str) -> Iterator[Tensor]:
        """The backbone's rows of a parameter: as they are stored where nothing changes."""
        info = self.base.checkpoint.tensors[name]
        rows = rows_per_block(info.columns)
        starts = range(0, info.rows, rows)
        change = None if self._is_beside(name) else self.change(name)
        if change is None:
            yield from (self._stored_rows(name, start, start + rows) for start in starts)
            return
        factor = self._depth_factors.get(name, 1.0)
        for start, delta in zip(starts, change, strict=True):
            yield delta.mul(factor).add_(self._base_rows(name, start, start + rows).to(delta))

    def _is_beside(self, name: str) -> bool:
        """Whether the change of a parameter is kept in the shared module."""
        return self.recipe.shared == "module" and self.base.parameters[name].kind is Kind.LINEAR

    def _told(self, name: str, rows: Iterator[Tensor]) -> Iterator[Tensor]:
        """The rows; the statistics are told of the whole parameter once it went by."""
        if self.statistics is None:
            yield from rows
            return
        kept = []
        for block in rows:
            kept.append(block.cpu())
            yield block
        shape = self.base.checkpoint.tensors[name].shape
        self.statistics.merged(name, torch.cat(kept).reshape(shape))

    def dtype_of(self, name: str) -> torch.dtype:
        """What a parameter of the backbone is stored in."""
        stored = self.base.checkpoint.tensors[name].dtype
        if self.recipe.dtype is None or not stored.is_floating_point:
            return stored
        return MODEL_DTYPES[self.recipe.dtype]

    @cached_property
    def _depth_factors(self) -> Mapping[str, float]:
        """What the merged change of each parameter is scaled by."""
        lines = self.recipe.backbone.lines
        if lines is None:
            return {}
        alpha = self._alpha() if lines.alpha is None else lines.alpha
        return {
            name: lines_factor(parameter.depth, alpha=alpha, beta=lines.beta)
            for name, parameter in self.base.parameters.items()
        }

    def _alpha(self) -> float:
        """LiNeS' scale at depth 0, from the norms of the sum and of the merge, in a pass apart."""
        summed = merged = 0.0
        for name in filter(self._is_merged, self.names):
            summed += l1_of_sum(self.stack(name))
            change = self.change(name)
            assert change is not None
            merged += sum(float(block.abs().sum()) for block in change)
        return lines_alpha(summed, merged, experts=len(self.experts))


def _once(read: Callable[[], Iterator[Block]]) -> Callable[[], Iterator[Block]]:
    """The same blocks, read the first time they are asked for."""
    kept: list[Block] = []

    def again() -> Iterator[Block]:
        if not kept:
            kept.extend(read())
        return iter(kept)

    return again
