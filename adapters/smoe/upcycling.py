"""Upcycling: dense experts of one base into a sparse mixture of experts, Mixtral's checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..backbone import checkpoint_files
from ..build import BuildTools, is_weights, open_sources
from ..checkpoint_writer import checkpoint_writer
from ..errors import BackboneError, BankError, RecipeError
from ..experts import Base, Expert
from ..merge import Merger
from ..merging.methods import find_method
from ..merging.stack import rows_per_block
from ..recipe import Recipe
from ..staging import staged

Gates = Callable[[Merger], Mapping[int, Tensor]]
"""Rows of the gate by layer, [experts, hidden] each: what sends a token to an expert."""

_PLAIN = BuildTools()
_FEED_FORWARD = re.compile(r"(model\.layers\.(\d+))\.mlp\.(gate|up|down)_proj\.weight")
_STORED = {"gate": "w1", "down": "w2", "up": "w3"}
"""What Mixtral's checkpoints call a feed-forward part's matrices."""

_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    *("max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"),
    *("initializer_range", "attention_dropout", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
"""What a Llama's configuration and a Mixtral's have in common."""


def upcycle(
    recipe: Recipe,
    out: str | Path,
    *,
    gates: Gates,
    top_k: int = 2,
    force: bool = False,
    tools: BuildTools = _PLAIN,
) -> Path:
    """Write a Mixtral whose experts are the feed-forward parts of a recipe's experts, in its order;
    everything else is merged as the recipe's backbone says. Read and written a few rows at a time.

    gates: asked once, before anything is written. top_k: experts that a token is sent to.
    force: replace the checkpoint that stands at `out`.

    Raises:
        RecipeError: it has modules or a router, or top_k is out of range.
        BackboneError: the base is no Llama or Mistral without biases, or an input is damaged.
        BankError: `out` is taken, or cannot be written; nothing is left behind.

    Source: Komatsuzaki et al. 2023, Sparse Upcycling, arXiv:2212.05055; experts that were trained
    apart: Sukhbaatar et al. 2024, Branch-Train-MiX, arXiv:2403.07816.
    """
    _check_recipe(recipe, top_k)
    target = Path(out).expanduser()
    if target.exists() and not (force and (target / "config.json").is_file()):
        raise BankError(f"{out} exists: choose another folder, or --force replaces a checkpoint")
    base, experts = open_sources(recipe, progress=tools.progress)
    config = mixtral_config(base.path, experts=len(experts), top_k=top_k)
    if recipe.dtype is not None:
        config["dtype"] = recipe.dtype
    merger = Merger(base, experts, recipe, device=tools.device)
    rows = gates(merger)
    with staged(target) as folder:
        plan = _planned(merger, rows)
        _write_other_files(base, folder, config)
        step = tools.progress("upcycling", len(plan))
        announced = {name: (tensor.shape, tensor.dtype) for name, tensor in plan.items()}
        with checkpoint_writer(folder, announced) as writer:
            for name, tensor in plan.items():
                writer.write(name, tensor.rows())
                step()
    return target


def is_feed_forward(name: str) -> bool:
    """Whether a parameter of the base becomes an expert's own."""
    return _FEED_FORWARD.fullmatch(name) is not None


def mixtral_config(path: Path, *, experts: int, top_k: int) -> dict[str, Any]:
    """The configuration of the Mixtral that a checkpoint folder's model becomes.

    Raises:
        BackboneError: the model has parts that Mixtral lacks.
    """
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    has_bias = config.get("attention_bias") or config.get("mlp_bias")
    if config["model_type"] not in ("llama", "mistral") or has_bias:
        what = f"a {config['model_type']} model{' with biases' if has_bias else ''}"
        raise BackboneError(
            f"{path} is {what}: a Mixtral is made of Llama or Mistral models without biases"
        )
    return {
        **{key: config[key] for key in _KEPT if key in config},
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
    }


def _check_recipe(recipe: Recipe, top_k: int) -> None:
    if recipe.modules.method != "none":
        raise RecipeError(
            "upcycling keeps what is exclusive to an expert as a feed-forward part: set modules: "
            "{method: none}"
        )
    if recipe.router is not None:
        raise RecipeError("the gates of an upcycled model are its router: remove router")
    if recipe.shared != "folded" or recipe.backbone.method == "none":
        raise RecipeError(
            "upcycling merges attention, norms and embeddings: give backbone a merge method, as "
            "linear, and shared: folded"
        )
    if needs := find_method(recipe.backbone.method).needs:
        raise RecipeError(
            f"backbone: {{method: {recipe.backbone.method}}} looks at {needs} of experts, which "
            "upcycling does not measure: merge by linear, ties or another method without data"
        )
    if not 1 <= top_k <= len(recipe.experts):
        raise RecipeError(
            f"a token cannot be sent to {top_k} of {len(recipe.experts)} experts: top-k is 1 to "
            f"{len(recipe.experts)}"
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor that will be written. rows: begins to read it, in blocks of rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[], Iterable[Tensor]]


def _planned(merger: Merger, gates: Mapping[int, Tensor]) -> dict[str, _Tensor]:
    """Every tensor of the mixture by name, in the order in which they are written."""
    plan = {}
    for name in merger.names:
        shape, dtype = merger.base.checkpoint.tensors[name].shape, merger.dtype_of(name)
        found = _FEED_FORWARD.fullmatch(name)
        if found is None:
            plan[name] = _Tensor(shape, dtype, partial(merger.backbone_rows, name))
            continue
        prefix, layer, part = found.groups()
        moe = f"{prefix}.block_sparse_moe"
        if part == "gate":
            gate = gates[int(layer)]
            plan[f"{moe}.gate.weight"] = _Tensor(tuple(gate.shape), dtype, partial(iter, (gate,)))
        for k, expert in enumerate(merger.experts):
            rows = partial(_own_rows, merger.base, expert, name)
            plan[f"{moe}.experts.{k}.{_STORED[part]}.weight"] = _Tensor(shape, dtype, rows)
    return plan


def _own_rows(base: Base, expert: Expert, name: str) -> Iterator[Tensor]:
    """An expert's own weight, in blocks of rows."""
    info = base.checkpoint.tensors[name]
    step = rows_per_block(info.columns)
    for start in range(0, info.rows, step):
        stop = min(start + step, info.rows)
        before = base.checkpoint.read_rows(name, start, stop).float()
        yield expert.delta_rows(name, start, stop, before) + before


def _write_other_files(base: Base, folder: Path, config: Mapping[str, Any]) -> None:
    """The tokenizer and the like, and the configuration."""
    for file in checkpoint_files(base.path):
        if file.name != "config.json" and not is_weights(file):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
