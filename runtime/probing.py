"""Probing a model: whether a layer is called as the one that takes its place needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.errors import UnsupportedModelError
from ..adapters.shapes import Shapes
from .attention import PackedBatch, Span, packed
from .blending import blending

_ROWS = 19
"""Tokens of the probe: a prime, so that no other dimension is taken for the rows."""

_KEPT = (1, 2, 5, 8, 11, 13, 17)


class Probe:
    """What one small forward and the layers themselves tell of embeddings, head, norms and biases.

    model: as it will be run, no layer replaced yet.
    """

    def __init__(self, model: Any, shapes: Shapes) -> None:  # noqa: ANN401
        owners = {name.rpartition(".")[0] for name in shapes.vectors}
        names = owners | shapes.embeddings.keys() | shapes.head.keys()
        self._head = next(iter(shapes.head), None)
        self._layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ROWS
        self._rows = min(_ROWS, longest)
        self._kept = [row for row in _KEPT if row < self._rows]
        self._inputs = self._input_shapes(model)
        self._scales: dict[str, float] = {}
        self._units: dict[str, nn.Module] = {}

    def row_dim(self, name: str) -> int:
        """The dimension of a layer's input along which the packed rows lie.

        Raises:
            UnsupportedModelError: the model does not call the layer, or with other rows.
        """
        rows = len(self._kept) if name == self._head else self._rows
        found = {tuple(d for d, n in enumerate(s) if n == rows) for s in self._inputs[name]}
        if len(found) != 1 or len(dims := found.pop()) != 1:
            raise UnsupportedModelError(
                f"{name!r} cannot be changed by modules: the model calls it with inputs of shape "
                f"{self._inputs[name]} for {rows} rows, where one dimension must count rows"
            )
        return dims[0]

    def embedding_scale(self, name: str) -> float:
        """By what an embedding multiplies the rows that it looks up.

        Raises:
            UnsupportedModelError: it does something else than to look up and scale.
        """
        self.row_dim(name)
        if name not in self._scales:
            self._scales[name] = _scale(name, self._layers[name])
        return self._scales[name]

    def unit(self, name: str) -> nn.Module | None:
        """A norm with such a weight that it gives its input normalised; None of a linear layer.

        Raises:
            UnsupportedModelError: its output is not affine in its weight and bias.
        """
        layer = self._layers[name]
        if isinstance(layer, nn.Linear | Conv1D):
            return None
        if name not in self._units:
            self._units[name] = _unit(name, layer)
        return self._units[name]

    @torch.inference_mode()
    def _input_shapes(self, model: Any) -> dict[str, list[tuple[int, ...]]]:  # noqa: ANN401
        """The shapes of what each layer is given in one forward; () where it is not one tensor."""
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self._layers}

        def watch(name: str) -> Callable[..., None]:
            def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                is_one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
                shapes[name].append(tuple(args[0].shape) if is_one else ())

            return note

        hooks = [
            layer.register_forward_pre_hook(watch(name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            self._run(model)
        finally:
            for hook in hooks:
                hook.remove()
        return shapes

    def _run(self, model: Any) -> None:  # noqa: ANN401
        batch = PackedBatch([Span(slot=0, start=0, stop=self._rows, past=0)], device=model.device)
        vocabulary = model.config.get_text_config().vocab_size
        with packed(batch), blending(None):
            model(
                input_ids=batch.positions[None] % vocabulary,
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(self._kept, device=model.device),
            )


@torch.inference_mode()
def _scale(name: str, layer: nn.Module) -> float:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    scale = torch.as_tensor(getattr(layer, "embed_scale", 1.0)).to(weight)
    ids = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // 64), device=weight.device)
    try:
        if not layer.max_norm and torch.equal(layer(ids), weight[ids] * scale):
            return float(scale)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        pass
    raise UnsupportedModelError(
        f"{name!r} is a {type(layer).__name__}, which does more than to look up and scale: "
        "modules cannot change it"
    )


@torch.no_grad()
def _unit(name: str, layer: nn.Module) -> nn.Module:
    """Most norms multiply by w, Gemma's by 1 + w."""
    try:
        for value in (1.0, 0.0):
            if _is_unit(layer, value):
                return _filled(layer, weight=value, bias=0.0)
    except (RuntimeError, TypeError, AttributeError, KeyError):
        pass
    raise UnsupportedModelError(
        f"{name!r} is a {type(layer).__name__}, whose output is not its normalised input times its "
        "weight: modules cannot change it"
    )


def _is_unit(layer: nn.Module, value: float) -> bool:
    """Whether the layer with this weight gives x̂, so that it gives x̂ * (w + 1 - value) + b."""
    unit = _filled(layer, weight=value, bias=0.0).float()
    layer = copy.deepcopy(layer).float()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    drawn = dict(layer.named_parameters())
    weight, bias = drawn["weight"], drawn.get("bias", torch.zeros(()))
    x = torch.randn(3, len(weight), generator=generator).to(weight)
    expected = unit(x) * (weight + 1 - value) + bias.to(weight)
    return torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def _filled(layer: nn.Module, **values: float) -> nn.Module:
    filled = copy.deepcopy(layer)
    for name, parameter in filled.named_parameters():
        parameter.requires_grad_(False).fill_(values[name])
    return filled
