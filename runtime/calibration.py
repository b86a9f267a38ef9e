"""Calibration: what a plain model sees and learns on prompts, as numbers that merges weigh by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.backbone import linear_layers
from ..adapters.errors import DataError, UnsupportedModelError
from .rendering import BATCH_SIZE, Rendered, batches

LABELS = Literal["answers", "sampled"]


@dataclass(frozen=True)
class Moment:
    """The second moment of a layer's inputs.

    gram: sum of x xᵀ over tokens, [i, i]. count: of tokens.
    """

    gram: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """Mean of x xᵀ over tokens, [i, i]: does not grow with the length of the prompts."""
        return self.gram / max(1, self.count)


@torch.inference_mode()
def input_moments(
    model: Any,  # noqa: ANN401
    prompts: Sequence[Rendered],
    *,
    layers: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = BATCH_SIZE,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Moment]:
    """Second moments of the inputs of linear layers, over every token of prompts and answers.

    Memory: i² numbers of `dtype` per layer, on the model's device, all chosen layers at once. In
    a Llama 7B that is 64 MB a layer, 460 MB for `down_proj`: choose a few blocks at a time.

    model: plain, in evaluation mode. Its weights are the expert's.
    layers: names of `linear_layers`, or of the head; default all of them but the head.
    dtype: of products and sums.
    on_prompt: called once per prompt.

    Raises:
        UnsupportedModelError: no such layer, one whose inputs cannot be told from padding, or NaN.
    """
    chosen = _chosen_layers(model, layers)
    head = model.get_output_embeddings()
    run = model if any(layer is head for layer in chosen.values()) else model.base_model
    with summing(chosen, dtype=dtype) as sums:
        for batch in batches(prompts, size=batch_size):
            mask = batch.mask.to(model.device)
            sums.mask = mask
            run(input_ids=batch.token_ids.to(mask.device), attention_mask=mask, use_cache=False)
            for _ in range(len(mask)):
                on_prompt()
    return sums.moments()


def fisher_diagonals(
    model: Any,  # noqa: ANN401
    prompts: Sequence[Rendered],
    *,
    parameters: Collection[str] | None = None,
    labels: LABELS = "answers",
    seed: int = 0,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Mean over prompts of the squared gradient of the log-likelihood of their labels, float32.

    The log-likelihood is summed over the answer's tokens; for a prompt without an answer, over all
    its positions. One prompt at a time: no padding. Memory: gradients and sums, each as many
    numbers as the parameters chosen.

    model: plain, in evaluation mode; its gradients stay as they are.
    parameters: names as in `named_parameters`, where a tied weight has one; default all.
    labels: `answers` takes the answer's own tokens (the empirical Fisher; near zero for an expert
    that knows its answers by heart), and draws labels where there is no answer; `sampled` always
    draws them from the model's own distribution, given the tokens before (the Fisher proper).
    seed: of the labels drawn.
    on_prompt: called once per prompt.

    Raises:
        UnsupportedModelError: no such parameter.
        DataError: there are no prompts.

    Source: Matena and Raffel 2022, arXiv:2111.09832, section 2.
    """
    if not prompts:
        raise DataError("no prompts to measure the Fisher information on: give at least one")
    chosen = _chosen_parameters(model, parameters)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _differentiable(chosen.values()):
        for prompt in prompts:
            score = _log_likelihood(model, prompt, labels, generator)
            gradients = torch.autograd.grad(score, list(chosen.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            on_prompt()
    return {name: total / len(prompts) for name, total in totals.items()}


class Sums:
    """Running sums of x xᵀ by layer.

    mask: of the batch that runs, [b, t], True at tokens that are no padding: these count.
    """

    def __init__(self, inputs: Mapping[str, int], dtype: torch.dtype) -> None:
        self._inputs = inputs
        self._dtype = dtype
        self._grams: dict[str, Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(inputs, 0)
        self.mask = torch.ones(0, 0, dtype=torch.bool)

    def add(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what goes into a layer: its forward pre-hook."""
        rows = self._real_rows(inputs[0].detach(), name).to(self._dtype)
        if name not in self._grams:
            self._grams[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._grams[name].addmm_(rows.T, rows)
        self._counts[name] += len(rows)

    def moments(self) -> dict[str, Moment]:
        """The sums by layer; zeros for a layer that never ran.

        Raises:
            UnsupportedModelError: one holds NaN or inf.
        """
        if bad := [name for name, gram in self._grams.items() if not gram.isfinite().all()]:
            raise UnsupportedModelError(f"inputs of {bad[0]} hold NaN or inf: run it in float32")
        unseen = {name: size for name, size in self._inputs.items() if name not in self._grams}
        zeros = {name: torch.zeros(n, n, dtype=self._dtype) for name, n in unseen.items()}
        grams = self._grams | zeros
        return {name: Moment(grams[name], self._counts[name]) for name in self._inputs}

    def _real_rows(self, x: Tensor, name: str) -> Tensor:
        """x [b, t, i], or [b t, i], without padding, [tokens, i]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.mask.all():
            return rows
        if len(rows) != self.mask.numel():
            raise UnsupportedModelError(
                f"{name} is not given one row per token, padding cannot be told: use batch_size=1"
            )
        return rows[self.mask.flatten()]


@contextmanager
def summing(layers: Mapping[str, nn.Module], *, dtype: torch.dtype) -> Iterator[Sums]:
    """Sum x xᵀ of the inputs of linear layers, by name, while the context lasts."""
    sums = Sums({name: _inputs(layer) for name, layer in layers.items()}, dtype)
    handles = [
        layer.register_forward_pre_hook(partial(sums.add, name)) for name, layer in layers.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _inputs(layer: nn.Module) -> int:
    """The i of a linear layer; Conv1D stores [i, o]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[0]


def _chosen_layers(model: Any, names: Collection[str] | None) -> dict[str, nn.Module]:  # noqa: ANN401
    head = model.get_output_embeddings()
    known = {name: layer for name, layer in model.named_modules() if layer is head}
    known |= {name: model.get_submodule(name) for name in linear_layers(model)}
    wanted = linear_layers(model) if names is None else names
    if unknown := [name for name in wanted if name not in known]:
        raise UnsupportedModelError(f"{unknown[0]!r} is no linear layer of this model")
    return {name: known[name] for name in wanted}


def _chosen_parameters(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    wanted = known if names is None else names
    if unknown := [name for name in wanted if name not in known]:
        raise UnsupportedModelError(f"{unknown[0]!r} is no parameter of this model")
    return {name: known[name] for name in wanted}


@contextmanager
def _differentiable(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _log_likelihood(
    model: Any,  # noqa: ANN401
    prompt: Rendered,
    labels: LABELS,
    generator: torch.Generator,
) -> Tensor:
    """The log-likelihood of a prompt's labels, summed over positions, a scalar."""
    ids = torch.tensor([prompt.token_ids], device=model.device)
    answer = ids[0, prompt.prompt_length :]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # [t, vocabulary]
    if len(answer):
        logits = logits[prompt.prompt_length - 1 : -1]
    log_probabilities = logits.log_softmax(-1)
    if labels == "sampled" or not len(answer):
        probabilities = log_probabilities.detach().cpu().exp()
        answer = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(ids.device)
    score: Tensor = log_probabilities.gather(1, answer[:, None]).sum()
    return score
