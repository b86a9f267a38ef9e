"""What will work and what will not, told before a server is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..runtime.loading import choose_device, choose_dtype
from .doctor_bank import Examined, check_bank
from .doctor_load import check_load
from .doctor_machine import check_device, check_host, check_installation
from .doctor_memory import Estimate, check_memory, estimate
from .doctor_vllm import check_servers
from .findings import FaultError, Finding, required
from .hosting import check_names
from .settings import ServeSettings


def examine(settings: ServeSettings | None, *, loads: bool = True) -> Iterator[Finding]:
    """Look at everything that a server with these settings would need; None: at the installation.

    loads: load what fits into memory, which alone proves that attention can be served exactly and
    that routers run. Nothing is kept.
    """
    yield from check_installation()
    try:
        yield from check_device(*((settings.device, settings.dtype) if settings else ("auto",) * 2))
        if settings:
            yield from check_host(settings)
            yield from _banks(settings, loads)
    except FaultError as error:
        yield error.finding


def _banks(settings: ServeSettings, loads: bool) -> Iterator[Finding]:
    banks = required("banks", settings.open_banks)
    examined: list[Examined] = []
    for bank in banks:
        for found in check_bank(bank, settings):
            if isinstance(found, Finding):
                yield found
            else:
                examined.append(found)
    if settings.engine.kind == "vllm":
        required("modules", lambda: check_names(banks, settings.placement))
        is_sound = all(one.is_sound for one in examined)
        yield from check_servers(settings, banks, loads and is_sound)
        return
    device = choose_device(settings.device)
    memory = check_memory(_estimates(examined, settings, device), device)
    yield memory
    required("modules", lambda: check_names(banks, settings.placement))
    if not loads:
        yield Finding("note", "load", "nothing was loaded: attention and routers were not tried")
    elif memory.level == "error" or not all(one.is_sound for one in examined):
        yield Finding("note", "load", "nothing was loaded: put right first what is at fault above")
    else:
        said = "attention gives the model's own logits, modules fit, routers run"
        yield from check_load(banks, settings, said)


def _estimates(
    examined: Sequence[Examined], settings: ServeSettings, device: torch.device
) -> list[Estimate]:
    """One of each backbone: banks on the same one share its engine."""
    dtype = choose_dtype(settings.dtype, device)
    backbones = {one.bank.backbone.digest: one.bank.backbone for one in examined}
    return [
        estimate(
            backbone,
            [m for one in examined if one.bank.backbone.digest == digest for m in one.modules],
            settings,
            dtype,
        )
        for digest, backbone in backbones.items()
    ]
