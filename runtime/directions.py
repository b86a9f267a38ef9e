"""Directions of resident modules: what gates know them by, computed once and freed with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..adapters.delta import LowRank
from ..adapters.digest import short
from ..adapters.errors import RequestError
from ..routers.token_routing import TokenRouting
from .gating import GateTable, LayerGate
from .module_stack import ResidentModule
from .types import TokenGate

_MAX_TABLES = 32
_RTOL = 1e-6
"""Directions with a smaller share of the largest singular value are rounding errors."""

Kind = tuple[str, int]
"""What of a routing decides the directions: the method, and how many."""


class GateTables:
    """The tables of gates in use, by content. Any thread may ask for one.

    resident: gives what is resident of a module, by digest.
    """

    def __init__(self, resident: Callable[[str], ResidentModule], *, device: torch.device) -> None:
        self._resident = resident
        self._device = device
        self._building = threading.Lock()
        self._keeping = threading.Lock()  # never held while the engine's thread is waited for
        self._directions: dict[tuple[str, Kind], dict[str, Tensor]] = {}
        self._tables: OrderedDict[TokenGate, GateTable] = OrderedDict()

    def table(self, gate: TokenGate) -> GateTable:
        """A gate's table; the first time takes an SVD of every layer of every module.

        Raises:
            RequestError: a module cannot be routed by token, or not by this method.
            UnknownModuleError: a module is not loaded.
        """
        with self._building:
            with self._keeping:
                table = self._tables.get(gate)
            if table is None:
                found = [self._of(digest, gate.routing) for digest in gate.modules]
                table = gate_table(gate, found)
            with self._keeping:
                self._tables[gate] = table
                self._tables.move_to_end(gate)
                while len(self._tables) > _MAX_TABLES:
                    self._tables.popitem(last=False)
            return table

    def forget(self, digest: str) -> None:
        """A module was evicted."""
        with self._keeping:
            for key in [key for key in self._directions if key[0] == digest]:
                del self._directions[key]
            for gate in [gate for gate in self._tables if digest in gate.modules]:
                del self._tables[gate]

    def _of(self, digest: str, routing: TokenRouting) -> dict[str, Tensor]:
        key = digest, (routing.method, routing.directions)
        with self._keeping:
            known = self._directions.get(key)
        if known is not None:
            return known
        found = module_directions(self._resident(digest), routing)
        placed = {name: directions.to(self._device) for name, directions in found.items()}
        with self._keeping:
            self._directions[key] = placed
        return placed


def gate_table(gate: TokenGate, directions: Sequence[Mapping[str, Tensor]]) -> GateTable:
    """A gate's table from the directions of its modules, in the gate's order."""
    layers: dict[str, LayerGate] = {}
    for layer in dict.fromkeys(layer for own in directions for layer in own):
        members = [index for index, own in enumerate(directions) if layer in own]
        layers[layer] = LayerGate(_stacked([directions[m][layer] for m in members]), members)
    return GateTable(gate, layers)


@torch.inference_mode()
def module_directions(module: ResidentModule, routing: TokenRouting) -> dict[str, Tensor]:
    """Directions [k, i] of a module by layer that it changes, float32 on the CPU.

    Raises:
        RequestError: it changes more than inner linear layers, or ships no gate that is needed.
    """
    who = f"module {module.name!r} ({short(module.digest)})"
    if module.beside_inner:
        raise RequestError(
            f"{who} changes {module.beside_inner}, which cannot be weighed by token: blend it, or "
            "route by request",
            parameter="routing",
        )
    if routing.method == "phatgoose":
        if missing := sorted(module.deltas.keys() - module.gates.keys()):
            raise RequestError(
                f"{who} ships no gate for {missing[0]!r}, which phatgoose needs: train its gates, "
                "leave it out, or choose arrow",
                parameter="routing",
            )
        return {layer: _standardised(module.gates[layer])[None] for layer in module.deltas}
    found = {layer: layer_directions(delta, routing) for layer, delta in module.deltas.items()}
    return {layer: directions for layer, directions in found.items() if len(directions)}


def layer_directions(delta: LowRank, routing: TokenRouting) -> Tensor:
    """Right singular vectors of a change, [k, i], float32: exact, whatever the spectrum; none of a
    change that is zero.
    """
    _, singular, vt = delta.svd(rtol=_RTOL)
    if routing.method == "arrow":
        return vt[:1].float()
    if routing.directions:
        return vt[: routing.directions].float()
    return (singular[:, None] * vt).float()


def _standardised(gate: Tensor) -> Tensor:
    """Mean 0 and variance 1. Exact: an epsilon would weaken gates that are small."""
    centred = gate.double() - gate.double().mean()
    return (centred / centred.square().mean().sqrt()).float()


def _stacked(directions: Sequence[Tensor]) -> Tensor:
    """[m, k, i], with zeros where a module has fewer than k."""
    return torch.nn.utils.rnn.pad_sequence(list(directions), batch_first=True)
