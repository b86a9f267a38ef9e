"""Hidden states of the backbone's first layers, for routers: the engine's own weights, no copy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.errors import RouterError
from .attention import PackedBatch, Span, packed
from .blending import blending

_MOST_TOKENS = 4096
"""Of several short prompts that go into one forward."""

TokenIds = tuple[int, ...]


class Encoder:
    """The first layers of a model whose attention is `packed_attention`.

    layers: after which hidden states are kept; the last of them is the last that is run.
    Any thread may use it, one at a time: plan and batch are the thread's own, and no module is ever
    applied.

    Raises:
        RouterError: the model has no such layer.
    """

    def __init__(self, model: Any, *, layers: Sequence[int]) -> None:  # noqa: ANN401
        name, blocks = _decoder_layers(model.base_model)
        for layer in layers:
            if not 1 <= layer <= len(blocks):
                raise RouterError(
                    f"layer {layer} does not exist: the backbone has 1 to {len(blocks)}"
                )
        self._device = model.device
        self._layers = tuple(layers)
        self._hidden: dict[int, Tensor] = {}
        kept = [self._watched(blocks[index], index + 1) for index in range(max(layers))]
        self._model = copy.copy(model.base_model)
        self._model._modules = dict(model.base_model._modules)
        setattr(self._model, name, nn.ModuleList(kept))

    def encode(self, prompts: Sequence[TokenIds]) -> list[Tensor]:
        """Hidden states of each prompt after each of the layers, before any final norm,
        [layers, t, hidden], float32. A prompt's bits depend on its neighbours in the last digits:
        what must be reproducible is encoded alone.
        """
        return [states for group in _groups(prompts) for states in self._encode(group)]

    def embed(self, prompts: Sequence[TokenIds]) -> Tensor:
        """The mean of each prompt's hidden states after the final norm, where the last layer is
        the model's last, [n, hidden], float32.
        """
        return torch.cat([self._embed(group) for group in _groups(prompts)])

    @torch.inference_mode()
    def _embed(self, prompts: Sequence[TokenIds]) -> Tensor:
        states = self._run(prompts)
        self._hidden.clear()
        pieces = torch.split(states, [len(prompt) for prompt in prompts])
        return torch.stack([piece.mean(0) for piece in pieces])

    @torch.inference_mode()
    def _encode(self, prompts: Sequence[TokenIds]) -> list[Tensor]:
        """All in one forward."""
        self._run(prompts)
        states = torch.stack([self._hidden[layer] for layer in self._layers])
        self._hidden.clear()
        return list(torch.split(states, [len(prompt) for prompt in prompts], dim=1))

    def _run(self, prompts: Sequence[TokenIds]) -> Tensor:
        """What the model puts out after its norm, [t, hidden] over all prompts, float32; `_hidden`
        keeps what its layers put out.
        """
        lengths = [len(prompt) for prompt in prompts]
        stops = torch.tensor(lengths).cumsum(0).tolist()
        spans = [Span(0, stop - n, stop, past=0) for n, stop in zip(lengths, stops, strict=True)]
        batch = PackedBatch(spans, device=self._device)
        ids = torch.tensor([[i for prompt in prompts for i in prompt]], device=self._device)
        with packed(batch), blending(None):
            out = self._model(input_ids=ids, position_ids=batch.positions[None], use_cache=False)
        states: Tensor = out.last_hidden_state[0].float()
        return states

    def _watched(self, block: nn.Module, number: int) -> nn.Module:
        """The block, or a copy over the same weights that keeps what it puts out."""
        if number not in self._layers:
            return block
        watched = copy.copy(block)
        watched._forward_hooks = OrderedDict()
        watched.register_forward_hook(self._keeping(number))
        return watched

    def _keeping(self, number: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            self._hidden[number] = hidden[0].float()

        return keep


def _groups(prompts: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """Neighbours that make up at most `_MOST_TOKENS`, or one longer prompt."""
    group: list[TokenIds] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > _MOST_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401
    """The attribute that holds the decoder's layers, `layers` or `h`, and the layers."""
    count = model.config.num_hidden_layers
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise RouterError(f"{type(model).__name__} keeps its layers where they are not found")
