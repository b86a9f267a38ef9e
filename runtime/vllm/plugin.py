"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`).

It does nothing unless MERGEROUTE_VLLM_MODULES names a folder of modules; what it needs of vLLM and
torch is imported only then.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any

from ...adapters.errors import EngineError
from .blends import is_blend
from .launch import PluginOptions
from .store import ModuleStore

_ADMISSION = "_mergeroute_admission"


def register() -> None:
    """Make vLLM serve blends; may be called any number of times.

    Raises:
        EngineError: the settings are wrong, or this vLLM was not tested and no fallback is allowed.
    """
    options = PluginOptions.read(os.environ)
    if options is None:
        return
    if is_virtual(options):
        _install_virtual(options.store)
    else:
        _install_materialised(options.store)


def is_virtual(options: PluginOptions) -> bool:
    """Whether blends stay virtual in this vLLM.

    Raises:
        EngineError: this vLLM was not tested, and no fallback is allowed.
    """
    if options.mode == "materialise":
        return False
    from .check import check_version, vllm_version

    try:
        check_version(vllm_version())
    except EngineError:
        if options.mode == "auto":
            return False
        raise
    return True


def _install_virtual(store: ModuleStore) -> None:
    """Four seams of vLLM: the workers' manager and wrapper, the API server's look-up of models, and
    its statistics, which would keep a time series for every set of blends that ever ran together.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    from .manager import BlendLoRAManager

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is BlendLoRAManager:
        return
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = BlendLoRAManager
    on_gpu = current_platform.is_cuda_alike()
    _set_wrapper("wrapper_cuda.BlendWrapperCUDA" if on_gpu else "wrapper_cpu.BlendWrapperCPU")
    if multiprocessing.parent_process() is None:  # the API server; engine and workers are children
        _install_admission(store)


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
    if multiprocessing.parent_process() is None:  # before any worker of this server looks
        clear(store)


def _set_wrapper(name: str) -> None:
    from vllm.platforms import current_platform

    qualified = f"{__package__}.{name}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: qualified)
