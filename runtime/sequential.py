"""RegMean++: input moments of one block after another, behind blocks that are merged already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapters.backbone import linear_layers
from ..adapters.errors import UnsupportedModelError
from .calibration import Moment, Sums, summing
from .rendering import BATCH_SIZE, Batch, Rendered, batches


@dataclass
class _Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Running:
    """A batch on its way through the blocks. hidden: [b, t, d]. calls: one per block."""

    mask: Tensor
    hidden: Tensor
    calls: list[_Call] = field(default_factory=list)


class SequentialMoments:
    """One copy of a model, whose blocks are replaced by merged ones from the first to the last.

    For each block: `block` gives the second moments of its layers' inputs, expert by expert: the
    expert's prompts have run through the merged blocks before it and now run through the expert's
    own block. The caller merges the block and hands it to `merged`. Afterwards the model is the
    merged model.

        for index in range(sequential.blocks):
            moments = sequential.block(index, weights_of_every_expert(index))
            sequential.merged(index, merge(index, moments))

    Memory: the model, the hidden states of all prompts (tokens x d numbers), and per layer of one
    block and expert i² numbers of `dtype`.

    model: plain, in evaluation mode, with everything outside its blocks (embedding, norms) merged
    already. It is changed.
    prompts: of every expert, in the experts' order.
    on_prompt: called once per prompt and run through a block: 2 blocks - 1 times a prompt.

    Raises:
        UnsupportedModelError: the blocks are not found, or hand on more than hidden states.

    Source: Nguyen et al. 2025, RegMean++, arXiv:2508.03121; that the expert's own block
    runs behind merged ones is read off the code of FusionBench and MergeBench.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        prompts: Sequence[Sequence[Rendered]],
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = BATCH_SIZE,
        on_prompt: Callable[[], None] = lambda: None,
    ) -> None:
        self._prefix, self._blocks = decoder_blocks(model)
        self._layers = linear_layers(model)
        self._dtype = dtype
        self._on_prompt = on_prompt
        self._next = 0
        self._is_checked = False
        self._running = [
            [self._started(model, batch) for batch in batches(own, size=batch_size)]
            for own in prompts
        ]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def parameters(self, index: int) -> list[str]:
        """Full names of a block's parameters, a tied one once."""
        return [f"{self._prefix}.{index}.{n}" for n, _ in self._blocks[index].named_parameters()]

    @torch.inference_mode()
    def block(self, index: int, experts: Iterable[Mapping[str, Tensor]]) -> dict[str, list[Moment]]:
        """Input moments of the block's linear layers by full name, one per expert.

        index: of the block; blocks come in order.
        experts: the weights of the block of every expert, by full name, as the model stores them;
        what is left out stays the base's. They are taken one after the other.

        Raises:
            ValueError: not the next block, not as many experts as prompts, or unknown names.
        """
        self._check_order(index)
        layers = self._linear_layers(index)
        moments: dict[str, list[Moment]] = {name: [] for name in layers}
        for running, weights in zip(self._running, experts, strict=True):
            own = self._own(index, weights)
            with summing(layers, dtype=self._dtype) as sums:
                self._run(index, running, own, sums)
            for name, moment in sums.moments().items():
                moments[name].append(moment)
        return moments

    @torch.no_grad()
    def merged(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Put a merged block in place and move every prompt behind it.

        weights: merged parameters of the block by full name; what is left out stays the base's.

        Raises:
            ValueError: not the next block, or unknown names.
        """
        self._check_order(index)
        own = self._own(index, weights)
        for name, parameter in self._blocks[index].named_parameters():
            if name in own:
                parameter.copy_(own[name])
        self._next += 1
        if self._next == self.blocks:
            self._running = []
            return
        with torch.inference_mode():
            for running in self._running:
                for batch, hidden in zip(running, self._run(index, running, {}), strict=True):
                    batch.hidden = hidden

    def _run(
        self,
        index: int,
        running: Iterable[_Running],
        own: Mapping[str, Tensor],
        sums: Sums | None = None,
    ) -> list[Tensor]:
        """The hidden states behind a block, of all batches of an expert; own: as for `_applied`."""
        hidden = []
        for batch in running:
            if sums is not None:
                sums.mask = batch.mask
            hidden.append(_applied(self._blocks[index], batch.hidden, batch.calls[index], own))
            for _ in range(len(batch.mask)):
                self._on_prompt()
        return hidden

    def _linear_layers(self, index: int) -> dict[str, nn.Module]:
        block, prefix = self._blocks[index], f"{self._prefix}.{index}."
        names = [name for name in self._layers if name.startswith(prefix)]
        return {name: block.get_submodule(name.removeprefix(prefix)) for name in names}

    def _own(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their names inside the block, in the block's dtype and on its device."""
        known = dict(self._blocks[index].named_parameters())
        prefix = f"{self._prefix}.{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        for name, weight in own.items():
            if name not in known or known[name].shape != weight.shape:
                raise ValueError(f"{name!r} {tuple(weight.shape)} is no parameter of {prefix[:-1]}")
        return {name: weight.to(known[name]) for name, weight in own.items()}

    def _check_order(self, index: int) -> None:
        if index != self._next:
            raise ValueError(f"block {index} is not the next one, {self._next}")

    @torch.inference_mode()
    def _started(self, model: Any, batch: Batch) -> _Running:  # noqa: ANN401
        """A batch before the first block, with what every block is called with."""
        device = model.device
        running = _Running(batch.mask.to(device), torch.empty(0))
        outputs: list[Tensor] = []

        def keep_call(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not running.calls:
                running.hidden = args[0]
            running.calls.append(_Call(args[1:], kwargs))

        def keep_output(_block: nn.Module, _args: object, output: Tensor | tuple[Tensor]) -> None:
            outputs.append(_first(output))

        handles = [b.register_forward_pre_hook(keep_call, with_kwargs=True) for b in self._blocks]
        handles.append(self._blocks[-1].register_forward_hook(keep_output))
        try:
            ids = batch.token_ids.to(device)
            model.base_model(input_ids=ids, attention_mask=running.mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not self._is_checked:
            self._check_replay(running, outputs)
            self._is_checked = True
        return running

    def _check_replay(self, running: _Running, outputs: Sequence[Tensor]) -> None:
        """Run the blocks by themselves and see that the model's own hidden states come out."""
        hidden = running.hidden
        for block, call in zip(self._blocks, running.calls, strict=True):
            hidden = _applied(block, hidden, call, {})
        mask = running.mask
        if not torch.allclose(hidden[mask], outputs[0][mask], rtol=1e-3, atol=1e-4):
            raise UnsupportedModelError(
                "blocks of this model hand on more than hidden states: use regmean instead"
            )


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401
    """The full name of the list of a model's blocks, like `model.layers`, and the list.

    Raises:
        UnsupportedModelError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, child in model.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise UnsupportedModelError(f"{type(model).__name__} keeps its layers where they are not found")


def _applied(block: nn.Module, hidden: Tensor, call: _Call, own: Mapping[str, Tensor]) -> Tensor:
    """A block's hidden states; own: parameters that stand in for the block's."""
    return _first(functional_call(block, dict(own), (hidden, *call.args), call.kwargs))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
