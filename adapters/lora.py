"""Module: a named set of deltas and vectors, from and to a PEFT LoRA folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .delta import LowRank
from .digest import tensors_digest
from .errors import ModuleError
from .module_check import check_gate, check_kind, check_layer, check_vector
from .module_files import CONFIG_FILE as CONFIG_FILE
from .module_files import WEIGHTS_FILE as WEIGHTS_FILE
from .module_files import (
    Statements,
    read_factors,
    read_gates,
    read_vectors,
    write_factors,
    write_gates,
    write_vectors,
)
from .peft_config import fold, read_config, ties_head
from .shapes import Shapes


class Standing(Protocol):
    """What a module can stand on: a backbone, or the base of a build."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def weights_digest(self) -> str:
        """Digest of its weights."""


@dataclass(frozen=True)
class Coverage:
    """What loading a module found.

    layers_matched of layers_total: inner linear layers that the module changes.
    ranks: smallest and largest rank. nbytes: bytes of factors and vectors in float32.
    effect: Frobenius norm of all its changes together.
    outer: embeddings and head that it changes. vectors: how many vectors it changes.
    """

    layers_matched: int
    layers_total: int
    ranks: tuple[int, int]
    nbytes: int
    effect: float
    outer: tuple[str, ...] = ()
    vectors: int = 0

    def __str__(self) -> str:
        low, high = self.ranks
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        outer = f" and {', '.join(self.outer)}" if self.outer else ""
        vectors = f", {self.vectors} vectors" if self.vectors else ""
        return (
            f"{self.layers_matched} of {self.layers_total} layers{outer}, {rank}{vectors}, "
            f"{self.nbytes / 1e6:.2f} MB in float32, effect {self.effect:.3g}"
        )


@dataclass(frozen=True, eq=False)
class Module:
    """The exclusive knowledge of one task, float32, scales folded in.

    deltas: changes of matrices by layer name: inner linear layers [o, i], an embedding [V, d] and
    the head [V, d].
    vectors: changes of norm weights, norm biases and linear biases, by parameter name.
    embeddings: which of the deltas change an embedding.
    ties_head: where embedding and head share one weight, the embedding's delta counts for both;
    False leaves the head as it is, which is what PEFT trains unless told otherwise.
    backbones: digests of the weights that it was made to stand on, any of them; empty: unknown.
    gates: vectors [i] by linear layer that it changes, trained to tell its tokens: by them alone
    PHATGOOSE routes (arXiv:2402.05859).
    """

    name: str
    deltas: Mapping[str, LowRank]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    ties_head: bool = True
    backbones: tuple[str, ...] = ()
    gates: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Content digest of names, factors, vectors and gates; neither the module's name nor what
        it stands on is part of it.
        """
        return tensors_digest(self._content())

    @property
    def rank(self) -> int:
        """The largest rank over its layers."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    @classmethod
    def load(
        cls, folder: Path, *, name: str, layers: Shapes | Mapping[str, tuple[int, int]]
    ) -> Module:
        """Read a module folder for a backbone.

        layers: the backbone's shapes; a plain mapping states its inner linear layers alone.

        Raises:
            ModuleError: the folder is incomplete or damaged, uses what cannot be blended, has
                tensors that fit no layer, holds NaN or inf, or would change nothing.
        """
        module = cls.read(folder, name=name)
        module.check(layers)
        return module

    @classmethod
    def read(cls, folder: Path, *, name: str) -> Module:
        """Read a module folder, PEFT's or ours, without a backbone to check it against.

        Raises:
            ModuleError: the folder is incomplete or damaged, or uses what cannot be blended.
        """
        config = read_config(folder)
        factors, vectors = read_factors(folder), read_vectors(folder)
        if not factors.pairs and not vectors:
            raise ModuleError(f"{folder} holds no tensors: the module would change nothing")
        embeddings = frozenset(factors.embeddings)
        deltas = {
            layer: fold(layer, pair, is_table=layer in embeddings, config=config, folder=folder)
            for layer, pair in factors.pairs.items()
        }
        said = factors.stated
        ties = ties_head(config) if said.ties_head is None else said.ties_head
        ties = ties if embeddings else True
        gates = read_gates(folder)
        return cls(name, deltas, vectors, embeddings, ties, said.backbones, gates)

    def check(self, layers: Shapes | Mapping[str, tuple[int, int]]) -> None:
        """Refuse a module that does not fit the layers or would do nothing.

        Raises:
            ModuleError: it names the layer and what to do.
        """
        shapes = layers if isinstance(layers, Shapes) else Shapes(linear=layers)
        for layer, delta in self.deltas.items():
            check_layer(self.name, layer, delta, shapes)
            check_kind(self.name, layer, shapes, is_embedding=layer in self.embeddings)
        for name, vector in self.vectors.items():
            check_vector(self.name, name, vector, shapes)
        for layer, gate in self.gates.items():
            is_inner = layer in shapes.linear and layer not in self.embeddings
            check_gate(self.name, layer, gate, self.deltas.get(layer) if is_inner else None)
        self.resolved(shapes)
        changes = (*(d.norm() for d in self.deltas.values()), *map(_norm, self.vectors.values()))
        if not any(change > 0 for change in changes):
            raise ModuleError(
                f"module {self.name!r} changes nothing: every delta is zero. "
                "Was it saved before training, or is it the wrong folder?"
            )

    def check_backbone(self, backbone: Standing) -> None:
        """Refuse to stand on other weights than those it was made for, where it says which.

        Raises:
            ModuleError: it names both.
        """
        if self.backbones and backbone.weights_digest not in self.backbones:
            raise ModuleError(
                f"module {self.name!r} was made for weights {' or '.join(self.backbones)}, those "
                f"of {backbone.path} are {backbone.weights_digest}: another base, or an edited "
                "one; use it on the backbone it was made for"
            )

    def resolved(self, shapes: Shapes) -> dict[str, LowRank]:
        """The delta of every matrix of a model: the embedding's stands for a tied head too.

        Raises:
            ModuleError: a tied head has another delta than its embedding.
        """
        deltas = dict(self.deltas)
        if shapes.tied is None or not self.ties_head or shapes.tied[0] not in deltas:
            return deltas
        embedding, head = shapes.tied
        given = deltas.setdefault(head, deltas[embedding])
        if not given.equals(deltas[embedding]):
            raise ModuleError(
                f"module {self.name!r} changes {embedding!r} and {head!r}, which share one weight, "
                "in two ways: give both the same factors and alpha, or leave one out"
            )
        return deltas

    def coverage(self, layers: Shapes | Mapping[str, tuple[int, int]]) -> Coverage:
        """What of a backbone's layers the module changes, and by how much."""
        shapes = layers if isinstance(layers, Shapes) else Shapes(linear=layers)
        ranks = [delta.rank for delta in self.deltas.values()] or [0]
        outer = sorted(self.embeddings | (self.deltas.keys() & shapes.head.keys()))
        sizes = [*(d.nbytes for d in self.deltas.values()), *(v.nbytes for v in self._vectors())]
        norms = [*(d.norm() for d in self.deltas.values()), *map(_norm, self._vectors())]
        return Coverage(
            layers_matched=len(self.deltas) - len(outer),
            layers_total=len(shapes.linear.keys() - self.embeddings),
            ranks=(min(ranks), max(ranks)),
            nbytes=sum(sizes),
            effect=math.hypot(*norms),
            outer=tuple(outer),
            vectors=len(self.vectors),
        )

    def save(self, folder: Path, *, base: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Write a module folder: scales stay folded in, so alpha equals the rank.

        Floats make a plain PEFT LoRA folder; int8 a smaller one that only we read, with one scale
        per component. Vectors and gates, which PEFT has no place for, lie beside in float32.

        base: `base_model_name_or_path` for the readers that want one.

        Raises:
            ModuleError: no such dtype.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stated = Statements(self.ties_head if self.embeddings else None, self.backbones)
        write_factors(folder, self._named_factors(), dtype=dtype, stated=stated)
        write_vectors(folder, self.vectors)
        write_gates(folder, self.gates)
        text = json.dumps(self._peft_config(base), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n")

    def _vectors(self) -> list[Tensor]:
        return [self.vectors[name] for name in sorted(self.vectors)]

    def _content(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._named_factors()
        for name in sorted(self.vectors):
            yield name, self.vectors[name]
        if self.embeddings and not self.ties_head:
            yield "embedding alone", torch.zeros(0)
        for layer in sorted(self.gates):
            yield f"{layer}.gate", self.gates[layer]

    def _named_factors(self) -> Iterator[tuple[str, Tensor]]:
        for layer in sorted(self.deltas):
            left, right = self.deltas[layer].left, self.deltas[layer].right
            if layer in self.embeddings:
                yield f"{layer}.lora_embedding_A", left.T
                yield f"{layer}.lora_embedding_B", right.T
            else:
                yield f"{layer}.lora_A", right
                yield f"{layer}.lora_B", left

    def _peft_config(self, base: str) -> dict[str, Any]:
        other_ranks = {
            re.escape(layer): delta.rank
            for layer, delta in self.deltas.items()
            if delta.rank != self.rank
        }
        rank = max(1, self.rank)  # PEFT takes no zero, which vectors alone would have
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": other_ranks,
            "alpha_pattern": other_ranks,
            "target_modules": sorted(self.deltas),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            **({"ensure_weight_tying": self.ties_head} if self.embeddings else {}),
        }


def _norm(vector: Tensor) -> float:
    return float(vector.double().norm())
