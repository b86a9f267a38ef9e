"""What blends ask of a vLLM that runs them: its settings, and what it makes of a model's layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.fused_moe import GateLinear, MoERunner
from vllm.model_executor.layers.linear import LinearBase

from ...adapters.errors import EngineError
from .launch import PluginOptions

_MLA_ABSORBED = "kv_b_proj"


def check_settings(vllm_config: Any, options: PluginOptions) -> None:  # noqa: ANN401
    """Refuse what blends are not served with.

    Raises:
        EngineError: it names the setting.
    """
    lora, parallel = vllm_config.lora_config, vllm_config.parallel_config
    model, rank = vllm_config.model_config, lora.max_lora_rank
    # under `auto` it is that of materialised blends, which is larger
    fits = rank >= options.rank if options.mode == "auto" else rank == options.rank
    refused = {
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "--enable-tower-connector-lora": lora.enable_tower_connector_lora,
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--api-server-count above 1": parallel._api_process_count > 1,
        "--enable-dbo or --ubatch-size": parallel.use_ubatching,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        f"--lora-dtype {lora.lora_dtype}, which is not {model.dtype}": lora.lora_dtype
        != model.dtype,
        f"--max-lora-rank {rank}, which is not {options.rank}": not fits,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise EngineError(f"mergeroute: vLLM was started with {setting}: leave it out")


def linear_suffixes(model: nn.Module) -> list[str]:
    """Last parts of the names of a model's linear layers: neither embedding nor head, nor experts
    and their routers.
    """
    names = (
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LinearBase) and not isinstance(layer, GateLinear)
    )
    return sorted({name.rpartition(".")[2] for name in names})


def blended_suffixes(suffixes: Iterable[str], *, use_mla: bool) -> list[str]:
    """Those of them that can be blended. Where attention is latent (MLA), decoding takes products
    with `kv_b_proj` that were made of the backbone's weights: a module on it would be half applied.
    """
    return [name for name in suffixes if not (use_mla and name == _MLA_ABSORBED)]


def check_experts(model: nn.Module, targets: Collection[str]) -> None:
    """Refuse experts that are to have LoRAs, or that are run by vLLM's kernels for such.

    targets: last parts of the names of the layers that get LoRAs.

    Raises:
        EngineError: it names a layer of them.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, MoERunner):
            continue
        if name.rpartition(".")[2] in targets:
            raise _not_blended(name)
        if layer.moe_config.is_lora_enabled:
            raise EngineError(
                f"mergeroute: this vLLM runs the experts of {name} by its kernels for LoRAs, which "
                "blends do not need and no CPU has: use the torch engine"
            )


def check_wrapped(layers: Mapping[str, object]) -> None:
    """Refuse layers with LoRAs that are no inner linear layers.

    Raises:
        EngineError: it names the first.
    """
    for name, layer in layers.items():
        if not isinstance(layer, BaseLinearLayerWithLoRA):
            raise _not_blended(name)


def _not_blended(name: str) -> EngineError:
    return EngineError(
        f"mergeroute: {name} is no inner linear layer, and only these are blended: leave "
        f"{name.rpartition('.')[2]} out of --lora-target-modules"
    )
