"""Targets: what the `model` field of a request may name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.blend import Blend
from ..adapters.errors import BankError, UnknownTargetError
from .errors import ApiError
from .hosting import HostedBank

AUTO = "auto"
_BLEND = "blend:"


@dataclass(frozen=True)
class Target:
    """A resolved target. blend: fixed by the target; None: the bank's router decides."""

    name: str
    hosted: HostedBank
    blend: Blend | None
    reason: str = ""


class Targets:
    """Every name that can be asked for. The first bank is the default.

    Raises:
        BankError: two things would have the same name.
    """

    def __init__(self, hosted: Sequence[HostedBank]) -> None:
        self.banks = {h.bank.name: h for h in hosted}
        if len(self.banks) < len(hosted):
            names = Counter(h.bank.name for h in hosted)
            raise BankError(f"two banks are called {names.most_common(1)[0][0]!r}: rename one")
        self.default = hosted[0]
        self._backbones = _backbones(hosted)
        self._modules: dict[str, list[HostedBank]] = {}
        for host in hosted:
            for module in host.digests:
                self._modules.setdefault(module, []).append(host)
        if clashing := self.banks.keys() & self._modules.keys():
            raise BankError(f"{min(clashing)!r} is a bank and a module: rename one of them")

    def resolve(self, model: str, weights: Mapping[str, float] | None = None) -> Target:
        """What a request asks for.

        weights: the body's `blend`, which fixes the blend on `auto`, a bank or the backbone.

        Raises:
            UnknownTargetError: nothing has this name, or several things have.
            ApiError: the body's blend goes with no such target.
            BlendError: a weight is out of range.
        """
        if weights is not None:
            return self._fixed(model, weights)
        if model == AUTO:
            return Target(model, self.default, None)
        if model.startswith(_BLEND):
            return self._written(model)
        if model in self.banks:
            return Target(model, self.banks[model], None)
        if model in self._modules:
            return self._module(model)
        if model in self._backbones:
            return Target(model, self._backbones[model], Blend(), "the backbone was asked for")
        return self._qualified(model)

    def listing(self) -> list[dict[str, Any]]:
        """Every name, in the shape of /v1/models, without the fields all share."""
        entries = [self._entry(AUTO, self.default, root=self.default.bank.name)]
        for name, host in self._backbones.items():
            entries.append(self._entry(name, host, root=str(host.bank.backbone.path), parent=None))
        for name, host in self.banks.items():
            entries.append(self._entry(name, host, root=host.bank.digest))
            entries += [
                self._entry(self._full_name(module.name, host), host, root=str(module.path))
                for module in host.bank.modules
            ]
        return entries

    def _entry(
        self, name: str, host: HostedBank, *, root: str, parent: str | None = ""
    ) -> dict[str, Any]:
        return {
            "id": name,
            "root": root,
            "parent": host.bank.backbone.name if parent == "" else parent,
            "max_model_len": host.engine.max_length,
        }

    def _full_name(self, module: str, host: HostedBank) -> str:
        return module if len(self._modules[module]) == 1 else f"{host.bank.name}:{module}"

    def _fixed(self, model: str, weights: Mapping[str, float]) -> Target:
        if model == AUTO:
            host = self.default
        elif model in self.banks or model in self._backbones:
            host = self.banks.get(model) or self._backbones[model]
        elif model in self._modules or model.startswith(_BLEND) or ":" in model:
            raise ApiError(
                f"blend goes with model 'auto', a bank or the backbone, not with {model!r}: "
                "leave one of the two out",
                param="blend",
            )
        else:
            raise self._unknown(model)
        return self._checked(Target(model, host, Blend(weights), "the body fixes the blend"))

    def _written(self, model: str) -> Target:
        blend = Blend.parse(model)
        banks = {bank for name in blend if (bank := name.partition(":")[0]) in self.banks}
        if len(banks) > 1:
            raise ApiError(
                f"{model!r} blends modules of the banks {', '.join(sorted(banks))}: one bank at "
                "a time",
                param="model",
            )
        host = self.banks[banks.pop()] if banks else self.default
        names = {name: name.removeprefix(f"{host.bank.name}:") for name in blend}
        return self._checked(Target(model, host, blend.renamed(names), "the model is a blend"))

    def _checked(self, target: Target) -> Target:
        assert target.blend is not None
        target.hosted.by_digest(target.blend)
        return target

    def _module(self, model: str) -> Target:
        hosts = self._modules[model]
        if len(hosts) > 1:
            full = " or ".join(f"{host.bank.name}:{model}" for host in hosts)
            raise UnknownTargetError(f"several banks have a module {model!r}: ask for {full}")
        return Target(model, hosts[0], Blend({model: 1.0}), f"module {model} was asked for")

    def _qualified(self, model: str) -> Target:
        bank, _, module = model.partition(":")
        host = self.banks.get(bank)
        if host is None or module not in host.digests:
            raise self._unknown(model)
        return Target(model, host, Blend({module: 1.0}), f"module {model} was asked for")

    def _unknown(self, model: str) -> UnknownTargetError:
        names = ", ".join(entry["id"] for entry in self.listing())
        return UnknownTargetError(
            f"the model {model!r} does not exist; there are: {names}, and blend:NAME=WEIGHT,..."
        )


def _backbones(hosted: Sequence[HostedBank]) -> dict[str, HostedBank]:
    """By name: the first bank on each backbone."""
    backbones: dict[str, HostedBank] = {}
    for host in hosted:
        backbone = host.bank.backbone
        first = backbones.setdefault(backbone.name, host)
        if first.bank.backbone.digest != backbone.digest:
            raise BankError(
                f"banks {first.bank.name!r} and {host.bank.name!r} stand on different backbones "
                f"that are both called {backbone.name!r}: rename one"
            )
    return backbones
