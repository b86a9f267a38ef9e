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

from ..adapters.backbone import checkpoint_files, locate
from ..adapters.digest import file_digest, json_digest
from ..adapters.errors import BackboneError, RouterError
from .base import Query

_MODULES_FILE = "modules.json"
_PACKAGE = "sentence_transformers"
_PARTS = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "StaticEmbedding")
"""What a model may be made of: the class of a part is imported, and read, by its name."""
_MOST_CHARACTERS = 32768
"""Of a longer text only the beginning is read: no model's window holds more."""
_DAMAGES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""What loading a damaged model raises, by the file that is."""


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
        folder, _ = _located(self.model)
        object.__setattr__(self, "_encoder", _load(folder))

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The last turns' vectors, [n, d]; in a batch the last digits may differ."""
        texts = [_readable(query.text) for query in queries]
        with self._lock:  # a tokenizer's cutting is set for each call, and shared by threads
            vectors = self._encoder.encode(
                texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
            )
        return torch.from_numpy(vectors).float()


def digest_of(model: str) -> str:
    """Content digest of what is read of a model: weights, settings and tokenizer.

    model: as for `SentenceEmbedding`.

    Raises:
        RouterError: there is no such model, or it cannot be loaded safely.
    """
    folder, parts = _located(model)
    files = {file for part in (folder, *parts) for file in checkpoint_files(part)}
    return json_digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})


def _readable(text: str) -> str:
    """The beginning, without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text[:_MOST_CHARACTERS].encode("utf-8", "replace").decode()


def _located(model: str) -> tuple[Path, list[Path]]:
    """The folder of a model, and those of its parts; nothing that may run code is among them."""
    try:
        folder = locate(model)
        stated = json.loads((folder / _MODULES_FILE).read_text("utf-8"))
        kinds = [str(part["type"]) for part in stated]
        parts = [(folder / part["path"]).resolve() for part in stated]
    except (BackboneError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RouterError(f"{model!r} is no sentence-transformers model: {error}") from error
    for kind, part in zip(kinds, parts, strict=True):
        _check_kind(folder, kind)
        _check_files(folder, part)
    return folder, parts


def _check_kind(folder: Path, kind: str) -> None:
    if not kind.startswith(f"{_PACKAGE}.") or kind.rpartition(".")[2] not in _PARTS:
        raise RouterError(
            f"{folder} has a part of class {kind!r}, and would run what is found by that name: "
            f"{', '.join(_PARTS)} of {_PACKAGE} are allowed; choose another model"
        )


def _check_files(folder: Path, part: Path) -> None:
    if not part.is_relative_to(folder):
        raise RouterError(f"{folder} has a part outside of it, {part}: choose another model")
    spare = "pytorch_model.bin" if (part / "model.safetensors").is_file() else ""
    if any(file.name != spare for file in part.glob("*.bin")):
        raise RouterError(
            f"{part} holds weights as a pickle, which can run code: "
            "convert them to safetensors, or choose another model"
        )


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
    except _DAMAGES as error:
        raise RouterError(f"{folder} cannot be loaded: {error}") from error
