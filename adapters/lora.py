"""Module: a named set of deltas, from and to a PEFT LoRA folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .delta import LowRank
from .digest import tensors_digest
from .errors import ModuleError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_PREFIX = "base_model.model."

_REFUSED = {
    "use_dora": "DoRA rescales whole weights; train with use_dora=False",
    "modules_to_save": "whole layers cannot be blended; train without modules_to_save",
    "alora_invocation_tokens": "aLoRA switches on in mid-prompt; train a plain LoRA",
    "lora_bias": "biases cannot be blended; train with lora_bias=False",
    "use_qalora": "QALoRA pools its inputs; train a plain LoRA",
    "use_bdlora": "block-diagonal factors are not read; train a plain LoRA",
    "trainable_token_indices": "embedding rows cannot be blended; train without them",
    "target_parameters": "fused parameters cannot be blended; target linear layers",
    "layer_replication": "replicated layers are not in the backbone; train without them",
    "megatron_config": "Megatron layers are not read; train with PEFT's own layers",
    "arrow_config": "Arrow is a router, not a module; save the experts one by one",
    "kasa_config": "KaSA changes the base weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA is not read; train a plain LoRA",
    "velora_config": "VeLoRA is not read; train a plain LoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Coverage:
    """What loading a module found.

    layers_matched of layers_total: linear layers that the module changes.
    ranks: smallest and largest rank. nbytes: bytes of the factors in float32.
    effect: Frobenius norm of all its deltas together.
    """

    layers_matched: int
    layers_total: int
    ranks: tuple[int, int]
    nbytes: int
    effect: float

    def __str__(self) -> str:
        low, high = self.ranks
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        return (
            f"{self.layers_matched} of {self.layers_total} layers, {rank}, "
            f"{self.nbytes / 1e6:.2f} MB in float32, effect {self.effect:.3g}"
        )


@dataclass(frozen=True, eq=False)
class Module:
    """The exclusive knowledge of one task: deltas by layer name, float32, scales folded in."""

    name: str
    deltas: Mapping[str, LowRank]

    @cached_property
    def digest(self) -> str:
        """Content digest of layer names and factors; the module's name is not part of it."""
        return tensors_digest(self._named_factors())

    @property
    def rank(self) -> int:
        """The largest rank over its layers."""
        return max(delta.rank for delta in self.deltas.values())

    @classmethod
    def load(cls, folder: Path, *, name: str, layers: Mapping[str, tuple[int, int]]) -> Module:
        """Read a PEFT LoRA folder for a backbone.

        layers: the backbone's linear layers, name to (out, in).

        Raises:
            ModuleError: the folder is incomplete or damaged, uses what cannot be blended, has
                tensors that fit no layer, holds NaN or inf, or would change nothing.
        """
        module = cls.read(folder, name=name)
        module.check(layers)
        return module

    @classmethod
    def read(cls, folder: Path, *, name: str) -> Module:
        """Read a PEFT LoRA folder without a backbone to check it against.

        Raises:
            ModuleError: the folder is incomplete or damaged, or uses what cannot be blended.
        """
        config = _read_config(folder)
        _refuse_config(config, folder)
        factors = _read_factors(folder / WEIGHTS_FILE)
        deltas = {
            layer: _fold(layer, pair, config=config, folder=folder)
            for layer, pair in factors.items()
        }
        return cls(name, deltas)

    def check(self, layers: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a module that does not fit the layers or would do nothing.

        Raises:
            ModuleError: it names the layer and what to do.
        """
        for layer, delta in self.deltas.items():
            _check_layer(self.name, layer, delta, layers)
        if not any(delta.norm() > 0 for delta in self.deltas.values()):
            raise ModuleError(
                f"module {self.name!r} changes nothing: every delta is zero. "
                "Was it saved before training, or is it the wrong folder?"
            )

    def coverage(self, layers: Mapping[str, tuple[int, int]]) -> Coverage:
        """What of a backbone's layers the module changes, and by how much."""
        ranks = [delta.rank for delta in self.deltas.values()]
        return Coverage(
            layers_matched=len(self.deltas),
            layers_total=len(layers),
            ranks=(min(ranks), max(ranks)),
            nbytes=sum(delta.nbytes for delta in self.deltas.values()),
            effect=math.sqrt(sum(delta.norm() ** 2 for delta in self.deltas.values())),
        )

    def save(self, folder: Path, *, base: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Write a plain PEFT LoRA folder: scales stay folded in, so alpha equals the rank.

        base: `base_model_name_or_path` for the readers that want one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors refuses tensors that share memory, as layers may.
        tensors = {
            f"{_PREFIX}{name}.weight": tensor.to(dtype, copy=True).contiguous()
            for name, tensor in self._named_factors()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(self._peft_config(base), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n")

    def _named_factors(self) -> Iterator[tuple[str, Tensor]]:
        for layer in sorted(self.deltas):
            yield f"{layer}.lora_A", self.deltas[layer].right
            yield f"{layer}.lora_B", self.deltas[layer].left

    def _peft_config(self, base: str) -> dict[str, Any]:
        other_ranks = {
            re.escape(layer): delta.rank
            for layer, delta in self.deltas.items()
            if delta.rank != self.rank
        }
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
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
        }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModuleError(f"{folder} holds no {CONFIG_FILE}: name a PEFT LoRA folder")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ModuleError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModuleError(f"{path} is no JSON object: it is no LoRA configuration")
    return config


def _refuse_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise ModuleError(
            f"{folder} is a {config['peft_type']} adapter, only LORA is served: convert it with "
            "peft.convert_to_lora"
        )
    if config.get("bias", "none") != "none":
        raise ModuleError(f"{folder} trained bias={config['bias']!r}: train with bias='none'")
    for key, remedy in _REFUSED.items():
        if config.get(key):
            raise ModuleError(f"{folder} sets {key}={config[key]!r}: {remedy}")
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.startswith(_CHANGES_BASE):
        raise ModuleError(
            f"{folder} was trained with init_lora_weights={initialisation!r}, which changes the "
            "base weights: save it again with path_initial_model_for_weight_conversion"
        )
    _check_numbers(config, folder / CONFIG_FILE)


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Refuse ranks and alphas from which no scale can be computed."""
    if not _is_rank(config.get("r")):
        raise ModuleError(f"{path} states 'r' {config.get('r')!r}: a whole number from 1 is needed")
    if not _is_number(config.get("lora_alpha", 8)):
        raise ModuleError(f"{path} states 'lora_alpha' {config['lora_alpha']!r}: give a number")
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
            raise ModuleError(
                f"{path} states {key!r} {pattern!r}: a number per layer name is needed"
            )
        try:
            get_pattern_key(list(pattern), "\n")  # no layer's name: compiles every pattern
        except re.error as error:
            raise ModuleError(f"{path}: {key!r} is no regular expression: {error}") from error


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_factors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Layer name to {"A": [r, i], "B": [o, r]}, float32."""
    if not path.is_file():
        pickled = (path.parent / "adapter_model.bin").is_file()
        remedy = "it holds a pickle, which is never opened: save it with safe_serialization=True"
        raise ModuleError(
            f"{path.parent} holds no {path.name}" + (f"; {remedy}" if pickled else "")
        )
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                match = _TENSOR.fullmatch(name)
                if match is None:
                    raise ModuleError(f"{path}: {_why_refused(name)}")
                sides = factors.setdefault(match["layer"], {})
                if match["side"] in sides:
                    raise ModuleError(f"{path} holds {name!r} twice, under two names: keep one")
                sides[match["side"]] = file.get_tensor(name).float()
    except (SafetensorError, OSError) as error:
        raise ModuleError(f"{path} is damaged or truncated: {error}") from error
    if not factors:
        raise ModuleError(f"{path} holds no tensors: the module would change nothing")
    return factors


def _why_refused(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return f"tensor {name!r} belongs to DoRA: train with use_dora=False"
    if "lora_embedding" in name:
        return f"tensor {name!r} changes the embedding: train without embedding layers"
    if name.endswith(".bias"):
        return f"tensor {name!r} is a bias: train with bias='none' and lora_bias=False"
    return (
        f"tensor {name!r} is no LoRA factor (…lora_A.weight or …lora_B.weight): "
        "train without modules_to_save"
    )


def _fold(
    layer: str, pair: Mapping[str, Tensor], *, config: Mapping[str, Any], folder: Path
) -> LowRank:
    if set(pair) != {"A", "B"}:
        missing = ({"A", "B"} - set(pair)).pop()
        raise ModuleError(f"{folder}: layer {layer!r} lacks lora_{missing}: the file is incomplete")
    right, left = pair["A"], pair["B"]
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ModuleError(
            f"{folder}: lora_A {tuple(right.shape)} and lora_B {tuple(left.shape)} of {layer!r} "
            "do not multiply; only linear layers are served"
        )
    return LowRank(left * _scale(layer, right.shape[0], config=config, folder=folder), right)


def _scale(layer: str, rank: int, *, config: Mapping[str, Any], folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's patterns by layer name."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    stated = ranks.get(get_pattern_key(list(ranks), layer), config["r"])
    if stated != rank:
        raise ModuleError(
            f"{folder}: {layer!r} has rank {rank}, {CONFIG_FILE} states {stated}: "
            "the two files do not belong together"
        )
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_layer(
    name: str, layer: str, delta: LowRank, layers: Mapping[str, tuple[int, int]]
) -> None:
    if layer not in layers:
        leaf = layer.rpartition(".")[2]
        similar = next((known for known in layers if known.endswith(f".{leaf}")), None)
        if leaf in ("lm_head", "embed_out", "embed_tokens", "wte", "embed_in"):
            remedy = "the head and the embedding cannot be changed: train on the inner layers"
        elif similar:
            remedy = f"the backbone calls such a layer {similar!r}: was it trained on another base?"
        else:
            remedy = (
                f"the backbone's layers end in {sorted({n.rpartition('.')[2] for n in layers})}"
            )
        raise ModuleError(f"module {name!r} changes {layer!r}, no layer of the backbone: {remedy}")
    if delta.shape != tuple(layers[layer]):
        raise ModuleError(
            f"module {name!r} changes {layer!r} by a {delta.shape[0]} x {delta.shape[1]} matrix, "
            f"the backbone's is {layers[layer][0]} x {layers[layer][1]}: it was trained on another "
            "base"
        )
    if not (delta.left.isfinite().all() and delta.right.isfinite().all()):
        raise ModuleError(f"module {name!r} holds NaN or inf in {layer!r}: its training diverged")
