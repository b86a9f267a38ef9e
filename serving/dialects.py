"""Other servers' ways to ask for a module or a blend, brought into ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApiError
from .hosted import HostedBank
from .schemas.completions import GenerationBody
from .schemas.generation import LoraScale, MergedAdapters
from .targets import Targets

NO_MODULE = ("", "__base_model__")
"""LoRAX's names for the backbone alone."""

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """What a body asks for in our words: a model, and weights where a field fixes the blend.

    field: the body's field that does.
    """

    model: str
    weights: Weights | None = None
    field: str = "blend"


def asked_for(body: GenerationBody, targets: Targets) -> Asked:
    """A body's target, whichever server's words it uses.

    Raises:
        ApiError: two fields ask for a blend, or one asks for what cannot be had.
    """
    given = fields_that_fix(body)
    if len(given) > 1:
        raise ApiError(
            f"{given[0]} and {given[1]} both fix the blend: give one of them", param=given[1]
        )
    if not given:
        return Asked(_module_of_backbone(body.model, targets))
    [field] = given
    return Asked(body.model, _FIELDS[field](getattr(body, field), targets), field)


def fields_that_fix(body: GenerationBody) -> list[str]:
    """The fields of a body that fix its blend."""
    return [field for field in _FIELDS if getattr(body, field) is not None]


def numbered(targets: Targets) -> list[tuple[str, HostedBank, str]]:
    """All modules in the order of /v1/models: `bank:module`, its bank, and its own name."""
    return [
        (f"{host.bank.name}:{module.name}", host, module.name)
        for host in targets.hosted
        for module in host.bank.modules
    ]


def _one(name: str, _: Targets) -> Weights:
    return {} if name in NO_MODULE else {name: 1.0}


def _linear(merged: MergedAdapters, _: Targets) -> Weights:
    """LoRAX's weights as they stand."""
    field = "merged_adapters"
    if merged.merge_strategy != "linear":
        raise ApiError(
            f"merge_strategy {merged.merge_strategy!r} is not supported for a request, only "
            "'linear' is: merge ahead of time, with a recipe and mergeroute build",
            param=f"{field}.merge_strategy",
            code="unsupported_parameter",
        )
    weights = merged.weights or (1.0,) * len(merged.ids)
    if len(weights) != len(merged.ids):
        raise ApiError(
            f"merged_adapters has {len(merged.ids)} ids and {len(weights)} weights: give one "
            "weight per id",
            param=f"{field}.weights",
        )
    _refuse_twice(merged.ids, field)
    return dict(zip(merged.ids, weights, strict=True))


def _scaled(scales: Sequence[LoraScale], targets: Targets) -> Weights:
    """llama.cpp's numbers and scales; modules that are not named count for nothing."""
    names = [full for full, _, _ in numbered(targets)]
    for scale in scales:
        if scale.id >= len(names):
            raise ApiError(
                f"there is no module number {scale.id}, there are {len(names)}: "
                "GET /lora-adapters lists them",
                status=404,
                param="lora",
                code="model_not_found",
            )
    _refuse_twice([scale.id for scale in scales], "lora")
    return {names[scale.id]: scale.scale for scale in scales}


_FIELDS: dict[str, Callable[[Any, Targets], Weights]] = {
    "blend": lambda weights, _: weights,
    "adapter_id": _one,
    "merged_adapters": _linear,
    "adapter": _one,
    "lora": _scaled,
}
"""Fields that fix the blend, with what each says in our words."""


def _module_of_backbone(model: str, targets: Targets) -> str:
    """SGLang's and Ray Serve's `base:adapter` as `bank:module`; any other name as it stands."""
    name, _, module = model.rpartition(":")
    backbone = targets.backbone(name)
    if backbone is None:
        return model
    digest = backbone.bank.backbone.digest
    full = [
        f"{host.bank.name}:{module}"
        for host in targets.hosted
        if host.bank.backbone.digest == digest and module in host.digests
    ]
    if len(full) > 1:
        raise ApiError(
            f"several banks on {name!r} have a module {module!r}: ask for {' or '.join(full)}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return full[0] if full else model


def _refuse_twice(names: Sequence[object], param: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ApiError(f"{param} names {twice[0]!r} twice: give one weight per module", param=param)
