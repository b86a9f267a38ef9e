"""Checkpoint: a Hugging Face checkpoint's tensors, read a few rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MODEL_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What models are stored and run in, by the names that users write."""

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors files call them."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. offset: of its first byte in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        """Rows of the matrix that `as_rows` makes of it: a vector is one row."""
        return 1 if len(self.shape) < 2 else math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder by name. Nothing is read before it is asked for, and what
    is read is a copy: no file stays mapped, so that memory is what the caller holds.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of all shards.

        Raises:
            CheckpointError: a shard is missing, truncated or damaged, or holds a tensor twice.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in _shards(path):
            for name, info in _read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{file} holds the tensor {name!r}, as does {tensors[name].file.name}: "
                        "remove the files of another save from the folder"
                    )
                tensors[name] = info
        return cls(path, tensors)

    @classmethod
    def of_file(cls, file: Path) -> Checkpoint:
        """The tensors of one file.

        Raises:
            CheckpointError: it is missing, truncated or damaged.
        """
        return cls(file.parent, _read_header(file))

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype and shape."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor as a matrix, [b, i]; see `TensorInfo.rows`.

        Raises:
            CheckpointError: the file was removed or truncated since it was opened.
        """
        info = self.tensors[name]
        start, stop = min(start, info.rows), min(stop, info.rows)
        row_bytes = info.columns * info.dtype.itemsize
        buffer = bytearray((stop - start) * row_bytes)
        _fill(buffer, info.file, info.offset + start * row_bytes)
        if not buffer:
            return torch.empty(stop - start, info.columns, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype).view(stop - start, info.columns)


def all_finite(x: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor inf, by its least and greatest entry: several
    times faster than `isfinite`, whose masks are tensors of their own.
    """
    return x.numel() == 0 or all(math.isfinite(bound) for bound in x.aminmax())


def _shards(path: Path) -> list[Path]:
    """The one file of weights, else those that the index names, else all there are: transformers
    looks in this order too.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{path} holds no *.safetensors: convert it with save_pretrained(); pickled "
                "weights are never opened"
            )
        return files
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path} lacks the shard {name!r} that its index names: fetch it")
    return [path / name for name in names]


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file with their places: safetensors lays them out without gaps."""
    try:
        with file.open("rb") as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")
        with safe_open(file, framework="pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            headers = [(n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
    found: dict[str, TensorInfo] = {}
    for name, shape, dtype in headers:
        if dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{file} stores {name!r} as {dtype}: quantised checkpoints cannot be merged, "
                "save the model in bfloat16"
            )
        found[name] = TensorInfo(shape, STORED_DTYPES[dtype], file, offset)
        offset += found[name].nbytes
    if offset != file.stat().st_size:
        raise CheckpointError(
            f"{file} has {file.stat().st_size:,} bytes, its header says {offset:,}"
        )
    return found


def _fill(buffer: bytearray, path: Path, offset: int) -> None:
    """Read a file from `offset` until the buffer is full."""
    view, filled = memoryview(buffer), 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while filled < len(buffer):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{path} was truncated while it was read")
                filled += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
