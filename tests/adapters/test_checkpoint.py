"""Checkpoints read a few rows at a time, without a file that stays mapped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mergeroute.adapters.checkpoint import INDEX, Checkpoint, all_finite
from mergeroute.adapters.errors import CheckpointError

from ..tiny import make_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
SHAPES = [(), (7,), (5, 3), (0, 4), (2, 3, 4), (1, 1)]


def tensors() -> dict[str, Tensor]:
    """Every dtype in every shape, in no particular order of sizes."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{k}.{str(dtype)[6:]}": (torch.randn(shape, generator=generator) * 3).to(dtype)
        for k, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A model in three or more shards."""
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded"


def refuse(folder: Path, *texts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for text in texts:
        assert text in str(caught.value)


# Reading.


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    given = tensors()
    save_file(given, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    assert opened.tensors.keys() == given.keys()
    assert opened.nbytes == sum(tensor.nbytes for tensor in given.values())
    for name, tensor in given.items():
        found = opened.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 12), count=st.integers(0, 14))
def test_rows_are_rows_of_the_matrix(
    start: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = torch.arange(36, dtype=torch.bfloat16).view(3, 4, 3)
    save_file({"w": whole, "v": whole.flatten().clone()}, folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    wanted = whole.reshape(12, 3)[start : start + count]
    assert torch.equal(opened.read_rows("w", start, start + count), wanted)
    assert torch.equal(opened.read_rows("v", 0, 1), whole.reshape(1, -1))


def test_shards_are_one_checkpoint(shards: Path) -> None:
    opened = Checkpoint.open(shards)
    for name, parameter in make_model().named_parameters():
        assert torch.equal(opened.read(name), parameter)


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    whole, rows = opened.read("w"), opened.read_rows("w", 3, 9)
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(tmp_path) not in maps.read_text()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 10)
    (tmp_path / "model.safetensors").unlink()
    assert whole.sum() == 64 * 64
    assert rows.add_(1).sum() == 2 * 6 * 64
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened.read("w")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    opened = Checkpoint.open(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert opened.read_rows("w", 0, 63).sum() == 63 * 64
    with pytest.raises(CheckpointError, match="was truncated while it was read"):
        opened.read("w")


def test_the_one_file_counts_before_an_index_as_in_transformers(shards: Path) -> None:
    save_file({"w": torch.ones(2)}, shards / "model.safetensors")
    assert list(Checkpoint.open(shards).tensors) == ["w"]


# Damage.


def test_a_missing_shard_is_named(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    refuse(shards, str(shards), gone.name, "index", "fetch it")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named(share: float, shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(shards, str(path), "truncated")


def test_bytes_beyond_the_last_tensor_are_refused(shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"more")
    refuse(shards, str(path))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    refuse(tmp_path, "two.safetensors", "'w'", "one.safetensors", "remove")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}', "\xff", "[" * 200_000],
)
def test_a_damaged_index_is_refused(text: str, shards: Path) -> None:
    (shards / INDEX).write_bytes(text.encode("latin-1"))
    refuse(shards, "index")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_files_elsewhere(name: str, shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    refuse(shards, "lacks the shard", name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "no *.safetensors", "pickled weights are never opened")


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    refuse(tmp_path, "'w'", "F8_E4M3", "quantised")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("at", [0, 37, 99])
def test_nan_and_inf_are_found_wherever_they_are(dtype: torch.dtype, value: float, at: int) -> None:
    x = torch.linspace(-5, 5, 100).to(dtype)
    assert all_finite(x)
    x[at] = value
    assert all_finite(x) == bool(x.isfinite().all())
    assert all_finite(x[:0])
