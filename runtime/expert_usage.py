"""Expert usage: what a sparse mixture of experts does on calibration prompts, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.errors import DataError, UnsupportedModelError
from ..adapters.smoe.usage import LayerUsage
from .rendering import BATCH_SIZE, Rendered, batches
from .sparse_blocks import run_expert, sparse_blocks

SAMPLE = 2048
"""Tokens of which each layer keeps what they brought in."""


@dataclass(frozen=True)
class UsageOptions:
    """What is measured beside counts, logits and saliency.

    outputs: each expert's mean output over all tokens: every expert is run on every token.
    moments: second moments of what goes into them. sample: of how many tokens hidden states are
    kept, at most. seed: of which.
    """

    outputs: bool = False
    moments: bool = False
    sample: int = SAMPLE
    seed: int = 0


@torch.inference_mode()
def expert_usage(
    model: Any,  # noqa: ANN401 - transformers is untyped
    prompts: Sequence[Rendered],
    options: UsageOptions = UsageOptions(),
    *,
    batch_size: int = BATCH_SIZE,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, LayerUsage]:
    """How each sparse layer of a model routes the tokens of prompts and answers, padding left out.

    The chosen experts are run a second time, for their saliency. Memory, beside the model and one
    batch: for each layer `sample` x D numbers and E² of logits; with moments D² more. Mixtral 8x7B:
    1.1 GB, with moments 3.2 GB.

    model: in evaluation mode; its hooks are gone afterwards. An encoder-decoder is given a prompt
    on both sides. batch_size: a last batch that is shorter is used as it is.

    Raises:
        DataError: there are no prompts.
        UnsupportedModelError: the model has no sparse layer that is known, or gives NaN.
    """
    if not prompts:
        raise DataError("there are no calibration prompts: give at least one")
    watched = {name: _Watch(block, options) for name, block in sparse_blocks(model).items()}
    with _watching(watched.values()):
        for batch in batches(prompts, size=batch_size):
            mask = batch.mask.to(model.device)
            for watch in watched.values():
                watch.mask = mask.flatten()
            _run(model, batch.token_ids.to(mask.device), mask)
            for _ in range(len(mask)):
                on_prompt()
    return {name: watch.usage() for name, watch in watched.items()}


def _run(model: Any, ids: Tensor, mask: Tensor) -> None:  # noqa: ANN401
    if model.config.is_encoder_decoder:
        model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            use_cache=False,
        )
    else:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


class _Watch:
    """Running sums of one sparse block.

    mask: of the batch that runs, [b t], True at tokens that are no padding: these count.
    """

    def __init__(self, block: Any, options: UsageOptions) -> None:  # noqa: ANN401
        self.block = block
        self.options = options
        self.mask = torch.ones(0, dtype=torch.bool)
        self._router = block.gate if hasattr(block, "gate") else block.router.classifier
        self._logits = torch.empty(0)
        self._draw = torch.Generator().manual_seed(options.seed)
        experts, hidden = self._router.weight.shape
        device = self._router.weight.device
        self._counts = torch.zeros(experts, dtype=torch.long, device=device)
        self._gram = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        self._saliency = torch.zeros(experts, dtype=torch.float64, device=device)
        self._outputs = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
        size = hidden if options.moments else 0
        self._moment = torch.zeros(size, size, device=device)
        self._weight = torch.zeros((), device=device)
        self._lots = torch.empty(0, device=device)
        self._sample = torch.empty(0, hidden, device=device, dtype=self._router.weight.dtype)
        self._tokens = 0

    def hooks(self) -> Iterator[RemovableHandle]:
        """Begin to watch."""
        yield self._router.register_forward_hook(self._note)
        yield self.block.experts.register_forward_pre_hook(self._add)

    def _note(
        self, _router: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        """Keep the logits: what Switch's router is a layer for, and the first that others give."""
        logits = output if isinstance(output, Tensor) else output[0]
        self._logits = logits.reshape(-1, logits.shape[-1]).float()

    def _add(self, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add what goes into the experts: hidden states [t, D], the choice, and its gates."""
        hidden, choice, gates = inputs
        x, logits = hidden[self.mask], self._logits[self.mask]
        dense = _dense_gates(choice, gates, experts=logits.shape[1])[self.mask]
        self._tokens += len(x)
        self._counts += (dense > 0).sum(0)
        self._gram += (logits.T @ logits).double()
        self._draw_sample(x)
        if self.options.moments:
            squares = dense.square().sum(1)
            self._weight += squares.sum()
            self._moment += x.float().T @ (x.float() * squares[:, None])
        for expert, own in enumerate(dense.unbind(1)):
            self._add_expert(experts, expert, x, own)

    def _add_expert(self, experts: nn.Module, expert: int, x: Tensor, gates: Tensor) -> None:
        chosen = gates > 0
        asked = torch.ones_like(chosen) if self.options.outputs else chosen
        _, output = run_expert(experts, expert, x[asked])
        own, weights = chosen[asked], gates[chosen]
        self._saliency[expert] += (weights * output[own].float().norm(dim=1)).sum()
        if self.options.outputs:
            self._outputs[expert] += output.double().sum(0)

    def _draw_sample(self, x: Tensor) -> None:
        """Keep those of all tokens so far that drew the highest lots."""
        lots = torch.rand(len(x), generator=self._draw).to(x.device)
        lots, x = torch.cat([self._lots, lots]), torch.cat([self._sample, x])
        kept = lots.topk(min(self.options.sample, len(lots))).indices
        self._lots, self._sample = lots[kept], x[kept]

    def usage(self) -> LayerUsage:
        """The statistics, on the CPU.

        Raises:
            UnsupportedModelError: they hold NaN or inf.
        """
        if not (self._gram.isfinite().all() and self._saliency.isfinite().all()):
            raise UnsupportedModelError("hidden states hold NaN or inf: run the model in float32")
        outputs, moment = self._outputs / max(1, self._tokens), self._moment / self._weight
        return LayerUsage(
            tokens=self._tokens,
            counts=self._counts.cpu(),
            logit_gram=self._gram.cpu(),
            saliency=(self._saliency / self._counts.clamp(min=1)).float().cpu(),
            hidden=self._sample.float().cpu(),
            mean_outputs=outputs.float().cpu() if self.options.outputs else None,
            moment=moment.cpu() if self.options.moments else None,
        )


def _dense_gates(choice: Tensor, gates: Tensor, *, experts: int) -> Tensor:
    """Each token's gate of every expert, [t, E], 0 where it was not chosen.

    choice: [t, k] indices with gates [t, k], or Switch's one-hot [t, 1, E] with gates [t, 1].
    """
    if choice.ndim == 3:
        return choice[:, 0] * gates.float()
    dense = gates.new_zeros(len(gates), experts, dtype=torch.float32)
    return dense.scatter_add_(1, choice, gates.float())


@contextmanager
def _watching(watches: Iterable[_Watch]) -> Iterator[None]:
    handles = [handle for watch in watches for handle in watch.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
