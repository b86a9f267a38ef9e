"""Both wrappers against plain products; that for CUDA where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.runtime.vllm.token_weights import expandable

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]

SLOTS, RANK, WIDTH, SIZES = 4, 3, 16, (12, 6)
BLENDS = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, -1, 0.25], [0, 0, 1, 0]])
PLACES = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(
    scope="module", params=["wrapper_cpu.BlendWrapperCPU", "wrapper_cuda.BlendWrapperCUDA"]
)
def wrapper(request: pytest.FixtureRequest) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    kind = resolve_obj_by_qualname(f"mergeroute.runtime.vllm.{request.param}")
    return kind(8, 8, "cpu", lora_config=SimpleNamespace(max_loras=SLOTS))


@pytest.fixture(scope="module")
def stacks() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH) for _ in SIZES)
    b = expandable([torch.zeros(SLOTS, 1, size, RANK) for size in SIZES])
    for stack in b:
        stack[:] = torch.randn(stack.shape)
    return a, b


def slow(x: Tensor, stacks: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], rows: Tensor) -> Tensor:
    parts = [
        torch.einsum("ts,sri,ti,sor->to", rows, a[:, 0], x, b[:, 0])
        for a, b in zip(*stacks, strict=True)
    ]
    return torch.cat(parts, 1)


def test_each_row_gets_its_blend_and_bare_rows_stay(wrapper: Any, stacks: Any) -> None:
    x, y = torch.randn(len(PLACES), WIDTH), torch.randn(len(PLACES), sum(SIZES))
    wrapper.set_weights(BLENDS, PLACES)
    found = wrapper.add_lora_linear(y.clone(), x, *stacks, 1.0, SIZES)
    torch.testing.assert_close(found, y + slow(x, stacks, BLENDS[PLACES]))
    assert torch.equal(found[[0, 3]], y[[0, 3]])


def test_without_blends_nothing_is_done(wrapper: Any, stacks: Any) -> None:
    x, y = torch.full((3, WIDTH), torch.nan), torch.randn(3, sum(SIZES))
    wrapper.set_weights(BLENDS[:1], torch.zeros(3, dtype=torch.long))
    assert torch.equal(wrapper.add_lora_linear(y.clone(), x, *stacks, 1.0, SIZES), y)


def test_what_is_not_blended_is_refused(wrapper: Any) -> None:
    for name in ("add_shrink", "add_lora_embedding", "add_lora_logits", "add_lora_fused_moe"):
        with pytest.raises(NotImplementedError, match="only inner linear layers are blended"):
            getattr(wrapper, name)()


def test_the_compiler_needs_no_look_into_the_cuda_wrapper(stacks: Any) -> None:
    """Weights that change after compiling, and rows of padding, are followed all the same."""
    from mergeroute.runtime.vllm.wrapper_cuda import BlendWrapperCUDA

    made = BlendWrapperCUDA(8, 8, "cpu", lora_config=SimpleNamespace(max_loras=SLOTS))
    compiled = torch.compile(
        lambda y, x: made.add_lora_linear(y, x, stacks[0], stacks[1], 1.0, SIZES),
        fullgraph=True,
        backend="eager",
    )
    x, y = torch.randn(8, WIDTH), torch.zeros(8, sum(SIZES))
    for rows in (BLENDS, BLENDS[:1], BLENDS.flip(0)):
        places = PLACES.clamp(max=len(rows) - 1)
        made.set_weights(rows, places)
        expected = slow(x[:5], stacks, rows[places])
        found = compiled(y.clone(), x)
        torch.testing.assert_close(found[:5], expected)
        assert not found[5:].any()
