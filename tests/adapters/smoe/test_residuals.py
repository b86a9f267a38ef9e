"""What an expert has beside its centre: exact at full rank, rounded and packed as it is stored."""

from __future__ import annotations

import pytest
import torch

from mergeroute.adapters.errors import CheckpointError
from mergeroute.adapters.smoe.residuals import packed, residual, unpacked


@pytest.mark.parametrize("shape", [(48, 32), (32, 24), (24, 40)])
def test_full_rank_gives_the_change_back(shape: tuple[int, int]) -> None:
    change = torch.randn(shape)
    found = residual(change, rank=1000)
    assert found.low_rank.rank == min(shape)
    assert torch.allclose(found.dense(), change, atol=1e-5)


def test_rank_zero_of_a_change_of_zero() -> None:
    found = residual(torch.zeros(6, 5), rank=2)
    assert not found.dense().any()


def test_rows_are_kept_where_the_rank_misses_most() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.outer(torch.randn(40, generator=generator), torch.randn(30, generator=generator))
    change[7] += 0.5 * torch.randn(30, generator=generator)
    change[21] += 0.5 * torch.randn(30, generator=generator)
    found = residual(change, rank=1, rows=0.05)
    assert found.rows.tolist() == [7, 21]
    assert torch.allclose(found.dense()[[7, 21]], change[[7, 21]], atol=1e-5)
    assert (found.dense() - change).norm() < (residual(change, rank=1).dense() - change).norm()


def test_a_moment_keeps_outputs_closer_than_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(20, 16, generator=generator)
    x = torch.randn(500, 16, generator=generator) * torch.logspace(0, -2, 16)
    fitted = residual(change, rank=4, moment=x.T @ x / 500).dense()
    plain = residual(change, rank=4).dense()
    assert (x @ (fitted - change).T).norm() < 0.7 * (x @ (plain - change).T).norm()
    assert (fitted - change).norm() > (plain - change).norm()


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.int8, 3e-2)]
)
def test_what_is_packed_comes_back_rounded(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(12, 10, generator=generator) for _ in range(3)]
    residuals = [residual(c, rank=r, rows=0.25) for c, r in zip(changes, (1, 4, 2), strict=True)]
    stored = packed(residuals, dtype)
    assert stored["left"].dtype == dtype
    assert stored["left"].shape == (12, 7)
    for own, back in zip(residuals, unpacked(stored), strict=True):
        assert own.low_rank.rank == back.low_rank.rank
        assert torch.equal(own.rows, back.rows)
        assert (own.dense() - back.dense()).norm() <= error * own.dense().norm()


def test_int8_takes_a_byte_a_number_and_two_for_each_scale() -> None:
    stored = packed([residual(torch.randn(12, 10), rank=3)] * 2, torch.int8)
    size = sum(tensor.nbytes for name, tensor in stored.items() if name != "ranks")
    assert size == 2 * (3 * (12 + 10) + 2 * 3 * 2)


@pytest.mark.parametrize("change", ["ranks", "rank", "rows", "values", "left", "scales"])
def test_tensors_that_do_not_fit_are_refused(change: str) -> None:
    stored = dict(packed([residual(torch.randn(6, 5), rank=2, rows=0.5)] * 2, torch.int8))
    if change == "ranks":
        stored["ranks"] = torch.tensor([2, 9])
    elif change == "rank":
        stored["ranks"] = torch.tensor(2)
    elif change == "values":
        stored["values"] = stored["values"][:, :4]
    elif change == "rows":
        stored["rows"] = stored["rows"] + 5
    elif change == "left":
        stored["left"] = stored["left"][:, :3]
    else:
        del stored["left_scales"]
    with pytest.raises(CheckpointError, match="residuals do not fit together"):
        unpacked(stored)
