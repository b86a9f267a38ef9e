"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`).

It does nothing unless MERGEROUTE_VLLM_MODULES names a folder of modules; what it needs of vLLM and
torch is imported only then.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from ...adapters.errors import EngineError
from .blends import is_blend
from .launch import MODE_VARIABLE, RANK_VARIABLE, SLOTS_VARIABLE, Mode, PluginOptions
from .store import ModuleStore

_ADMISSION = "_mergeroute_admission"
_CHOICE_VARIABLE = "_MERGEROUTE_VLLM_CHOICE"
"""What the first process of a server chose under `auto`: those that it starts follow it."""


def register() -> None:
    """Make vLLM serve blends; may be called any number of times.

    Raises:
        EngineError: the settings are wrong, or this vLLM was not tested and no fallback is allowed.
    """
    options = PluginOptions.read(os.environ)
    if options is None:
        return
    options = replace(options, mode=_choice(options))
    tell_compiler(options)
    if options.mode == "virtual":
        _install_virtual(options.store)
    else:
        _install_materialised(options.store)


def _choice(options: PluginOptions) -> Mode:
    if options.mode != "auto" or _CHOICE_VARIABLE not in os.environ:
        os.environ[_CHOICE_VARIABLE] = "virtual" if is_virtual(options) else "materialise"
    return cast("Mode", os.environ[_CHOICE_VARIABLE])


def is_virtual(options: PluginOptions) -> bool:
    """Whether blends stay virtual in this vLLM. Under `auto` they do not where its version was not
    tested, or where a self-check has failed on this folder of modules.

    Raises:
        EngineError: this vLLM was not tested, and no fallback is allowed.
    """
    if options.mode == "materialise":
        return False
    from .check import check_version, vllm_version

    found = vllm_version()
    try:
        check_version(found)
    except EngineError:
        if options.mode == "auto":
            return False
        raise
    return options.mode == "virtual" or not options.store.mismatch(found)


def tell_compiler(options: PluginOptions) -> None:
    """Make the slots a part of the key of vLLM's cache of compiled graphs: these hold their sizes,
    and vLLM's own settings do not tell them.
    """
    from vllm import envs

    for name in (SLOTS_VARIABLE, RANK_VARIABLE, MODE_VARIABLE):
        envs.environment_variables[name] = functools.partial(options.environment.get, name)


def _install_virtual(store: ModuleStore) -> None:
    """Five seams of vLLM: the workers' manager and wrapper, the experts' settings, the API server's
    look-up of models, and its statistics, which would keep a time series for every set of blends
    that ever ran together.
    """
    from vllm.v1.worker import lora_model_runner_mixin

    from .manager import BlendLoRAManager

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is BlendLoRAManager:
        return
    _set_wrapper(wrapper_name())
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = BlendLoRAManager
    _spare_experts()
    if multiprocessing.parent_process() is None:  # the API server; engine and workers are children
        _install_admission(store)


def wrapper_name() -> str:
    """The wrapper for this platform.

    Raises:
        EngineError: there is none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        return "wrapper_cuda.BlendWrapperCUDA"
    if current_platform.is_cpu():
        return "wrapper_cpu.BlendWrapperCPU"
    raise EngineError(
        f"mergeroute: blends are not served on {current_platform.device_name!r}, only on CPUs and "
        f"on CUDA or ROCm: use materialised blends ({MODE_VARIABLE}=materialise)"
    )


def _spare_experts() -> None:
    """Let experts run as they do without LoRAs: no module changes them, and vLLM's kernels for
    experts with LoRAs run on no CPU. The manager looks whether it came to that.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    finish = FusedMoEConfig.__post_init__

    @functools.wraps(finish)
    def __post_init__(self: Any) -> None:  # noqa: ANN401
        self.is_lora_enabled = False
        finish(self)

    FusedMoEConfig.__post_init__ = __post_init__


def _install_admission(store: ModuleStore) -> None:
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.v1.metrics.stats import LoRARequestStates

    from .admission import BlendAdmission

    check, adapters = BaseServing._check_model, BaseServing._maybe_get_adapters

    def admission(models: Any) -> BlendAdmission:  # noqa: ANN401
        if not hasattr(models, _ADMISSION):
            setattr(models, _ADMISSION, BlendAdmission(models, store))
        found: BlendAdmission = getattr(models, _ADMISSION)
        return found

    @functools.wraps(check)
    async def _check_model(self: Any, request: Any) -> Any:  # noqa: ANN401
        if is_blend(request.model):
            return await admission(self.models).check(request.model)
        return await check(self, request)

    @functools.wraps(adapters)
    def _maybe_get_adapters(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        if is_blend(request.model):
            return admission(self.models).request(request.model)
        return adapters(self, request, *arguments, **named)

    BaseServing._check_model, BaseServing._maybe_get_adapters = _check_model, _maybe_get_adapters
    LoRARequestStates._request_update = lambda *_, **__: None


def _install_materialised(store: ModuleStore) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.platforms import current_platform

    from .materialise import clear
    from .resolver import BlendResolver

    if "mergeroute" in LoRAResolverRegistry.get_supported_resolvers():
        return
    LoRAResolverRegistry.register_resolver("mergeroute", BlendResolver(store))
    if current_platform.is_cpu():
        _set_wrapper("wrapper_stock.StockWrapperCPU")
        with suppress(ImportError, AttributeError):  # in whatever version; most models have none
            _spare_experts()
    if multiprocessing.parent_process() is None:  # before any worker of this server looks
        clear(store)


def _set_wrapper(name: str) -> None:
    from vllm.platforms import current_platform

    qualified = f"{__package__}.{name}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: qualified)
