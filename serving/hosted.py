"""A bank that can answer, and how modules come into it and leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.bank import Bank, BankModule
from ..adapters.blend import Blend
from ..adapters.digest import json_digest, short
from ..adapters.errors import BankError, RequestError, RouterError, UnknownTargetError
from ..routers.base import Card, Decision, Query
from ..routers.router import Router
from ..runtime.engine import Engine
from ..runtime.residency import Residency
from ..runtime.resident_set import Source
from ..runtime.types import GenerationRequest, SamplingParams, TokenGate
from ..runtime.vllm.engine import VllmEngine


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


def _unfit(bank: Bank, error: Exception) -> BankError:
    return BankError(
        f"the router of bank {bank.name!r} does not fit its backbone ({error}): fit it again"
    )
