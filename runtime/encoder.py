"""Hidden states of the backbone's first layers, for routers: the engine's own weights, no copy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.errors import RouterError
from .attention import PackedBatch, Span, packed
from .blending import blending


class Encoder:
    """The first `layer` layers of a model whose attention is `packed_attention`.

    Any thread may use it, one at a time: plan and batch are the thread's own, and no module is ever
    applied.

    Raises:
        RouterError: the model has no such layer.
    """

    def __init__(self, model: Any, *, layer: int) -> None:  # noqa: ANN401
        name, layers = _decoder_layers(model.base_model)
        if not 1 <= layer <= len(layers):
            raise RouterError(f"layer {layer} does not exist: the backbone has 1 to {len(layers)}")
        self._device = model.device
        self._hidden: Tensor | None = None
        last = copy.copy(layers[layer - 1])
        last._forward_hooks = OrderedDict()
        last.register_forward_hook(self._keep)
        self._model = copy.copy(model.base_model)
        self._model._modules = dict(model.base_model._modules)
        setattr(self._model, name, nn.ModuleList([*layers[: layer - 1], last]))

    @torch.inference_mode()
    def encode(self, prompt_ids: tuple[int, ...]) -> Tensor:
        """Hidden states after the last layer kept, before any final norm, [t, hidden], float32."""
        span = Span(slot=0, start=0, stop=len(prompt_ids), past=0)
        batch = PackedBatch([span], device=self._device)
        ids = torch.tensor([prompt_ids], device=self._device)
        with packed(batch), blending(None):
            self._model(input_ids=ids, position_ids=batch.positions[None], use_cache=False)
        assert self._hidden is not None
        return self._hidden

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        self._hidden = hidden[0].float()


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401
    """The attribute that holds the decoder's layers, `layers` or `h`, and the layers."""
    count = model.config.num_hidden_layers
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise RouterError(f"{type(model).__name__} keeps its layers where they are not found")
