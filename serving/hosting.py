"""Banks in memory: each on an engine, banks on the same backbone on the same engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.bank import Bank, BankModule
from ..adapters.blend import Blend
from ..adapters.digest import json_digest, short
from ..adapters.errors import (
    BackboneError,
    BankError,
    RequestError,
    RouterError,
    UnknownTargetError,
)
from ..routers.base import Card, Decision, Query
from ..routers.loading import load_router
from ..routers.router import Router
from ..runtime.engine import Engine
from ..runtime.options import EngineOptions
from ..runtime.residency import Residency
from ..runtime.resident_set import Source
from ..runtime.torch_engine import TorchEngine
from ..runtime.types import GenerationRequest, SamplingParams, TokenGate
from ..runtime.vllm.engine import VllmEngine
from ..runtime.vllm.options import VllmOptions

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


@dataclass(frozen=True)
class HostedBank:
    """A bank that can answer. Immutable: with another module it is another one.

    bank: with the modules that are served now; its digest is of what is served now.
    opened: the bank as it was opened.
    residency: what keeps the modules of its engine.
    digests: of its modules, by name. read: what each is read by again. shared: digest of its
    always-on module.
    changes: digests of what became of modules since the bank was opened, None of those that went.
    """

    bank: Bank
    opened: Bank
    residency: Residency
    digests: Mapping[str, str]
    read: Mapping[str, Source]
    shared: str | None = None
    router: Router | None = None
    defaults: SamplingParams = field(default_factory=SamplingParams)
    changes: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """What runs the backbone."""
        return self.residency.engine

    @property
    def upstream(self) -> VllmEngine | None:
        """The engine, where bodies are passed on to it as they are."""
        return self.engine if isinstance(self.engine, VllmEngine) else None

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The backbone's tokenizer."""
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """What answers: bank and router."""
        router = short(self.router.digest) if self.router else "none"
        return f"mr-{short(self.bank.digest)}-{router}"

    def request(
        self, prompt_ids: tuple[int, ...], decision: Decision, sampling: SamplingParams
    ) -> GenerationRequest:
        """What the engine is asked to carry a decision out.

        Raises:
            UnknownTargetError: it names a module that the bank does not have.
            RequestError: modules are to be weighed by token, and there are none.
        """
        blend = self._by_digest(decision.blend)
        return GenerationRequest(prompt_ids, blend, sampling, self.gate(decision))

    def gate(self, decision: Decision) -> TokenGate | None:
        """All the bank's modules, where layers weigh them for every token.

        Raises:
            RequestError: there are none.
        """
        if decision.token_routing is None:
            return None
        return TokenGate(decision.token_routing, tuple(set(self.digests.values())))

    def needed(self, decision: Decision) -> tuple[str, ...]:
        """Digests of the modules that carrying a decision out takes, the shared one among them."""
        gate = self.gate(decision)
        return (*self._by_digest(decision.blend), *(gate.modules if gate else ()))

    def names(self, digests: Sequence[str]) -> tuple[str, ...]:
        """What the bank calls modules."""
        return tuple(name for name, digest in self.digests.items() if digest in digests)

    def release(self, name: str) -> None:
        """Undo the registration of one of its modules, which is asked for by this bank no more."""
        self.residency.unregister(self.digests[name], self.read[name])

    def with_module(
        self, entry: BankModule, digest: str, card: Card, *, read: Source
    ) -> HostedBank:
        """This bank and one module more, or with the module of this name replaced. The router
        forgets what it knew of other weights under the name.

        digest: of the module, which the engine has loaded. card: what the router is told of it.
        read: what it was registered with.

        Raises:
            RouterError: the router cannot read the card.
        """
        said: dict[str, object] = {
            "module": digest,
            "samples": entry.samples,
            "description": entry.description,
        }
        is_same = digest == self.digests.get(entry.name)
        if is_same and not entry.samples:  # the router goes by what it was told before
            said["before"] = self.changes.get(entry.name)
        modules = {module.name: module for module in self.bank.modules} | {entry.name: entry}
        return self._changed(
            modules,
            {**self.digests, entry.name: digest},
            {**self.read, entry.name: read},
            self.router and self.router.with_module(card, is_same=is_same),
            {**self.changes, entry.name: json_digest(said)},
        )

    def without_module(self, name: str) -> HostedBank:
        """This bank without one of its modules."""
        modules = {module.name: module for module in self.bank.modules if module.name != name}
        return self._changed(
            modules,
            {known: digest for known, digest in self.digests.items() if known != name},
            {known: read for known, read in self.read.items() if known != name},
            self.router and self.router.without_module(name),
            {known: change for known, change in self.changes.items() if known != name}
            | ({name: None} if name in {module.name for module in self.opened.modules} else {}),
        )

    def check_router(self) -> None:
        """Route one prompt, whatever comes of it.

        Raises:
            BankError: the router names a module that the bank lacks, or does not fit its backbone.
        """
        if self.router is None:
            return
        if unknown := set(self.router.modules) - self.digests.keys():
            raise BankError(
                f"the router of bank {self.bank.name!r} names {min(unknown)!r}, which the bank "
                "lacks: fit the router again"
            )
        try:
            if gate := self.gate(self.router.route(Query.of((0, 1)))):
                with self.residency.hold_now(gate.modules):
                    self.engine.prepare_gate(gate)
        except (RouterError, RequestError, RuntimeError) as error:
            raise _unfit(self.bank, error) from error

    def _changed(
        self,
        modules: Mapping[str, BankModule],
        digests: Mapping[str, str],
        read: Mapping[str, Source],
        router: Router | None,
        changes: Mapping[str, str | None],
    ) -> HostedBank:
        digest = self.opened.digest
        if changes:
            digest = json_digest({"opened": digest, "changes": changes})
        bank = replace(self.bank, modules=tuple(modules.values()), digest=digest)
        return replace(self, bank=bank, digests=digests, read=read, router=router, changes=changes)

    def _by_digest(self, blend: Blend) -> Blend:
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


def _unfit(bank: Bank, error: Exception) -> BankError:
    return BankError(
        f"the router of bank {bank.name!r} does not fit its backbone ({error}): fit it again"
    )


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
