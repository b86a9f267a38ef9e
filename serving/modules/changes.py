"""Modules that come and go while the server runs. A change that fails leaves everything as it was:
it makes new targets, and who serves takes them over, or does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...adapters.bank import BankModule
from ...adapters.errors import BankError, ModuleError, RequestError, RouterError, UnknownTargetError
from ...adapters.manifest import check_name
from ...routers.base import Card, Query
from ...runtime.types import GenerationRequest
from ..chat import user_prompt
from ..errors import ApiError
from ..hosted import HostedBank
from ..targets import Targets
from .schemas import LoadModuleRequest, UnloadModuleRequest
from .sources import Sources
from .state import ModuleChange, State

_INVALID = "invalid_lora_adapter"
_ENOUGH_SAMPLES = 10


class InvalidUserInput(ApiError):
    """What vLLM calls by this name: a field is missing, or the name is loaded already."""


@dataclass(frozen=True)
class Change:
    """What a load or an unload comes to.

    targets: what can be asked for afterwards. state: what is to be kept of it.
    retired: name of a module that went, and the bank that had it; its registration is undone once
    the targets are in place. added: one that was registered, which is undone if they never are.
    basis: what the router goes by, in a sentence.
    """

    targets: Targets
    state: State
    generation: int = 0
    retired: tuple[HostedBank, str] | None = None
    added: tuple[HostedBank, str] | None = None
    basis: str = ""


def load(targets: Targets, state: State, body: LoadModuleRequest, sources: Sources) -> Change:
    """Read a module, register it and introduce it to its bank's router.

    Raises:
        ApiError: the name is taken or not allowed, it has another generation than expected, the
            path is not allowed, or the module, its samples or the router with it cannot be used.
        EngineStoppedError: the engine was stopped.
    """
    if not (body.lora_name and body.lora_path):
        missing = "lora_path" if body.lora_name else "lora_name"
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
    host, name = _placed(targets, body.lora_name)
    _check_name(targets, host, name, body)
    _check_backbone(host, body)
    _check_generation(state, host, name, body.expected_generation)
    folder = sources.folder(body.lora_path, name=body.lora_name)
    asked = ModuleChange(
        name=name,
        path=str(folder),
        description=body.description or "",
        samples=body.samples,
        pinned=body.pinned,
    )
    try:
        loaded = introduced(targets, host, asked, told=state.of(host).change(name))
        basis = _basis_or_undone(host, loaded)
    except (ModuleError, RouterError, BankError) as error:
        raise ApiError(
            f"Loading lora {body.lora_name} failed: {error}", param="lora_path", code=_INVALID
        ) from error
    kept = loaded.change.model_copy(update={"before": _before(state, host, name)})
    generation = state.last_generation(host, name) + 1
    after = state.replacing(state.of(host).changed(kept, generation=generation))
    return replace(loaded.into(after), generation=generation, basis=basis)


def unload(targets: Targets, state: State, body: UnloadModuleRequest) -> Change:
    """Take a module out of its bank and its router. Requests that run on it keep it. One that could
    not be brought back after a restart is no longer remembered.

    Raises:
        ApiError: nothing, or several things, have this name, it has another generation than
            expected, or the router cannot do without it.
    """
    if not body.lora_name:
        raise InvalidUserInput(
            "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name"
        )
    try:
        host, name = _owner(targets, body.lora_name)
    except ApiError:
        if (forgotten := _forgotten(targets, state, body)) is None:
            raise
        return Change(targets, forgotten)
    generation = _check_generation(state, host, name, body.expected_generation)
    after = host.without_module(name)
    try:
        after.check_router()
    except BankError as error:
        raise ApiError(str(error), status=409, param="lora_name", code="conflict") from error
    change = ModuleChange(name=name, before=_before(state, host, name))
    return Change(
        targets.replacing(host, after),
        state.replacing(state.of(host).changed(change, generation=generation)),
        generation,
        retired=(host, name),
    )


@dataclass(frozen=True)
class Introduced:
    """A module that is registered and known to its bank's router.

    host: the bank with it. change: what was asked for, with the digest.
    """

    targets: Targets
    host: HostedBank
    change: ModuleChange
    card: Card
    retired: tuple[HostedBank, str] | None

    def into(self, state: State) -> Change:
        """As a change of targets and state."""
        added = (self.host, self.change.name)
        return Change(self.targets, state, retired=self.retired, added=added)


def introduced(
    targets: Targets, host: HostedBank, asked: ModuleChange, told: ModuleChange | None = None
) -> Introduced:
    """Register a module and introduce it to the router. Where the same weights are loaded again
    with nothing said of them, the router goes by what it was told before.

    Raises:
        ModuleError, RouterError, BankError: it cannot be used; nothing has changed.
        ApiError: a sample cannot be used.
    """
    opened = host.opened  # a source that held the host would keep all of what was served by now
    read = partial(opened.load, BankModule(asked.name, Path(asked.path)))
    digest = host.residency.register(read(), read, is_pinned=asked.pinned)
    try:
        if asked.digest not in (None, digest):
            raise ModuleError(f"the files in {asked.path} have changed since they were loaded")
        change = _with_what_was_told(asked.model_copy(update={"digest": digest}), told)
        entry = BankModule(
            change.name,
            Path(change.path),
            description=change.description,
            samples=change.samples,
        )
        card = Card(entry.name, _samples(host, entry.samples), _described(host, entry.description))
        after = host.with_module(entry, digest, card, read=read)
        after.check_router()
        return Introduced(
            targets.replacing(host, after),
            after,
            change,
            card,
            (host, entry.name) if entry.name in host.digests else None,
        )
    except BaseException:
        host.residency.unregister(digest, read)
        raise


def _with_what_was_told(change: ModuleChange, told: ModuleChange | None) -> ModuleChange:
    if told is None or told.digest != change.digest or change.samples:
        return change
    description = change.description or told.description
    return change.model_copy(update={"samples": told.samples, "description": description})


def _before(state: State, host: HostedBank, name: str) -> str | None:
    """Digest of what the bank has under this name on disk."""
    told = state.of(host).change(name)
    if told is not None:
        return told.before
    is_its_own = any(module.name == name for module in host.opened.modules)
    return host.digests.get(name) if is_its_own else None


def _forgotten(targets: Targets, state: State, body: UnloadModuleRequest) -> State | None:
    """Without a module that could not be brought back; None where there is none of this name."""
    bank, _, name = body.lora_name.rpartition(":")
    for host in targets.hosted:
        told = state.of(host).change(name)
        if bank in ("", host.bank.name) and told is not None and told.error is not None:
            gone = ModuleChange(name=name, before=told.before)
            generation = _check_generation(state, host, name, body.expected_generation)
            return state.replacing(state.of(host).changed(gone, generation=generation))
    return None


def _check_generation(state: State, host: HostedBank, name: str, expected: int | None) -> int:
    """The generation that a name has now; 0 where nothing has the name.

    Raises:
        ApiError: the caller expects another one.
    """
    found = state.generation(host, name)
    if expected not in (None, found):
        raise ApiError(
            f"the lora adapter {name!r} has generation {found}, and expected_generation is "
            f"{expected}: look at GET /v1/modules and decide again",
            status=409,
            param="expected_generation",
            code="lora_generation_mismatch",
        )
    return found


def _check_backbone(host: HostedBank, body: LoadModuleRequest) -> None:
    backbone = host.bank.backbone
    if body.base_model_name not in (None, "", backbone.name, str(backbone.path)):
        raise ApiError(
            f"base_model_name is {body.base_model_name!r}, and bank {host.bank.name!r} stands on "
            f"{backbone.name!r}: leave it out, or load into another bank",
            param="base_model_name",
        )


def _basis_or_undone(before: HostedBank, loaded: Introduced) -> str:
    try:
        return _basis(before, loaded)
    except BaseException:
        loaded.host.release(loaded.change.name)
        raise


def _basis(before: HostedBank, loaded: Introduced) -> str:
    """What the router goes by: asked of its decision on a prompt of the module's own."""
    host, card = loaded.host, loaded.card
    if host.router is None:
        return "The bank has no router: ask for it by name."
    query = card.samples[0] if card.samples else card.description or Query.of((0, 1))
    decision = host.router.route(query)
    if decision.token_routing:
        return f"The router ({host.router.name}) weighs it by its weights, token by token."
    if basis := decision.basis.get(card.name):
        return f"The router knows it by {basis}.{_few(len(card.samples))}"
    if card.name in host.router.modules:
        return "The router knows it."
    forgot = before.router is not None and card.name in before.router.modules
    return (
        f"The router {'forgot what it knew of other weights under this name and ' * forgot}has "
        f"nothing to go by{', since it reads no descriptions' * (card.description is not None)}: "
        "ask for it by name, load it again in place with samples, or, if it is an mlp, fit it "
        "again."
    )


def _few(samples: int) -> str:
    if not 0 < samples < _ENOUGH_SAMPLES:
        return ""
    return (
        f" Give {_ENOUGH_SAMPLES} or more, in several wordings: with {samples} it may also take "
        "prompts that merely share words with them."
    )


def _placed(targets: Targets, lora_name: str) -> tuple[HostedBank, str]:
    """The bank that a new module goes to, and its bare name."""
    bank, colon, name = lora_name.rpartition(":")
    if not colon:
        return targets.default, name
    if bank not in targets.banks:
        raise ApiError(
            f"there is no bank {bank!r} to load into; there are: {', '.join(targets.banks)}",
            status=404,
            param="lora_name",
            code="model_not_found",
        )
    return targets.banks[bank], name


def _owner(targets: Targets, lora_name: str) -> tuple[HostedBank, str]:
    """The bank that has a module of this name, and its bare name."""
    try:
        target = targets.module(lora_name)
    except UnknownTargetError as error:
        raise ApiError(
            f"The lora adapter '{lora_name}' cannot be found. ({error})",
            status=404,
            param="lora_name",
            code="lora_adapter_not_found",
        ) from error
    return target.hosted, lora_name.rpartition(":")[2]


def _check_name(targets: Targets, host: HostedBank, name: str, body: LoadModuleRequest) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise ApiError(str(error), param="lora_name", code=_INVALID) from error
    if name in host.digests:
        if not body.load_inplace:
            raise InvalidUserInput(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load "
                "the adapter in place, set 'load_inplace' to True.",
                param="lora_name",
            )
    elif targets.is_taken(name):
        raise ApiError(
            f"{name!r} is the name of a bank or a backbone: choose another",
            status=409,
            param="lora_name",
            code="conflict",
        )


def _described(host: HostedBank, text: str) -> Query | None:
    """A description as the router will see prompts."""
    return Query(user_prompt(host.tokenizer, text).turns) if text.strip() else None


def _samples(host: HostedBank, texts: Sequence[str]) -> tuple[Query, ...]:
    """Prompts as the router will see such ones."""
    queries = []
    for index, text in enumerate(dict.fromkeys(texts)):
        prompt = user_prompt(host.tokenizer, text)
        try:
            host.engine.check(GenerationRequest(prompt.token_ids))
        except RequestError as error:
            raise ApiError(f"samples.{index}: {error}", param=f"samples.{index}") from error
        queries.append(Query(prompt.turns))
    return tuple(queries)
