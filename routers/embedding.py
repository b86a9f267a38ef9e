"""Sentence embeddings: what a prompt's text means to a small model of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from ..adapters.backbone import locate
from ..adapters.errors import BackboneError, RouterError
from .base import Query

_MODULES_FILE = "modules.json"
_MOST_CHARACTERS = 32768
"""Of a longer text only the beginning is read: no model's window holds more."""


@dataclass(frozen=True, eq=False)
class SentenceEmbedding:
    """The last turn's text as a vector of length 1, by a sentence-transformers model on the CPU.

    A text longer than the model's window (256 tokens, for many) is cut by the model: its beginning
    counts. Only safetensors are read, and no code that comes with a model is run.

    model: a folder, or a hub id, whose latest version is fetched into the hub's cache.

    Raises:
        RouterError: the extra `text` is not installed, or there is no such model, or it cannot be
            loaded safely.
    """

    model: str
    _encoder: Any = field(init=False, repr=False)
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_encoder", _load(_folder(self.model)))

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The last turns' vectors, [n, d]; in a batch the last digits may differ."""
        texts = [_readable(query.text) for query in queries]
        with self._lock:  # a tokenizer's cutting is set for each call, and shared by threads
            vectors = self._encoder.encode(
                texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
            )
        return torch.from_numpy(vectors).float()


def _readable(text: str) -> str:
    """The beginning, without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text[:_MOST_CHARACTERS].encode("utf-8", "replace").decode()


def _folder(model: str) -> Path:
    """Where the model lies, with every part in safetensors."""
    try:
        folder = locate(model)
        parts = [folder / part["path"] for part in json.loads((folder / _MODULES_FILE).read_text())]
    except (BackboneError, OSError, ValueError, KeyError, TypeError) as error:
        raise RouterError(f"{model!r} is no sentence-transformers model: {error}") from error
    for part in parts:
        if any(part.glob("*.bin")) and not any(part.glob("*.safetensors")):
            raise RouterError(
                f"{part} holds weights as a pickle, which can run code: "
                "convert them to safetensors, or choose another model"
            )
    return folder


def _load(folder: Path) -> Any:  # noqa: ANN401
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RouterError(
            "sentence embeddings need the extra text: pip install 'mergeroute[text]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            str(folder),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise RouterError(f"{folder} cannot be loaded: {error}") from error
