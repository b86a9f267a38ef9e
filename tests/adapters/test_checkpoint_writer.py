"""Checkpoints written block by block, as safetensors and transformers read them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergeroute.adapters import checkpoint_writer as module
from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.checkpoint_writer import check_room, checkpoint_writer
from mergeroute.adapters.errors import CheckpointError

from ..tiny import make_model
from .test_checkpoint import tensors


def announced(given: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}


def rows_of(tensor: Tensor, count: int) -> Iterator[Tensor]:
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])
    return (matrix[start : start + count] for start in range(0, len(matrix), count))


def write(folder: Path, given: dict[str, Tensor], *, rows: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    with checkpoint_writer(folder, announced(given)) as writer:
        for name, tensor in given.items():
            writer.write(name, rows_of(tensor, rows))


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_what_is_written_is_what_safetensors_reads(rows: int, tmp_path: Path) -> None:
    given = {name: tensor for name, tensor in tensors().items() if tensor.numel()}
    write(tmp_path / "out", given, rows=rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_several_shards_are_read_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    model = make_model()
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write(tmp_path / "out", given)
    model.config.save_pretrained(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 45_000 for file in files)
    loaded, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(torch.equal(p, given[name]) for name, p in loaded.named_parameters())


def test_a_tensor_is_cast_to_the_announced_dtype(tmp_path: Path) -> None:
    with checkpoint_writer(tmp_path, {"w": ((2, 2), torch.bfloat16)}) as writer:
        writer.write("w", [torch.full((1, 2), 0.1), torch.full((1, 2), 3.0)])
    found = Checkpoint.open(tmp_path).read("w")
    assert torch.equal(found, torch.tensor([[0.1, 0.1], [3, 3]]).bfloat16())


def test_views_and_gradients_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    with checkpoint_writer(tmp_path, {"w": ((4, 3), torch.float32)}) as writer:
        writer.write("w", [whole.T[:2], whole.T[2:]])
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), whole.detach().T)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("b", [torch.ones(1, 2)], "'b' was written where 'a' was due"),
        ("a", [torch.ones(1, 2)], r"'a' has 2 entries, 4 were announced"),
        ("a", [torch.ones(3, 2)], r"'a' has 6 entries, 4 were announced"),
        ("a", [torch.tensor([[1.0, float("nan")]])], "'a' holds NaN or inf in float16"),
        ("a", [torch.tensor([[1.0, 1e6]])], "'a' holds NaN or inf in float16"),
    ],
)
def test_what_was_not_announced_is_refused(
    name: str, rows: list[Tensor], message: str, tmp_path: Path
) -> None:
    tensors = {"a": ((2, 2), torch.float16), "b": ((1, 2), torch.float16)}
    with (
        pytest.raises(CheckpointError, match=message),
        checkpoint_writer(tmp_path, tensors) as writer,
    ):
        writer.write(name, rows)


def test_what_was_announced_has_to_come(tmp_path: Path) -> None:
    tensors = {"a": ((2, 2), torch.float32)}
    with (
        pytest.raises(CheckpointError, match="'a' was never written"),
        checkpoint_writer(tmp_path, tensors),
    ):
        pass


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    with checkpoint_writer(tmp_path, {"b": ((1,), torch.float32)}) as writer:
        writer.write("b", [torch.ones(1, 1)])
        with pytest.raises(CheckpointError, match="'a' was not announced"):
            writer.write("a", [torch.ones(1, 1)])


def test_no_room_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"bytes free, .* are needed: free some"):
        check_room(tmp_path, 2 * free + 10**15)
    huge = {"w": ((1 << 25, 1 << 25), torch.float32)}
    with pytest.raises(CheckpointError, match="bytes free"), checkpoint_writer(tmp_path, huge):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        checkpoint_writer(tmp_path / "nowhere", {"w": ((1,), torch.float32)}),
    ):
        pass
