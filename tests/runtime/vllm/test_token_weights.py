from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.runtime.vllm.token_weights import (
    active_runs,
    expandable,
    flat_a,
    flat_b,
    token_weights,
)


def row_of(lora_id: int) -> torch.Tensor:
    return torch.arange(3.0) + lora_id


@given(st.lists(st.integers(0, 4), max_size=40))
def test_every_token_gets_its_row(ids: list[int]) -> None:
    rows, places = token_weights(ids, row_of, slots=3)
    assert places.shape == (len(ids),)
    for token, lora_id in enumerate(ids):
        found = rows[places[token]]
        assert torch.equal(found, row_of(lora_id) if lora_id else torch.zeros(3))


@pytest.mark.parametrize(
    ("used", "runs"),
    [
        ([0, 0, 0], ()),
        ([1, 1, 1], ((0, 3),)),
        ([1, 0, 1], ((0, 1), (2, 3))),
        ([0, 1, 1], ((1, 3),)),
    ],
)
def test_slots_that_are_used_are_joined(used: list[int], runs: tuple[tuple[int, int], ...]) -> None:
    rows = torch.diag(torch.tensor(used, dtype=torch.float32) * -0.5)
    assert active_runs(rows) == runs


def test_stacks_are_multiplied_without_copies() -> None:
    slots, rank, out, width = 3, 2, 5, 4
    a = torch.randn(slots, 1, rank, width)
    (b,) = expandable((torch.zeros(slots, 1, out, rank),))
    assert b.shape == (slots, 1, out, rank)
    b[:] = torch.randn(slots, 1, out, rank)
    assert flat_b(b).data_ptr() == b.data_ptr()
    assert flat_a(a).data_ptr() == a.data_ptr()
    x, weights = torch.randn(6, width), torch.randn(6, slots)
    changed = (x @ flat_a(a).T * weights.repeat_interleave(rank, 1)) @ flat_b(b)
    slow = sum(weights[:, s, None] * (x @ a[s, 0].T @ b[s, 0].T) for s in range(slots))
    torch.testing.assert_close(changed, slow)
