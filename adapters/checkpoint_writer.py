"""Writing a checkpoint: tensors one after the other, in blocks of rows, into shards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint import INDEX, STORED_DTYPES, WEIGHTS, all_finite
from .errors import CheckpointError

SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

Announced = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""


@contextmanager
def checkpoint_writer(folder: Path, tensors: Announced) -> Iterator[CheckpointWriter]:
    """Write a checkpoint's tensors one after the other, in the order given, into shards.

    tensors: name to shape and dtype of everything that will be written.

    Raises:
        CheckpointError: the disk has too little room, or what is written was not announced so.
    """
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    try:
        check_room(folder, needed)
        with closing(CheckpointWriter(folder, tensors)) as writer:
            yield writer
            writer.finish()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


class CheckpointWriter:
    """Writes shards block by block; see `checkpoint_writer`."""

    def __init__(self, folder: Path, tensors: Announced) -> None:
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
        if dtype.is_floating_point and not all_finite(cast):
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
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, {needed:,} are needed: free some or write elsewhere"
        )


def _planned(
    tensors: Announced,
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
