"""PEFT's adapter_config.json: what can be served of it, and how its scale folds into a delta."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor

from .delta import LowRank
from .errors import ModuleError
from .module_files import CONFIG_FILE

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


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a LoRA folder that can be served.

    Raises:
        ModuleError: it is missing or damaged, or uses what cannot be blended.
    """
    config = _read_json(folder)
    _refuse_config(config, folder)
    return config


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether PEFT applies an embedding's LoRA to a tied head too.

    Source: peft 0.21, BaseTuner._check_tied_modules: only when told to, and only by these names.
    """
    if not config.get("ensure_weight_tying"):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return any(_matches(targets, name) for name in EMBEDDING_LAYER_NAMES)
    return any(str(name).rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModuleError(f"'target_modules' {pattern!r} is no regular expression") from error


def fold(
    layer: str,
    pair: Mapping[str, Tensor],
    *,
    is_table: bool,
    config: Mapping[str, Any],
    folder: Path,
) -> LowRank:
    """A layer's stored factors as a delta, PEFT's scale folded in.

    pair: {"A": [r, i], "B": [o, r]}; of a table (an embedding) {"A": [r, V], "B": [d, r]}, since
    PEFT's delta of an embedding is (B A)ᵀ.

    Raises:
        ModuleError: a factor is missing, or they fit neither each other nor the configuration.
    """
    if set(pair) != {"A", "B"}:
        kind = "lora_embedding_" if is_table else "lora_"
        missing = ({"A", "B"} - set(pair)).pop()
        raise ModuleError(
            f"{folder}: layer {layer!r} lacks {kind}{missing}: the file is incomplete"
        )
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ModuleError(
            f"{folder}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {layer!r} "
            "do not multiply; only linear layers and embeddings are served"
        )
    scale = _scale(layer, a.shape[0], config=config, folder=folder)
    return LowRank(a.T * scale, b.T) if is_table else LowRank(b * scale, a)


def _read_json(folder: Path) -> dict[str, Any]:
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
