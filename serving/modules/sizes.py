"""How large a module is, told by its files' sizes and headers before a tensor is read."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, Field, ValidationError

from ...adapters.checkpoint import STORED_DTYPES
from ...adapters.module_files import CONFIG_FILE
from ..access.limits import Limits
from ..errors import ApiError
from .paths import FILES

_MAX_CONFIG_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 1 << 10
_MAX_PATTERNS = 256  # of each kind, so that all stay in the cache of `re`
_MAX_PATTERN = 1000
_MAX_TENSOR_NAME = 512
_QUANTIFIER = re.compile(r"(?<!\\)[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_MAX_GROUPS = 16
_MAX_WAYS = 10_000


_Count = Annotated[int, Field(ge=0)]


class _Stored(BaseModel):
    """What a header says of a tensor."""

    dtype: str
    shape: Annotated[list[_Count], Field(max_length=8)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


def check_sizes(folder: Path, limits: Limits) -> None:
    """Refuse a module that is larger than allowed, or whose files are not what they say.

    Raises:
        ApiError: it names the file and the rule.
    """
    total = 0
    for name in FILES:
        try:
            file = _open(folder / name)
        except FileNotFoundError:  # whether it is needed is for who reads the module
            continue
        except OSError as error:
            raise _invalid(f"{name} in lora_path cannot be opened: {error.strerror}") from error
        with file:
            total += _checked(name, file, limits)
    if total > limits.module_bytes:
        raise _invalid(
            f"the module has {total:,} bytes, the limit is {limits.module_bytes:,} "
            "(limits.module_bytes)"
        )


def _open(path: Path) -> BinaryIO:
    """Without waiting for a pipe's other end."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def _checked(name: str, file: BinaryIO, limits: Limits) -> int:
    """The size of one file, whose content is looked at as far as its header goes."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise _invalid(f"{name} in lora_path is no regular file: put the adapter's file there")
    if name == CONFIG_FILE:
        _check_config(file, found.st_size)
    elif found.st_size <= limits.module_bytes:
        for tensor, entry in _header(name, file, found.st_size, limits).items():
            _check_tensor(name, tensor, entry, limits)
    return found.st_size


def _check_config(file: BinaryIO, size: int) -> None:
    """Small, and with patterns that end: they are matched by `re`, which nested quantifiers and
    overlapping alternatives keep busy for ever. What else is wrong is for who reads it.
    """
    if size > _MAX_CONFIG_BYTES:
        raise _invalid(f"{CONFIG_FILE} has {size:,} bytes, at most {_MAX_CONFIG_BYTES:,} are read")
    config = _object(CONFIG_FILE, file.read())
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping) or len(patterns) > _MAX_PATTERNS:
            raise _invalid(f"{CONFIG_FILE}: {key} must be an object of up to {_MAX_PATTERNS:,}")
        if not all(map(_ends, patterns)):
            raise _invalid(
                f"{CONFIG_FILE}: a pattern in {key} has several of * + ? {{, one behind a group, "
                f"over {_MAX_GROUPS} groups, {_MAX_WAYS:,} combinations of alternatives or "
                f"{_MAX_PATTERN:,} characters: write layers' names"
            )


def _ends(pattern: str) -> bool:
    """Whether matching takes a time that can be waited for."""
    return (
        len(pattern) <= _MAX_PATTERN
        and len(_QUANTIFIER.findall(pattern)) <= 1
        and not _REPEATED_GROUP.search(pattern)
        and pattern.count("(") <= _MAX_GROUPS
        and _ways(pattern) <= _MAX_WAYS
    )


def _ways(pattern: str) -> int:
    """At least the number of ways to choose one alternative in every group."""
    return math.prod(1 + part.count("|") for part in re.split("[()]", pattern))


def _header(name: str, file: BinaryIO, size: int, limits: Limits) -> dict[str, Any]:
    """The tensors that a safetensors file says it holds.

    Source: safetensors' README: 8 bytes of the header's length, the header, the tensors.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise _invalid(f"{name} is no safetensors file: its header would be {length:,} bytes long")
    if length > limits.module_tensors * _HEADER_BYTES_PER_TENSOR:
        raise _invalid(f"{name} has a header of {length:,} bytes, too many (limits.module_tensors)")
    tensors = _object(name, file.read(length))
    tensors.pop("__metadata__", None)
    if len(tensors) > limits.module_tensors:
        raise _invalid(
            f"{name} holds {len(tensors):,} tensors, the limit is {limits.module_tensors:,} "
            "(limits.module_tensors)"
        )
    held = sum(_held(name, tensor, entry) for tensor, entry in tensors.items())
    if held != size - 8 - length:
        raise _invalid(f"{name} has {size:,} bytes, its header says {8 + length + held:,}")
    return tensors


def _held(name: str, tensor: str, entry: object) -> int:
    """Bytes of a tensor, which its shape, dtype and offsets must agree on."""
    if len(tensor) > _MAX_TENSOR_NAME:
        raise _invalid(
            f"{name} names a tensor in {len(tensor):,} characters, at most {_MAX_TENSOR_NAME} are "
            f"read: {tensor[:60]!r}..."
        )
    try:
        stored = _Stored.model_validate(entry, strict=True)
    except ValidationError as error:
        raise _invalid(f"{name} is damaged: it describes {tensor[:200]!r} wrongly") from error
    dtype, (begin, end) = STORED_DTYPES.get(stored.dtype), stored.data_offsets
    size = math.prod(stored.shape) * (dtype.itemsize if dtype else 0)
    if dtype is None or size != end - begin:
        raise _invalid(f"{name} is damaged: {tensor[:200]!r} is not of the size that it states")
    return size


def _check_tensor(name: str, tensor: str, entry: Mapping[str, Any], limits: Limits) -> None:
    """Refuse ranks over the limit. Of a factor's two dimensions the smaller is its rank, except in
    layers that are smaller still, where a rank over theirs adds nothing.
    """
    rank = min(entry["shape"], default=0)
    if len(entry["shape"]) > 1 and rank > limits.module_rank and ".lora_" in tensor:
        raise _invalid(
            f"{tensor[:200]!r} in {name} has rank {rank:,}, the limit is {limits.module_rank:,} "
            "(limits.module_rank)",
            code="lora_rank_limit_exceeded",
        )


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{name} is damaged: no JSON where JSON belongs") from error
    if not isinstance(found, dict):
        raise _invalid(f"{name} is damaged: no JSON object where one belongs")
    return found


def _invalid(message: str, *, code: str = "invalid_lora_adapter") -> ApiError:
    return ApiError(message, param="lora_path", code=code)
