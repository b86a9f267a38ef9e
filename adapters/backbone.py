"""Backbone: the shared model, a Hugging Face checkpoint folder or hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .digest import file_digest, json_digest
from .errors import BackboneError
from .kinds import empty_model
from .shapes import Shapes

CHECKPOINT_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
"""Files of a checkpoint folder that are read, copied and digested. Pickles are not among them."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Backbone:
    """A checkpoint on the local disk.

    path: folder with config.json, safetensors weights and tokenizer files.
    name: what the `model` field of a request may call it.
    digest: content digest of the checkpoint's files.
    weights_digest: of its weights alone, by which modules know what they stand on.
    """

    path: Path
    name: str
    digest: str
    weights_digest: str

    @classmethod
    def open(cls, source: str | Path, *, name: str | None = None) -> Backbone:
        """Open a checkpoint folder, or fetch a hub id into the hub's cache.

        name: default is the last part of the folder or hub id.

        Raises:
            BackboneError: there is no such folder or hub id, or it holds no safetensors weights.
        """
        path = locate(source)
        files = file_digests(checkpoint_files(path))
        return cls(
            path=path,
            name=name or _last_part(source, path),
            digest=digest_of_files(files),
            weights_digest=digest_of_weights(files),
        )

    @cached_property
    def shapes(self) -> Shapes:
        """Everything a module may change: linear layers, embeddings, head and vectors."""
        return Shapes.of(empty_model(self.path))

    @property
    def layers(self) -> Mapping[str, tuple[int, int]]:
        """The inner linear layers alone: name to (out, in); see `linear_layers`."""
        return self.shapes.linear


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401 - transformers is untyped
    """Linear layers of a causal language model by name, (out, in) each, the head left out.

    GPT-2's Conv1D counts: it stores its weight transposed, its deltas have the same shape as ever.
    """
    return dict(Shapes.of(model).linear)


def locate(source: str | Path) -> Path:
    """The local folder of a checkpoint, fetched from the hub when `source` is a hub id.

    Raises:
        BackboneError: neither a folder with a checkpoint nor a hub id that can be fetched.
    """
    path = local_folder(source)
    if not (path / "config.json").is_file():
        raise BackboneError(f"{path} holds no config.json: name a Hugging Face checkpoint folder")
    if not any(path.glob("*.safetensors")):
        raise BackboneError(
            f"{path} holds no *.safetensors: convert it with save_pretrained(); "
            "pickled weights are never opened"
        )
    return path


def local_folder(source: str | Path) -> Path:
    """The folder itself, or the copy of a hub id in the hub's cache.

    Raises:
        BackboneError: neither a folder nor a hub id that can be fetched.
    """
    path = Path(source).expanduser()
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = _fetch(str(source))
    if not path.is_dir():
        raise BackboneError(f"{source} is neither a folder nor a hub id (owner/name)")
    return path.resolve()


def stated_folder(source: str | Path) -> Path:
    """The folder that a recipe states: a text is an absolute path or a hub id, and never looked for
    in the current folder.

    Raises:
        BackboneError: it is neither, or cannot be fetched.
    """
    if isinstance(source, Path) or Path(source).is_absolute():
        return local_folder(source)
    if not HUB_ID.fullmatch(source):
        raise BackboneError(f"{source!r} is neither an absolute path nor a hub id (owner/name)")
    return _fetch(source).resolve()


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint folder that count, sorted by name."""
    return sorted(
        {file for pattern in CHECKPOINT_PATTERNS for file in path.glob(pattern) if file.is_file()}
    )


def digest_of_files(files: Mapping[str, str]) -> str:
    """A checkpoint's digest from the digests of its files, by file name."""
    return json_digest(dict(files))


def digest_of_weights(files: Mapping[str, str]) -> str:
    """The digest of a checkpoint's weights from the digests of its files, by file name: another
    chat template or tokenizer does not change it.
    """
    return json_digest({n: digest for n, digest in files.items() if n.endswith(".safetensors")})


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """The digest of each file, by its name."""
    return {file.name: file_digest(file) for file in files}


def _last_part(source: str | Path, path: Path) -> str:
    is_hub_id = not Path(source).expanduser().exists()
    return str(source).rsplit("/", 1)[-1] if is_hub_id else path.name


def _fetch(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(CHECKPOINT_PATTERNS))
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"{hub_id} is no folder here and could not be fetched from the hub ({first_line}): "
            f"check the path, or fetch it first by 'hf download {hub_id}'"
        ) from error
