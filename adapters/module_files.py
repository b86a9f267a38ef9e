"""Files of a module folder: PEFT's factors, our int8 factors, vectors and gates beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .errors import ModuleError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INT8_FILE = "adapter_int8.safetensors"
VECTORS_FILE = "adapter_vectors.safetensors"
GATES_FILE = "adapter_gates.safetensors"

_PREFIX = "base_model.model."
_STATEMENTS = "mergeroute"
_TIES_HEAD = "ties_head"
_BACKBONES = "backbones"
_LEVELS = 127
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PEFT_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_"
    r"(?:(?P<side>[AB])(?:\.default)?\.weight|embedding_(?P<table>[AB])(?:\.default)?)"
)
_PEFT_FROZEN = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.base_layer\.(?:weight|bias)")
_INT8_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?:(?P<side>[AB])|embedding_(?P<table>[AB]))")
_SCALES = "scales"


@dataclass(frozen=True)
class Statements:
    """What folders of ours say beside PEFT's configuration, which takes no keys but its own.

    ties_head: of modules with embeddings; None where nothing is stated.
    backbones: digests of the weights that the module was made to stand on.
    """

    ties_head: bool | None = None
    backbones: tuple[str, ...] = ()

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Statements:
        """What a file's metadata says; folders of before backbones were recorded say `ties_head`
        alone.

        Raises:
            ModuleError: it is damaged.
        """
        try:
            said = json.loads(metadata.get(_STATEMENTS, "{}"))
            backbones = tuple(str(digest) for digest in said.get(_BACKBONES, ()))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModuleError(f"the metadata {_STATEMENTS!r} is damaged: {error}") from error
        if _TIES_HEAD in metadata:
            return cls(metadata[_TIES_HEAD] == "true", backbones)
        return cls(bool(said[_TIES_HEAD]) if _TIES_HEAD in said else None, backbones)

    @property
    def metadata(self) -> dict[str, str]:
        """The same as a file's metadata. One key alone: safetensors writes several in any order,
        and the same module other bytes.
        """
        said: dict[str, object] = {}
        if self.ties_head is not None:
            said[_TIES_HEAD] = self.ties_head
        if self.backbones:
            said[_BACKBONES] = self.backbones
        return {_STATEMENTS: json.dumps(said, sort_keys=True)} if said else {"format": "pt"}


@dataclass
class Factors:
    """The factors of a folder, float32.

    pairs: layer name to {"A": [r, i], "B": [o, r]}; of an embedding {"A": [r, V], "B": [d, r]}.
    embeddings: which of the layers are embeddings.
    stated: what folders of ours say beside them.
    """

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    stated: Statements = Statements()

    def put(self, match: re.Match[str], tensor: Tensor) -> None:
        """Add the factor that a tensor's name speaks of.

        Raises:
            ModuleError: it is there already.
        """
        layer, side = match["layer"], match["side"] or match["table"]
        sides = self.pairs.setdefault(layer, {})
        if side in sides or (sides and (layer in self.embeddings) != bool(match["table"])):
            raise ModuleError(
                f"the factor {match.string!r} is there twice, under two names: keep one"
            )
        sides[side] = tensor.float()
        if match["table"]:
            self.embeddings.add(layer)


def module_files(folder: Path) -> list[Path]:
    """The files of a module folder that count: configuration, factors, vectors and gates if there
    are any.

    Raises:
        ModuleError: the configuration or the factors are missing, or the factors are there twice.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ModuleError(f"{folder} holds no {CONFIG_FILE}: name a PEFT LoRA folder")
    beside = [folder / name for name in (VECTORS_FILE, GATES_FILE)]
    return [
        folder / CONFIG_FILE,
        _factors_file(folder),
        *(file for file in beside if file.is_file()),
    ]


def _factors_file(folder: Path) -> Path:
    found = [folder / name for name in (WEIGHTS_FILE, INT8_FILE) if (folder / name).is_file()]
    if len(found) > 1:
        raise ModuleError(
            f"{folder} holds both {WEIGHTS_FILE} and {INT8_FILE}: they may differ, remove one"
        )
    if not found:
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "it holds a pickle, which is never opened: save it with safe_serialization=True"
        raise ModuleError(
            f"{folder} holds no {WEIGHTS_FILE} and no {INT8_FILE}"
            + (f"; {remedy}" if pickled else ": copy the folder again")
        )
    return found[0]


def read_factors(folder: Path) -> Factors:
    """The factors of a folder, whichever file holds them.

    Raises:
        ModuleError: as `module_files`; or the file is damaged or holds other tensors.
    """
    path = _factors_file(folder)
    tensors, frozen, metadata = _read(path)
    try:
        if path.name == INT8_FILE:
            factors = _int8_factors(tensors)
        else:
            factors = _peft_factors(tensors)
            _check_frozen(frozen, factors)
        factors.stated = Statements.read(metadata)
    except ModuleError as error:
        raise ModuleError(f"{path}: {error}") from error
    return factors


def read_vectors(folder: Path) -> dict[str, Tensor]:
    """Changes of norm weights, norm biases and linear biases by parameter name, float32.

    Raises:
        ModuleError: the file is damaged, or holds what is no vector of floats.
    """
    return _read_vectors(folder / VECTORS_FILE)


def read_gates(folder: Path) -> dict[str, Tensor]:
    """Gate vectors by layer name, float32.

    Raises:
        ModuleError: the file is damaged, or holds what is no vector of floats.
    """
    return _read_vectors(folder / GATES_FILE)


def _read_vectors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    vectors, frozen, _ = _read(path)
    if frozen:
        raise ModuleError(f"{path}: {frozen[0]!r} is no parameter of a backbone")
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.dtype not in _FLOATS:
            raise ModuleError(
                f"{path}: {name!r} is {vector.dtype} of shape {tuple(vector.shape)}, a vector of "
                "floats is needed: write the folder again"
            )
    return {name: vector.float() for name, vector in vectors.items()}


def write_factors(
    folder: Path,
    factors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    stated: Statements = Statements(),
) -> None:
    """Write factors, `<layer>.lora_A` and so on, in the place of those that are there.

    dtype: int8 writes our own file, a float dtype PEFT's.
    stated: what to say beside them.

    Raises:
        ModuleError: no such storage.
    """
    if dtype not in (*_FLOATS, torch.int8):
        raise ModuleError(f"factors cannot be stored as {dtype}: choose a float dtype or int8")
    is_int8 = dtype == torch.int8
    tensors = dict(_quantised(factors) if is_int8 else _as_peft(factors, dtype))
    save_file(tensors, folder / (INT8_FILE if is_int8 else WEIGHTS_FILE), metadata=stated.metadata)
    (folder / (WEIGHTS_FILE if is_int8 else INT8_FILE)).unlink(missing_ok=True)


def write_vectors(folder: Path, vectors: Mapping[str, Tensor]) -> None:
    """Write vectors as float32 in the place of those that are there; none leave no file."""
    _write_vectors(folder / VECTORS_FILE, vectors)


def write_gates(folder: Path, gates: Mapping[str, Tensor]) -> None:
    """Write gate vectors as float32 in the place of those that are there; none leave no file."""
    _write_vectors(folder / GATES_FILE, gates)


def _write_vectors(path: Path, vectors: Mapping[str, Tensor]) -> None:
    path.unlink(missing_ok=True)
    if vectors:
        tensors = {name: vectors[name].float().clone() for name in sorted(vectors)}
        save_file(tensors, path, metadata={"format": "pt"})


def quantise(factor: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Round a factor to int8, symmetrically, with one scale per component.

    factor: a matrix, finite. dim: its dimension that counts components.
    Returns int8 of the same shape, and scales [r], bfloat16: the largest size over 127. An
    entry is off by at most half its scale; a component of zeros has scale zero.
    """
    factor = factor.float()
    if not factor.numel():
        return factor.to(torch.int8), factor.new_zeros(factor.shape[dim], dtype=torch.bfloat16)
    scales = (factor.abs().amax(1 - dim) / _LEVELS).bfloat16()
    steps = scales.float().where(scales > 0, 1.0).unsqueeze(1 - dim)
    return (factor / steps).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scales


def dequantise(levels: Tensor, scales: Tensor, *, dim: int) -> Tensor:
    """The factor that int8 levels and their scales stand for, float32."""
    return levels.float() * scales.float().unsqueeze(1 - dim)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """The tensors of a file, the names of copies of frozen base weights, and the metadata."""
    try:
        content = path.read_bytes()
        # not safe_open: its tensors stay mapped from a file that may be cut short under them, and
        # each that it makes leaks some bytes (safetensors 0.8), for good in a server that reloads
        tensors = load(content)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise ModuleError(f"{path} is damaged or truncated: {error}") from error
    frozen = [name for name in sorted(tensors) if _PEFT_FROZEN.fullmatch(name)]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    kept = {name: tensors[name] for name in sorted(tensors) if name not in frozen}
    return kept, frozen, header.get("__metadata__", {})


def _peft_factors(tensors: Mapping[str, Tensor]) -> Factors:
    factors = Factors()
    for name, tensor in tensors.items():
        match = _PEFT_FACTOR.fullmatch(name)
        if match is None:
            raise ModuleError(_why_refused(name))
        factors.put(match, tensor)
    return factors


def _check_frozen(names: Iterable[str], factors: Factors) -> None:
    """Beside the factors of embeddings and heads PEFT saves a copy of the base weight, which was
    not trained and is no part of the change.
    """
    for name in names:
        match = _PEFT_FROZEN.fullmatch(name)
        assert match is not None
        if match["layer"] not in factors.pairs:
            raise ModuleError(_why_refused(name))


def _why_refused(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return f"tensor {name!r} belongs to DoRA: train with use_dora=False"
    if name.endswith(".bias"):
        return f"tensor {name!r} is a bias: train with bias='none' and lora_bias=False"
    return (
        f"tensor {name!r} is no LoRA factor (…lora_A.weight or …lora_B.weight): "
        "train without modules_to_save"
    )


def _as_peft(
    factors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of PEFT's file. Copies: safetensors refuses tensors that share memory."""
    for name, tensor in factors:
        suffix = "" if ".lora_embedding_" in name else ".weight"
        yield f"{_PREFIX}{name}{suffix}", tensor.to(dtype, copy=True).contiguous()


def _quantised(factors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The levels of every factor, and the scales of all in the order of their names."""
    scales = []
    for name, tensor in sorted(factors, key=lambda factor: factor[0]):
        levels, own = quantise(tensor, dim=_component_dim(name))
        scales.append(own)
        yield name, levels.contiguous()
    yield _SCALES, torch.cat([torch.empty(0, dtype=torch.bfloat16), *scales])


def _int8_factors(tensors: Mapping[str, Tensor]) -> Factors:
    names = sorted(tensors.keys() - {_SCALES})
    counts = [_components(name, tensors[name]) for name in names]
    scales = _checked_scales(tensors.get(_SCALES), sum(counts))
    factors = Factors()
    for name, own in zip(names, torch.split(scales, counts), strict=True):
        match = _INT8_FACTOR.fullmatch(name)
        assert match is not None
        factors.put(match, dequantise(tensors[name], own, dim=_component_dim(name)))
    return factors


def _components(name: str, levels: Tensor) -> int:
    """How many components an int8 factor has.

    Raises:
        ModuleError: it is none.
    """
    if _INT8_FACTOR.fullmatch(name) is None:
        raise ModuleError(f"tensor {name!r} is no int8 factor: write the folder again")
    if levels.dtype != torch.int8 or levels.ndim != 2:
        raise ModuleError(
            f"{name!r} is {levels.dtype} of shape {tuple(levels.shape)}, an int8 matrix is needed: "
            f"factors in floats belong into {WEIGHTS_FILE}"
        )
    return levels.shape[_component_dim(name)]


def _checked_scales(scales: Tensor | None, count: int) -> Tensor:
    """The scales of all factors.

    Raises:
        ModuleError: they are missing, too few or too many, or no positive numbers.
    """
    if scales is None:
        raise ModuleError(f"{_SCALES!r} is missing: the file is incomplete")
    if scales.dtype != torch.bfloat16 or tuple(scales.shape) != (count,):
        raise ModuleError(
            f"{_SCALES!r} is {scales.dtype} of shape {tuple(scales.shape)}, bfloat16 of shape "
            f"({count},) is needed: one scale per component of each factor"
        )
    if not (scales.isfinite().all() and (scales >= 0).all()):
        raise ModuleError(f"{_SCALES!r} holds NaN, inf or a negative scale: it is damaged")
    return scales


def _component_dim(name: str) -> int:
    """Components are the rows of A and the columns of B."""
    return 0 if name.endswith("A") else 1
