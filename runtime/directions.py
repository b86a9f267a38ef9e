"""Directions of resident modules: what gates know them by, computed once and freed with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..adapters.delta import LowRank
from ..adapters.digest import short
from ..adapters.errors import RequestError
from .gating import GateTable, LayerGate
from .module_stack import ResidentModule
from .types import TokenGate

_MAX_STACKS = 16
_RTOL = 1e-6
"""Directions with a smaller share of the largest singular value are rounding errors."""

_Key = tuple[str, tuple[str, ...]]
"""Method and modules: of a gate, what decides its layers."""


@dataclass(frozen=True, eq=False)
class Directions:
    """What a module's change of one layer is known by.

    vectors: [k, i], float32; right singular vectors of the change, or the gate trained for it.
    singular: [k], float32, their singular values; 1 for a gate.
    """

    vectors: Tensor
    singular: Tensor

    def to(self, device: torch.device) -> Directions:
        """The same on a device."""
        return Directions(self.vectors.to(device), self.singular.to(device))


class GateTables:
    """The tables of gates in use, by content. Any thread may ask for one.

    Gates over the same modules with the same method share what they know, whatever their settings.

    resident: gives what is resident of a module, by digest.
    """

    def __init__(self, resident: Callable[[str], ResidentModule], *, device: torch.device) -> None:
        self._resident = resident
        self._device = device
        self._building = threading.Lock()
        self._keeping = threading.Lock()  # guards what follows; held for moments only
        self._directions: dict[tuple[str, bool], dict[str, Directions]] = {}
        self._stacks: OrderedDict[_Key, Mapping[str, LayerGate]] = OrderedDict()
        self._built_for: set[str] = set()  # modules of the build that runs, but those forgotten

    def table(self, gate: TokenGate) -> GateTable:
        """A gate's table, at once where one of its modules and method was asked for before. Else it
        may take an SVD of every layer of every module: not for an event loop.

        Raises:
            RequestError: a module cannot be routed by token, or not by this method.
            UnknownModuleError: a module is not loaded.
        """
        key = gate.routing.method, gate.modules
        layers = self._ready(key)
        if layers is None:
            with self._building:
                layers = self._ready(key)  # another thread may have built it meanwhile
                if layers is None:
                    layers = self._build(key)
        return GateTable(gate, layers)

    def forget(self, digest: str) -> None:
        """A module was evicted. A build that runs keeps nothing of it."""
        with self._keeping:
            self._built_for.discard(digest)
            for known in [known for known in self._directions if known[0] == digest]:
                del self._directions[known]
            for key in [key for key in self._stacks if digest in key[1]]:
                del self._stacks[key]

    def _ready(self, key: _Key) -> Mapping[str, LayerGate] | None:
        with self._keeping:
            layers = self._stacks.get(key)
            if layers is not None:
                self._stacks.move_to_end(key)
            return layers

    def _build(self, key: _Key) -> Mapping[str, LayerGate]:
        method, modules = key
        with self._keeping:
            self._built_for = set(modules)
        layers = stack_layers(method, [self._of(digest, method) for digest in modules])
        with self._keeping:
            if self._built_for.issuperset(modules):
                self._stacks[key] = layers
            while len(self._stacks) > _MAX_STACKS:
                self._stacks.popitem(last=False)
        return layers

    def _of(self, digest: str, method: str) -> Mapping[str, Directions]:
        key = digest, method == "phatgoose"  # the other methods read one and the same SVD
        with self._keeping:
            known = self._directions.get(key)
        if known is not None:
            return known
        found = module_directions(self._resident(digest), method)
        placed = {layer: directions.to(self._device) for layer, directions in found.items()}
        with self._keeping:
            if digest in self._built_for:
                self._directions[key] = placed
        return placed


def stack_layers(method: str, modules: Sequence[Mapping[str, Directions]]) -> dict[str, LayerGate]:
    """What a gate knows of its modules by layer, from their directions in the gate's order."""
    kept = None if method == "spectr" else 1
    layers: dict[str, LayerGate] = {}
    for layer in dict.fromkeys(layer for own in modules for layer in own):
        members = [index for index, own in enumerate(modules) if layer in own]
        found = [modules[member][layer] for member in members]
        layers[layer] = LayerGate(
            pad_sequence([one.vectors[:kept] for one in found]),  # [k, m, i]
            pad_sequence([one.singular[:kept] for one in found]),  # [k, m]
            members,
        )
    return layers


@torch.inference_mode()
def module_directions(module: ResidentModule, method: str) -> dict[str, Directions]:
    """Directions of a module by layer that it changes, on the CPU.

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
    if method == "phatgoose":
        if missing := sorted(module.deltas.keys() - module.gates.keys()):
            raise RequestError(
                f"{who} ships no gate for {missing[0]!r}, which phatgoose needs: train its gates, "
                "leave it out, or choose arrow",
                parameter="routing",
            )
        return {layer: _trained(module.gates[layer]) for layer in module.deltas}
    found = {layer: spectrum(delta) for layer, delta in module.deltas.items()}
    return {layer: directions for layer, directions in found.items() if len(directions.singular)}


def spectrum(delta: LowRank) -> Directions:
    """Right singular vectors of a change, exact whatever its spectrum; none of one that is zero."""
    _, singular, vt = delta.svd(rtol=_RTOL)
    return Directions(vt.float(), singular.float())


def _trained(gate: Tensor) -> Directions:
    """Mean 0 and variance 1. Exact: an epsilon would weaken gates that are small."""
    centred = gate.double() - gate.double().mean()
    return Directions((centred / centred.square().mean().sqrt()).float()[None], torch.ones(1))
