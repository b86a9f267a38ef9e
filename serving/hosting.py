"""Banks in memory: each on an engine, banks on the same backbone on the same engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.bank import Bank
from ..adapters.blend import Blend
from ..adapters.digest import short
from ..adapters.errors import BackboneError, BankError, RouterError, UnknownTargetError
from ..routers.base import Query
from ..routers.router import Router
from ..routers.store import load_router, modules_of
from ..runtime.torch_engine import EngineOptions, TorchEngine
from ..runtime.types import SamplingParams

Report = Callable[[str], None]
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Placement:
    """Where engines run. device, dtype: as on the command line."""

    device: str = "auto"
    dtype: str = "auto"
    options: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class HostedBank:
    """A bank that can answer.

    digests: of its modules as the engine knows them, by name. shared: of its always-on module.
    """

    bank: Bank
    engine: TorchEngine
    digests: Mapping[str, str]
    shared: str | None = None
    router: Router | None = None
    defaults: SamplingParams = field(default_factory=SamplingParams)

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The backbone's tokenizer."""
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """What answers: bank and router."""
        router = short(self.router.digest) if self.router else "none"
        return f"mr-{short(self.bank.digest)}-{router}"

    def by_digest(self, blend: Blend) -> Blend:
        """A blend over names as the engine wants it, the shared module always among it.

        Raises:
            UnknownTargetError: it names a module that the bank does not have.
        """
        for name in blend:
            if name not in self.digests:
                known = ", ".join(self.digests) or "none"
                raise UnknownTargetError(
                    f"bank {self.bank.name!r} has no module {name!r}; its modules: {known}"
                )
        loaded = blend.renamed(self.digests)
        return loaded if self.shared is None else Blend({**loaded, self.shared: 1.0})


def host_banks(
    banks: Sequence[Bank], placement: Placement = Placement(), *, report: Report = lambda _: None
) -> list[HostedBank]:
    """Load banks; those on one backbone share its engine. On an error nothing stays behind.

    report: told what was loaded, in sentences.

    Raises:
        MergerouteError: a bank cannot be served.
    """
    engines: dict[str, TorchEngine] = {}
    try:
        return [_host(bank, engines, placement, report) for bank in banks]
    except BaseException:
        for engine in engines.values():
            engine.stop()
        raise


def _host(
    bank: Bank, engines: dict[str, TorchEngine], placement: Placement, report: Report
) -> HostedBank:
    backbone = bank.backbone
    if backbone.digest not in engines:
        engine = TorchEngine.load(
            backbone.path,
            device=placement.device,
            dtype=placement.dtype,
            options=placement.options,
        )
        engines[backbone.digest] = engine
        report(
            f"backbone {backbone.name} {short(backbone.digest)}: {engine.model.device}, "
            f"{str(engine.model.dtype).removeprefix('torch.')}, context {engine.max_length:,}"
        )
    engine = engines[backbone.digest]
    digests = {}
    for entry in bank.modules:
        module = bank.load(entry)
        digests[entry.name] = engine.load_module(module)
        report(f"module {bank.name}:{entry.name}: {module.coverage(backbone.layers)}")
    shared = None
    if bank.shared is not None:
        module = bank.load(bank.shared)
        shared = engine.load_module(module)
        report(f"shared module of {bank.name}: {module.coverage(backbone.shapes)}")
    return HostedBank(
        bank=bank,
        engine=engine,
        digests=digests,
        shared=shared,
        router=_router(bank, engine),
        defaults=_defaults(backbone.path),
    )


def _router(bank: Bank, engine: TorchEngine) -> Router | None:
    if bank.router_path is None:
        return None
    known = {module.name for module in bank.modules}
    if unknown := set(modules_of(bank.router_path)) - known:
        raise BankError(
            f"the router of bank {bank.name!r} names {min(unknown)!r}, which the bank lacks: "
            "fit the router again"
        )
    router = load_router(bank.router_path, encode=engine.encode)
    try:
        router.route(Query((0, 1)))
    except (RouterError, RuntimeError) as error:
        raise BankError(
            f"the router of bank {bank.name!r} does not fit its backbone ({error}): fit it again"
        ) from error
    return router


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
