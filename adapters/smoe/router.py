"""Router: what becomes of a layer's router when its experts are merged.

Exact: the router stays, and experts of one group are one: their probabilities are summed. Compact:
a row per group, fitted so that a plain checkpoint comes close to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 1e-3
_STEPS = 100
_HELD_OUT = 4
"""Every fourth token is not fitted on: the gap is measured there."""


@dataclass(frozen=True)
class RouterGap:
    """How far fitted rows are from the groups' own probabilities, on tokens not fitted on.

    kl: mean Kullback-Leibler divergence, nats. agreement: share of the chosen groups that agree.
    """

    kl: float
    agreement: float


def group_logits(logits: Tensor, groups: Tensor) -> Tensor:
    """Logits of groups, [t, G], from those of experts [t, E]: the log of summed exponentials, so
    that their softmax is the sum of the members' probabilities.
    """
    count = int(groups.max()) + 1
    return torch.stack([logits[:, groups == g].logsumexp(1) for g in range(count)], 1)


def group_gates(choice: Tensor, gates: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that tokens are sent to, each once, with the gates of its chosen members summed.

    choice: [t, k] experts, with gates [t, k]. Returns both in the same shape: a group that a token
    chose before stands there again with a gate of 0.
    """
    chosen = groups[choice]  # [t, k]
    same = chosen[:, :, None] == chosen[:, None]  # [t, k, k]
    is_first = ~same.tril(-1).any(2)
    return chosen, torch.einsum("tij,tj->ti", same.to(gates), gates) * is_first


def fitted_rows(
    router: Tensor, groups: Tensor, hidden: Tensor, *, top_k: int
) -> tuple[Tensor, RouterGap]:
    """One router row per group, [G, D], whose softmax comes close to the summed probabilities of
    its members, and how close.

    router: [E, D]. hidden: [n, D], of calibration tokens. top_k: groups that a token is sent to.
    A ridge regression onto the groups' logits, from the mean of the members' rows; then the
    divergence itself is made smaller.
    """
    router, hidden = router.double(), hidden.double()
    held_out = torch.arange(len(hidden)) % _HELD_OUT == _HELD_OUT - 1
    fit = hidden[~held_out]
    rows = mean_rows(router, groups)
    wanted = group_logits(fit @ router.T, groups)
    rows = _refined(fit, wanted, rows + _regressed(fit, wanted - fit @ rows.T))
    test = hidden[held_out] if held_out.any() else hidden
    return rows.float(), _gap(test @ rows.T, group_logits(test @ router.T, groups), top_k)


def mean_rows(router: Tensor, groups: Tensor) -> Tensor:
    """The mean of each group's router rows [E, D], [G, D]: where there is nothing to fit to."""
    return torch.stack([router[groups == g].mean(0) for g in range(int(groups.max()) + 1)])


def _regressed(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Rows [G, D] whose logits come close to the wanted [n, G], but for a constant of each token,
    which no softmax sees.
    """
    centred = wanted - wanted.mean(1, keepdim=True)
    gram = hidden.T @ hidden
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    rows: Tensor = torch.linalg.solve(gram + ridge, hidden.T @ centred).T
    return rows


def _refined(hidden: Tensor, wanted: Tensor, start: Tensor) -> Tensor:
    """Rows with a smaller divergence from the wanted logits than those to start from, not far from
    them.
    """
    size = hidden.square().mean()
    rows = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([rows], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = _divergence(hidden @ rows.T, wanted)
        total = total + _RIDGE * size * (rows - start).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return rows.detach()


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted ‖ given), nats."""
    given, target = F.log_softmax(logits, -1), F.log_softmax(wanted, -1)
    return F.kl_div(given, target, reduction="batchmean", log_target=True)


def _gap(logits: Tensor, wanted: Tensor, top_k: int) -> RouterGap:
    chosen = [torch.zeros_like(x).scatter_(1, x.topk(top_k).indices, 1.0) for x in (logits, wanted)]
    agreement = (chosen[0] * chosen[1]).sum(1).mean() / top_k
    return RouterGap(kl=float(_divergence(logits, wanted)), agreement=float(agreement))
