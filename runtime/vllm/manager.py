"""BlendLoRAManager: inside each worker of vLLM, keeps modules in slots and knows what blends mean.

To vLLM's scheduler a blend is a LoRA like any other, with a number of its own. Here it is no more
than weights over slots: nothing is loaded, copied or evicted for it.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ...adapters.blend import Blend
from ...adapters.errors import EngineError, ModuleError
from .blends import VIRTUAL_PATH, read_name
from .check import check_layers, vllm_version
from .conditions import (
    blended_suffixes,
    check_experts,
    check_settings,
    check_wrapped,
    linear_suffixes,
)
from .launch import PluginOptions
from .neighbours import Steadiness, swaps
from .token_weights import expandable

_FIRST_MODULE = 1 << 30  # above every number that vLLM gives to a blend
_MOST_BLENDS = 1 << 16
_NUMBER = re.compile(r"\d+")


class BlendLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc] # vLLM is not there
    """A worker's modules and blends. One thread calls it, between steps.

    Raises:
        EngineError: vLLM was started in a way that blends are not served in.
    """

    lora_config: Any

    def __init__(self, vllm_config: Any, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(vllm_config, *arguments)
        options = PluginOptions.read(os.environ)
        assert options is not None, "the plugin installs this class only then"
        check_settings(vllm_config, options)
        self._options = options
        self._ids = count(_FIRST_MODULE)
        self._modules: dict[str, int] = {}  # key -> LoRA id, of which vLLM's manager knows the slot
        self._blends: OrderedDict[int, Blend | None] = OrderedDict()  # None: a warm-up
        self._steadiness = Steadiness()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> Any:  # noqa: ANN401
        """Wrap the model's layers, check them, and load what the folder of modules holds."""
        slots = self._options.slots
        targets = blended_suffixes(
            self.lora_config.target_modules or linear_suffixes(model),
            use_mla=vllm_config.model_config.use_mla,
        )
        check_experts(model, targets)
        self.lora_config = replace(
            self.lora_config,
            max_lora_rank=self._options.rank,
            max_loras=slots,
            max_cpu_loras=slots,
            target_modules=targets,
        )
        wrapped = super().create_lora_manager(model, vllm_config)
        check_wrapped(self._adapter_manager.modules)
        for layer in self._adapter_manager.modules.values():
            layer.lora_b_stacked = expandable(layer.lora_b_stacked)
        for wrapper in self._adapter_manager.punica_wrapper_mapping.values():
            wrapper.row_of = self._row
        self._check_layers()
        for key in sorted(self._options.store.keys()):
            self._load(key)
        return wrapped

    def _check_layers(self) -> None:
        try:
            check_layers(self._adapter_manager)
        except EngineError as error:
            if self._options.mode != "auto":
                raise
            noted = self._options.store.note_mismatch(vllm_version(), str(error))
            raise EngineError(
                f"{error}; the next start materialises blends ({noted} says so: remove it to try "
                "again)"
            ) from error

    def add_adapter(self, request: LoRARequest) -> bool:
        """Learn a blend; modules that are not there yet are loaded.

        Called by the API server, lora_path states the modules to keep, should one have to go. In a
        step it is no list, all modules are there, and nothing goes.

        Raises:
            ModuleError: a module cannot be loaded, or finds no slot.
        """
        blend = read_name(request.lora_name)
        if missing := sorted(blend.keys() - self._modules.keys()):
            if request.lora_path != VIRTUAL_PATH:
                self._retain({*request.lora_path.split(","), *blend})
            for key in missing:
                self._load(key)
        is_new = request.lora_int_id not in self._blends
        self._blends[request.lora_int_id] = blend
        self._blends.move_to_end(request.lora_int_id)
        return is_new

    def _apply_adapters(self, requests: Collection[LoRARequest | None]) -> None:
        for request in requests:
            if request is None:
                continue
            if request.lora_int_id in self._blends:
                self._blends.move_to_end(request.lora_int_id)
            else:
                self.add_adapter(request)
        while len(self._blends) > _MOST_BLENDS:  # never one of this step: those are the newest
            self._blends.popitem(last=False)
        self._settle({request.lora_int_id for request in requests if request is not None})

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Weights on all slots, for warming up."""
        self._blends[request.lora_int_id] = None
        return True

    def remove_adapter(self, lora_id: int) -> bool:
        """Forget a blend."""
        known = lora_id in self._blends
        self._blends.pop(lora_id, None)
        return known

    def remove_all_adapters(self) -> None:
        """Forget all blends; the modules stay. A number may mean another blend from now on, so
        that the next step's weights are made anew whatever they were.
        """
        self._blends.clear()
        self._adapter_manager._last_mapping = None

    def list_adapters(self) -> set[int]:
        """The blends known."""
        return set(self._blends)

    def pin_adapter(self, lora_id: int) -> bool:
        """Whether the blend is known: it costs nothing to keep."""
        return lora_id in self._blends

    def _row(self, lora_id: int) -> Tensor:
        blend = self._blends[lora_id]
        if blend is None:
            return torch.full((self._options.slots,), 0.5)
        row, slots = torch.zeros(self._options.slots), self._adapter_manager.lora_index_to_id
        for key, weight in blend.items():
            row[slots.index(self._modules[key])] = weight
        return row

    def _settle(self, lora_ids: Iterable[int]) -> None:
        """Move the modules of steady blends to neighbouring slots, where that makes a difference.
        vLLM then has the step's weights made anew, for it compares the slots.
        """
        manager = self._adapter_manager
        used = frozenset(key for each in lora_ids for key in self._blends[each] or ())
        if not self._steadiness.is_steady(used):
            return
        if not all(each.joins_neighbours for each in manager.punica_wrapper_mapping.values()):
            return
        order = manager.lora_index_to_id
        for one, other in swaps([order.index(self._modules[key]) for key in used]):
            for layer in set(manager.modules.values()):
                for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                    stack[[one, other]] = stack[[other, one]]
            order[one], order[other] = order[other], order[one]

    def _load(self, key: str) -> None:
        store = self._options.store
        if key not in store:
            raise ModuleError(f"module {key} does not lie in {store.folder}: register it first")
        if len(self._modules) >= store.slots:
            raise ModuleError(
                f"module {key} finds no slot: all {store.slots} are taken by registered modules or "
                "by requests that run; unload one, or start vLLM with more slots"
            )
        lora_id = next(self._ids)
        lora = self._load_adapter(LoRARequest(key, lora_id, str(store.path(key))))
        self._refuse_unknown_layers(key, lora.loras)
        try:
            self._adapter_manager.add_adapter(lora)
            self._adapter_manager.activate_adapter(lora_id)
        except BaseException:  # half a module must hold no slot
            self._adapter_manager.remove_adapter(lora_id)
            raise
        self._modules[key] = lora_id

    def _retain(self, keys: Collection[str]) -> None:
        for key in self._modules.keys() - keys:
            self._adapter_manager.remove_adapter(self._modules.pop(key))

    def _refuse_unknown_layers(self, key: str, layers: Iterable[str]) -> None:
        """vLLM itself leaves out without a word what it has no wrapped layer for. Layers are
        compared without their numbers: a pipeline's stages hold some of them only.
        """
        packed = self._adapter_manager.packed_modules
        known = {*self._adapter_manager.modules, *(n for names in packed.values() for n in names)}
        forms = {_NUMBER.sub("#", name) for name in known}
        strange = [layer for layer in layers if _NUMBER.sub("#", layer) not in forms]
        if strange:
            raise ModuleError(
                f"module {key} changes {strange[0]!r}, which vLLM does not run as a linear layer "
                "with LoRA: serve it with the torch engine"
            )
