"""Checkpoint: a Hugging Face checkpoint's tensors, read and written a few rows at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
        stop = min(stop, info.rows)
        row_bytes = info.columns * info.dtype.itemsize
        buffer = bytearray((stop - start) * row_bytes)
        _fill(buffer, info.file, info.offset + start * row_bytes)
        if not buffer:
            return torch.empty(stop - start, info.columns, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype).view(stop - start, info.columns)


@contextmanager
def checkpoint_writer(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint's tensors one after the other, in the order given, into shards.

    tensors: name to shape and dtype of everything that will be written.

    Raises:
        CheckpointError: the disk has too little room, or what is written was not announced so.
    """
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    check_room(folder, needed)
    try:
        with closing(CheckpointWriter(folder, tensors)) as writer:
            yield writer
            writer.finish()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


class CheckpointWriter:
    """Writes shards block by block; see `checkpoint_writer`."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self._folder = folder
        self._shards = _planned(tensors)
        self._pending = [
            (name, index) for index, names in enumerate(self._shards) for name in names
        ]
        self._tensors = tensors
        self._file = None if not self._shards else self._start(0)
        self._shard = 0

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write the next tensor from its rows, blocks of [b, i]; cast to the announced dtype.

        Raises:
            CheckpointError: NaN or inf, another tensor is due, or the rows are too few or too many.
        """
        if not self._pending:
            raise CheckpointError(f"tensor {name!r} was not announced")
        expected, shard = self._pending.pop(0)
        if name != expected:
            raise CheckpointError(f"tensor {name!r} was written where {expected!r} was due")
        if shard != self._shard:
            self._next_shard(shard)
        shape, dtype = self._tensors[name]
        written = sum(self._write_block(name, block, dtype) for block in blocks)
        if written != math.prod(shape):
            raise CheckpointError(
                f"tensor {name!r} has {written:,} entries, {math.prod(shape):,} were announced"
            )

    def _write_block(self, name: str, block: Tensor, dtype: torch.dtype) -> int:
        """Write some rows; how many entries they have."""
        cast = block.detach().to("cpu", dtype).contiguous()
        if dtype.is_floating_point and not cast.isfinite().all():
            raise CheckpointError(
                f"the merged tensor {name!r} holds NaN or inf in {str(dtype)[6:]}: "
                "lower the scale, or write float32"
            )
        assert self._file is not None
        self._file.write(cast.view(-1).view(torch.uint8).numpy().data)
        return cast.numel()

    def finish(self) -> None:
        """Check that everything was written, and write the index when there are several shards."""
        if self._pending:
            raise CheckpointError(f"tensor {self._pending[0][0]!r} was never written")
        self.close()
        if len(self._shards) > 1:
            names = {n: self._name(k) for k, shard in enumerate(self._shards) for n in shard}
            total = sum(math.prod(s) * d.itemsize for s, d in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def close(self) -> None:
        """Close the open shard."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_shard(self, index: int) -> None:
        self.close()
        self._file, self._shard = self._start(index), index

    def _start(self, index: int) -> BinaryIO:
        """Open a shard and write its header: the format is 8 bytes of length, JSON, then data.

        Source: the safetensors format, github.com/huggingface/safetensors.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[index]:
            shape, dtype = self._tensors[name]
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self._folder / self._name(index)).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def _name(self, index: int) -> str:
        count = len(self._shards)
        if count == 1:
            return WEIGHTS
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CheckpointError: fewer than `needed` bytes are free where `folder` is.
    """
    statistics = os.statvfs(folder)
    free = statistics.f_bavail * statistics.f_frsize
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, {needed:,} are needed: free some or write elsewhere"
        )


def _planned(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> list[list[str]]:
    """Names of the tensors of each shard, filled in order."""
    shards: list[list[str]] = []
    size = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if not shards or size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


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
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{file} stores {name!r} as {dtype}: quantised checkpoints cannot be merged, "
                "save the model in bfloat16"
            )
        found[name] = TensorInfo(shape, _DTYPES[dtype], file, offset)
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
