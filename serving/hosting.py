"""Banks in memory: each on an engine, banks on the same backbone on the same engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..adapters.bank import Bank, BankModule
from ..adapters.digest import short
from ..adapters.errors import (
    BackboneError,
    BankError,
    UnknownTargetError,
)
from ..routers.loading import load_router
from ..routers.router import Router
from ..runtime.engine import Engine
from ..runtime.options import EngineOptions
from ..runtime.residency import Residency
from ..runtime.resident_set import Source
from ..runtime.torch_engine import TorchEngine
from ..runtime.types import SamplingParams
from ..runtime.vllm.engine import VllmEngine
from ..runtime.vllm.options import VllmOptions
from .hosted import HostedBank

Report = Callable[[str], None]
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Placement:
    """Where engines run, and what of their modules is in memory from the start.

    device, dtype: as on the command line. pinned: names of modules that stay in memory, bare or
    after their bank's name and a colon. prefetch: those that are read into memory as long as
    there is room; None: all, bank by bank. servers: of vLLM, which run the models then.
    """

    device: str = "auto"
    dtype: str = "auto"
    options: EngineOptions = field(default_factory=EngineOptions)
    pinned: tuple[str, ...] = ()
    prefetch: tuple[str, ...] | None = None
    servers: VllmOptions | None = None


def host_banks(
    banks: Sequence[Bank],
    placement: Placement = Placement(),
    *,
    report: Report = lambda _: None,
    starts: bool = True,
) -> list[HostedBank]:
    """Load banks; those on one backbone share its engine. On an error nothing stays behind.

    report: told what was loaded, in sentences. starts: start servers of vLLM, where they run it.

    Raises:
        MergerouteError: a bank cannot be served.
    """
    check_names(banks, placement)
    residencies: dict[str, Residency] = {}
    check_servers(banks, placement)
    try:
        hosted = [_host(bank, banks, residencies, placement, report) for bank in banks]
        for residency in residencies.values():
            if starts and isinstance(residency.engine, VllmEngine):
                residency.engine.start(report)
        return hosted
    except BaseException:
        for residency in residencies.values():
            residency.stop()
        raise


def _host(
    bank: Bank,
    banks: Sequence[Bank],
    residencies: dict[str, Residency],
    placement: Placement,
    report: Report,
) -> HostedBank:
    backbone = bank.backbone
    if backbone.digest not in residencies:
        engine = _engine(bank, banks, placement, report)
        residencies[backbone.digest] = Residency(engine)
    residency = residencies[backbone.digest]
    shared = None
    if bank.shared is not None:
        read_shared = partial(bank.load, bank.shared)
        shared = _register(bank, bank.shared, read_shared, residency, report, is_pinned=True)
    read = {entry.name: partial(bank.load, entry) for entry in bank.modules}
    digests = {
        entry.name: _register(
            bank,
            entry,
            read[entry.name],
            residency,
            report,
            is_pinned=_is_named(bank, entry, placement.pinned),
            is_wanted=placement.prefetch is None or _is_named(bank, entry, placement.prefetch),
        )
        for entry in bank.modules
    }
    hosted = HostedBank(
        bank=bank,
        opened=bank,
        residency=residency,
        digests=digests,
        read=read,
        shared=shared,
        router=_router(bank, residency.engine),
        defaults=_defaults(backbone.path),
    )
    hosted.check_router()
    return hosted


def _engine(bank: Bank, banks: Sequence[Bank], placement: Placement, report: Report) -> Engine:
    """What runs a bank's backbone. banks: all that are hosted."""
    backbone = bank.backbone
    name = f"backbone {backbone.name} {short(backbone.digest)}"
    if placement.servers is None:
        engine = TorchEngine.load(
            backbone.path,
            device=placement.device,
            dtype=placement.dtype,
            options=placement.options,
        )
        dtype = str(engine.model.dtype).removeprefix("torch.")
        report(f"{name}: {engine.model.device}, {dtype}, context {engine.max_length:,}")
        return engine
    alike = [one for one in banks if one.backbone.digest == backbone.digest]
    entries = [(one, e) for one in alike for e in (*one.modules, *filter(None, [one.shared]))]
    ranks = [one.load(entry).rank for one, entry in entries]
    servers = VllmEngine(
        backbone.path,
        backbone.shapes,
        placement.servers,
        modules=(len(ranks), max(ranks, default=0)),
        device=placement.device,
        dtype=placement.dtype,
        options=placement.options,
    )
    report(f"{name}: {len(servers.replicas)} vLLM servers, context {servers.max_length:,}")
    return servers


def check_servers(banks: Sequence[Bank], placement: Placement) -> None:
    """Servers that run already have one backbone.

    Raises:
        BankError: the banks have several.
    """
    backbones = {bank.backbone.digest: bank.backbone.name for bank in banks}
    if placement.servers and placement.servers.urls and len(backbones) > 1:
        raise BankError(
            f"engine.urls names servers of one backbone, and the banks stand on "
            f"{', '.join(sorted(backbones.values()))}: serve them by a gateway each"
        )


def _register(
    bank: Bank,
    entry: BankModule,
    read: Source,
    residency: Residency,
    report: Report,
    *,
    is_pinned: bool,
    is_wanted: bool = True,
) -> str:
    module = read()
    digest = residency.register(module, read, is_pinned=is_pinned, is_wanted=is_wanted)
    cold = "" if residency.info(digest).is_resident else "; read when it is asked for"
    if entry is bank.shared:
        report(f"shared module of {bank.name}: {module.coverage(bank.backbone.shapes)}{cold}")
    else:
        report(f"module {bank.name}:{entry.name}: {module.coverage(bank.backbone.layers)}{cold}")
    return digest


def check_names(banks: Sequence[Bank], placement: Placement) -> None:
    """Every name of a placement is that of a module, bare or after its bank's.

    Raises:
        UnknownTargetError: one is not.
    """
    names = (*placement.pinned, *(placement.prefetch or ()))
    known = {name for bank in banks for module in bank.modules for name in _names(bank, module)}
    if unknown := [name for name in names if name not in known]:
        raise UnknownTargetError(
            f"{unknown[0]!r} is to be pinned or prefetched, and no bank has such a module; there "
            f"are: {', '.join(sorted(known)) or 'none'}"
        )


def _is_named(bank: Bank, module: BankModule, names: Sequence[str]) -> bool:
    return any(name in names for name in _names(bank, module))


def _names(bank: Bank, module: BankModule) -> tuple[str, str]:
    return module.name, f"{bank.name}:{module.name}"


def _router(bank: Bank, engine: Engine) -> Router | None:
    if bank.router_path is None:
        return None
    return load_router(bank.router_path, encode=engine.encode, backbone=bank.backbone.digest)


def _defaults(path: Path) -> SamplingParams:
    """The sampling values that the backbone's generation_config.json states, as vLLM reads it."""
    file = path / "generation_config.json"
    try:
        stated = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise BackboneError(f"{file} is no JSON: {error}") from error
    return SamplingParams(
        **{name: stated[name] for name in _SAMPLING_DEFAULTS if stated.get(name) is not None}
    )
