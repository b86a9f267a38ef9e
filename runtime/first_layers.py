"""The first layers of a backbone alone, for routers: the rest is never read into memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.errors import RouterError
from .compatibility import prepare_model
from .encoder import Encoder, TokenIds
from .loading import load_model


class FirstLayers:
    """Hidden states after the first layers of a checkpoint; the layers are read when they are first
    asked for. Any thread may use it.

    config: of the whole backbone.
    """

    def __init__(
        self,
        path: Path,
        config: Any,  # noqa: ANN401 - transformers is untyped
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._path = path
        self._config = config
        self._device = device
        self._dtype = dtype
        self._lock = threading.Lock()
        self._model: Any = None
        self._encoders: dict[tuple[int, ...], Encoder] = {}

    def encode(self, prompts: Sequence[TokenIds], layers: Sequence[int]) -> list[Tensor]:
        """As `Engine.encode`, and the same bits as of the whole backbone.

        Raises:
            RouterError: the backbone has no such layer.
            UnsupportedModelError: it cannot be read.
        """
        with self._lock:
            return self._encoder(tuple(layers)).encode(prompts)

    def _encoder(self, layers: tuple[int, ...]) -> Encoder:
        if layers not in self._encoders:
            count = self._config.get_text_config().num_hidden_layers
            if not 1 <= max(layers) <= count:
                raise RouterError(
                    f"layer {max(layers)} does not exist: the backbone has 1 to {count}"
                )
            if self._model is None or _depth(self._model) < max(layers):
                self._encoders.clear()
                self._model = _read(self._path, max(layers), self._device, self._dtype)
            self._encoders[layers] = Encoder(self._model, layers=layers)
        return self._encoders[layers]


def _depth(model: Any) -> int:  # noqa: ANN401
    depth: int = model.config.get_text_config().num_hidden_layers
    return depth


def _read(path: Path, depth: int, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The first layers, prepared; the head, which no router looks at, is let go."""
    model = load_model(path, device=device, dtype=dtype, depth=depth)
    prepare_model(model)
    model.set_output_embeddings(nn.Identity())
    return model
