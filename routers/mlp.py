"""MLP head: a small network with a class of its own for prompts that no module serves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

from ..adapters.errors import RouterError
from .base import Scores
from .calibration import Calibration
from .folds import calibrate, targets_of
from .signals import check_width

_HIDDEN = 256
_FARTHEST = 8.0
"""Standard deviations: a feature that hardly varied in training must not drown the others."""

_STEPS = 200
_BATCH = 256
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True, eq=False)
class Network:
    """Standardised features, normalised, through one hidden layer.

    center, scale: of the features, [d]. hidden: [256, d]. hidden_bias: [256].
    output: [classes, 256]. output_bias: [classes].
    """

    center: Tensor
    scale: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    output: Tensor
    output_bias: Tensor

    def inner(self, features: Tensor) -> Tensor:
        """Features [n, d] to the hidden layer, [n, 256]."""
        rows = ((features.float() - self.center) / self.scale).clamp(-_FARTHEST, _FARTHEST)
        rows = layer_norm(rows, rows.shape[-1:])
        return gelu(rows @ self.hidden.T + self.hidden_bias)

    def logits(self, features: Tensor) -> Tensor:
        """[n, classes]; each to the last digit what it is without the other classes."""
        inner = self.inner(features)
        return (inner[:, None] * self.output).sum(-1) + self.output_bias


@dataclass(frozen=True, eq=False)
class Mlp:
    """A classifier that is trained on labelled prompts: sharp on what it has seen, and closed: a
    module is added by fitting anew.

    The modules' logits are divided by a temperature that was fitted on held-out prompts. With
    prompts that no module serves, the last class stands for these, and `distance` is how much more
    likely it is than the best module: log odds, before the temperature. Without any it is the
    negative log of the summed exponentials, which tells outliers less well.

    modules: names, in the order of the classes. calibration: from cross-validation.

    Source: Lu et al. 2024, Twin-Merging, arXiv:2406.15479, section 4.2 (the router); Liu et al.
    2020, Energy-based Out-of-distribution Detection, arXiv:2010.03759, section 3.1 (without none).
    """

    modules: tuple[str, ...]
    network: Network
    calibration: Calibration = field(default_factory=Calibration)
    name: str = "mlp"

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Sequence[str],
        *,
        modules: Sequence[str],
        none: Tensor | None = None,
        seed: int = 0,
    ) -> Mlp:
        """Train on features [n, d] with a module name each; seconds on a CPU for some thousands.

        none: features of prompts that no module serves, [k, d]. seed: of the first weights and the
        batches; one seed gives one result. Temperature and distances come from 5-fold
        cross-validation: six networks are trained in all.

        Raises:
            RouterError: a module has fewer than 5 prompts, a label is no module, or all prompts
                are alike.
        """
        others = features.new_zeros(0, features.shape[1]) if none is None else none
        rows = torch.cat([features, others]).float()
        targets = targets_of(labels, modules, none=len(others))

        def trained(kept: Tensor) -> Mlp:
            classes = len(modules) + bool(len(others))
            return cls(
                tuple(modules), _train(rows[kept], targets[kept], classes=classes, seed=seed)
            )

        calibration = calibrate(
            lambda kept, left: trained(kept).logits(rows[left]), targets, modules=len(modules)
        )
        whole = trained(torch.ones_like(targets, dtype=torch.bool))
        return replace(whole, calibration=calibration)

    def score(self, features: Tensor) -> Scores:
        """Logits of a prompt's features [d], and how unlike the modules' prompts it is."""
        if not self.modules:
            return Scores({})
        logits, distance = self.logits(features[None])
        return self.calibration.scores(self.modules, logits[0], distance[0])

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the modules and then of none, [n, modules + 1], or without it, not divided
        yet, and distances [n], of features [n, d]; float64.
        """
        check_width(features, len(self.network.center))
        logits = self.network.logits(features).double()
        own = logits[:, : len(self.modules)]
        if logits.shape[1] == len(self.modules):
            return logits, -own.logsumexp(1)
        return logits, logits[:, -1] - own.amax(1)

    def with_module(self, name: str, features: Tensor) -> NoReturn:
        """It cannot: a class more is another network.

        Raises:
            RouterError: always.
        """
        del features
        raise RouterError(
            f"an mlp router cannot take module {name!r} in without being fitted again: fit it with "
            "the module's prompts, or use scorer prototype or retriever"
        )

    def without_module(self, name: str) -> Mlp:
        """Without the module's class; the others' logits stay, to the last digit."""
        if name not in self.modules:
            return self
        classes = range(len(self.network.output))
        kept = [k for k in classes if k >= len(self.modules) or self.modules[k] != name]
        network = replace(
            self.network,
            output=self.network.output[kept],
            output_bias=self.network.output_bias[kept],
        )
        modules = tuple(known for known in self.modules if known != name)
        return replace(self, modules=modules, network=network)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        network = {name: tensor.contiguous() for name, tensor in vars(self.network).items()}
        return {**network, **self.calibration.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], modules: Sequence[str]) -> Mlp:
        """Undo `state`.

        Raises:
            RouterError: tensors are missing, of another dtype, not finite, or do not belong
                together.
        """
        try:
            network = Network(**{name: state[name] for name in Network.__dataclass_fields__})
        except KeyError as error:
            raise RouterError(f"the mlp router lacks tensor {error}: fit it again") from error
        _check(network, len(modules))
        return cls(tuple(modules), network, Calibration.from_state(state))


def _check(network: Network, modules: int) -> None:
    size = network.center.numel()
    inner, classes = network.hidden_bias.numel(), network.output_bias.numel()
    expected = [(size,), (size,), (inner, size), (inner,), (classes, inner), (classes,)]
    shapes = [tuple(tensor.shape) for tensor in vars(network).values()]
    if shapes != expected or classes not in (modules, modules + 1):
        raise RouterError(
            f"the mlp router's shapes {shapes} do not fit {modules} modules: fit it again"
        )
    if dtypes := {tensor.dtype for tensor in vars(network).values()} - {torch.float32}:
        raise RouterError(
            f"the mlp router holds {dtypes.pop()}, torch.float32 is allowed: fit it again"
        )
    if not (all(map(_is_finite, vars(network).values())) and bool((network.scale > 0).all())):
        raise RouterError("the mlp router holds NaN or inf, or a scale of 0: fit it again")


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _train(rows: Tensor, targets: Tensor, *, classes: int, seed: int) -> Network:
    """A network for rows [n, d] and their classes [n], by AdamW over random batches."""
    random = torch.Generator().manual_seed(seed)
    network = _new_network(rows, classes, random)
    weights = [network.hidden, network.hidden_bias, network.output, network.output_bias]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    with torch.enable_grad():
        for _ in range(_STEPS):
            batch = torch.randperm(len(rows), generator=random)[:_BATCH]
            loss = cross_entropy(
                network.inner(rows[batch]) @ network.output.T + network.output_bias, targets[batch]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Network(**{name: tensor.detach() for name, tensor in vars(network).items()})


def _new_network(rows: Tensor, classes: int, random: torch.Generator) -> Network:
    spread, size = rows.std(0), rows.shape[1]
    varies = spread > 1e-6 * rows.abs().amax(0)
    if not varies.any():
        raise RouterError("the prompts are all alike: give different ones")
    return Network(
        center=rows.mean(0),
        scale=spread.where(varies, 1.0),
        hidden=torch.randn(_HIDDEN, size, generator=random) / math.sqrt(size),
        hidden_bias=torch.zeros(_HIDDEN),
        output=torch.randn(classes, _HIDDEN, generator=random) / math.sqrt(_HIDDEN),
        output_bias=torch.zeros(classes),
    )
