"""Targets: what the `model` field of a request may name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.blend import Blend
from ..adapters.errors import BankError, BlendError, UnknownTargetError
from .errors import ApiError
from .hosted import HostedBank

AUTO = "auto"
_BLEND = "blend:"


@dataclass(frozen=True)
class Target:
    """A resolved target. blend: fixed by the target; None: the bank's router decides.
    warning: why this is not what was meant to answer.
    """

    name: str
    hosted: HostedBank
    blend: Blend | None
    reason: str = ""
    warning: str = ""


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
        self.hosted = tuple(hosted)
        self._backbones = _backbones(hosted)
        self._modules: dict[str, list[HostedBank]] = {}
        for host in hosted:
            for module in host.digests:
                self._modules.setdefault(module, []).append(host)
        kinds = (self.banks, self._modules, self._backbones, (AUTO,))
        counts = Counter(name for names in kinds for name in names)
        if clashing := [name for name, count in counts.items() if count > 1]:
            raise BankError(
                f"{min(clashing)!r} would name two things (bank, module, backbone or '{AUTO}'): "
                "rename one of them"
            )

    def resolve(
        self, model: str, weights: Mapping[str, float] | None = None, *, param: str = "blend"
    ) -> Target:
        """What a request asks for.

        weights: the body's `blend`, which fixes the blend on `auto`, a bank or the backbone.
        param: the body's field that gave the weights.

        Raises:
            UnknownTargetError: nothing has this name, or several things have.
            ApiError: the body's blend goes with no such target.
            BlendError: a weight is out of range.
        """
        if weights is not None:
            return self._fixed(model, weights, param)
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

    def module(self, name: str) -> Target:
        """What a module's name, bare or as `bank:module`, stands for.

        Raises:
            UnknownTargetError: no module, or several, have this name.
        """
        return self._module(name) if name in self._modules else self._qualified(name)

    def is_taken(self, name: str) -> bool:
        """Whether a bank or a backbone has this name."""
        return name in self.banks or name in self._backbones

    def is_known(self, name: str) -> bool:
        """Whether a bank, a backbone or a module has this name."""
        return self.is_taken(name) or name in self._modules

    def replacing(self, before: HostedBank, after: HostedBank) -> Targets:
        """The same targets with a bank in another one's place.

        Raises:
            BankError: two things would have the same name.
        """
        return Targets([after if host is before else host for host in self.hosted])

    def listing(self) -> list[dict[str, Any]]:
        """Every name, in the shape of /v1/models, without the fields all share."""
        entries = [self._entry(AUTO, self.default, root=self.default.bank.name)]
        for name, host in self._backbones.items():
            entries.append(self._entry(name, host, root=str(host.bank.backbone.path), parent=None))
        for name, host in self.banks.items():
            entries.append(self._entry(name, host, root=host.bank.digest))
            entries += [
                self._entry(self.full_name(module.name, host), host, root=str(module.path))
                for module in host.bank.modules
            ]
        return entries

    def describe(self, model: str) -> dict[str, Any]:
        """One name's entry; any name that can be asked for has one.

        Raises:
            MergerouteError: as `resolve`.
        """
        listed = {entry["id"]: entry for entry in self.listing()}
        target = self.resolve(model)
        if model in listed:
            return listed[model]
        return self._entry(model, target.hosted, root=target.hosted.bank.digest)

    def _entry(
        self, name: str, host: HostedBank, *, root: str, parent: str | None = ""
    ) -> dict[str, Any]:
        return {
            "id": name,
            "root": root,
            "parent": host.bank.backbone.name if parent == "" else parent,
            "max_model_len": host.engine.max_length,
        }

    def full_name(self, module: str, host: HostedBank) -> str:
        """What a module is listed as: its bare name where that is unique."""
        return module if len(self._modules[module]) == 1 else f"{host.bank.name}:{module}"

    def backbone(self, name: str) -> HostedBank | None:
        """The first bank on the backbone of this name."""
        return self._backbones.get(name)

    def _fixed(self, model: str, weights: Mapping[str, float], param: str) -> Target:
        """The body's blend, on the bank or backbone that `model` names."""
        if model == AUTO:
            hosts = list(self.banks.values())
        elif model in self.banks:
            hosts = [self.banks[model]]
        elif model in self._backbones:
            digest = self._backbones[model].bank.backbone.digest
            hosts = [h for h in self.banks.values() if h.bank.backbone.digest == digest]
        elif model in self._modules or model.startswith(_BLEND) or ":" in model:
            raise ApiError(
                f"{param} goes with model 'auto', a bank or the backbone, not with {model!r}: "
                "leave one of the two out",
                param=param,
            )
        else:
            raise self._unknown(model)
        try:
            given = Blend(weights)
        except BlendError as error:
            raise ApiError(str(error), param=param) from error
        host, blend = _in_one_bank(given, hosts, param=param)
        return Target(model, host, blend, "the body fixes the blend")

    def _written(self, model: str) -> Target:
        """`blend:a=0.75,b=0.25`; its canonical form is the target's name."""
        try:
            written = Blend.parse(model)
        except BlendError as error:
            raise ApiError(str(error), param="model") from error
        host, blend = _in_one_bank(written, list(self.banks.values()), param="model")
        return Target(str(written), host, blend, "the model is a blend")

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


def _in_one_bank(
    blend: Blend, hosts: Sequence[HostedBank], *, param: str
) -> tuple[HostedBank, Blend]:
    """The bank that has all modules of a blend, and the blend over its bare names.

    hosts: where to look, the preferred one first. A name is a module's, or `bank:module`.

    Raises:
        ApiError: a name is unknown or ambiguous, is given twice, or banks would be mixed.
    """
    found = {name: _located(name, hosts, param=param) for name in blend}
    banks = {host.bank.name: host for host, _ in found.values()}
    if len(banks) > 1:
        mixed = ", ".join(sorted(banks))
        raise ApiError(f"the blend mixes the banks {mixed}: one bank at a time", param=param)
    names = {name: module for name, (_, module) in found.items()}
    if len(set(names.values())) < len(names):
        raise ApiError(f"{blend} names a module twice: give one weight per module", param=param)
    host = next(iter(banks.values()), hosts[0])
    return host, blend.renamed(names)


def _located(name: str, hosts: Sequence[HostedBank], *, param: str) -> tuple[HostedBank, str]:
    """The one bank that has a module of this name, bare or as `bank:module`."""
    bank, _, module = name.rpartition(":")
    found = [(h, name) for h in hosts if name in h.digests]
    found += [(h, module) for h in hosts if h.bank.name == bank and module in h.digests]
    if len(found) == 1:
        return found[0]
    if found:
        full = " or ".join(f"{host.bank.name}:{name}" for host, _ in found)
        message = f"several banks have a module {name!r}: write {full}"
    else:
        known = ", ".join(module for host in hosts for module in host.digests) or "none"
        message = f"there is no module {name!r} to blend; there are: {known}"
    raise ApiError(message, status=404, param=param, code="model_not_found")


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
