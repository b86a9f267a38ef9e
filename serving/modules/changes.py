"""Modules that come and go while the server runs. A change that fails leaves everything as it was:
it makes new targets, and who serves takes them over, or does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...adapters.bank import BankModule
from ...adapters.errors import BankError, ModuleError, RequestError, RouterError, UnknownTargetError
from ...adapters.manifest import check_name
from ...routers.base import Card, Query
from ...runtime.types import GenerationRequest
from ..chat import user_prompt
from ..errors import ApiError
from ..hosting import HostedBank
from ..schemas import LoadModuleRequest, UnloadModuleRequest
from ..targets import Targets
from .paths import module_folder

_INVALID = "invalid_lora_adapter"


@dataclass(frozen=True)
class Change:
    """What a load or an unload comes to.

    targets: what can be asked for afterwards. retired: digest that nothing names any more, and the
    bank whose engine holds it; its load is undone once the targets are in place.
    basis: what the router goes by, in a sentence.
    """

    targets: Targets
    retired: tuple[HostedBank, str] | None = None
    basis: str = ""


def load(targets: Targets, body: LoadModuleRequest, roots: Sequence[Path]) -> Change:
    """Read a module, make it resident and introduce it to its bank's router.

    roots: resolved folders; the module lies under one of them.

    Raises:
        ApiError: the name is taken or not allowed, the path is not allowed, or the module, its
            samples or the router with it cannot be used.
        EngineStoppedError: the engine was stopped.
    """
    if not (body.lora_name and body.lora_path):
        missing = "lora_path" if body.lora_name else "lora_name"
        raise ApiError("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
    host, name = _placed(targets, body.lora_name)
    _check_name(targets, host, name, body)
    entry = BankModule(
        name,
        module_folder(body.lora_path, roots, name=body.lora_name),
        description=body.description or "",
        samples=body.samples,
    )
    card = Card(name, _samples(host, body.samples), _described(host, entry.description))
    try:
        return _loaded(targets, host, entry, card)
    except (ModuleError, RouterError, BankError) as error:
        raise ApiError(
            f"Loading lora {body.lora_name} failed: {error}", param="lora_path", code=_INVALID
        ) from error


def unload(targets: Targets, body: UnloadModuleRequest) -> Change:
    """Take a module out of its bank and its router. Requests that run on it keep it.

    Raises:
        ApiError: nothing, or several things, have this name, or the router cannot do without it.
    """
    if not body.lora_name:
        raise ApiError(
            "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name"
        )
    host, name = _owner(targets, body.lora_name)
    after = host.without_module(name)
    try:
        after.check_router()
    except BankError as error:
        raise ApiError(str(error), status=409, param="lora_name", code="conflict") from error
    return Change(targets.replacing(host, after), (host, host.digests[name]))


def _loaded(targets: Targets, host: HostedBank, entry: BankModule, card: Card) -> Change:
    digest = host.engine.load_module(host.bank.load(entry))
    try:
        after = host.with_module(entry, digest, card)
        after.check_router()
        before = host.digests.get(entry.name)
        retired = (host, before) if before else None
        return Change(targets.replacing(host, after), retired, _basis(after, card))
    except BaseException:
        host.engine.unload_module(digest)
        raise


def _basis(host: HostedBank, card: Card) -> str:
    """What the router goes by: asked of its decision on a prompt of the module's own."""
    if host.router is None:
        return "The bank has no router: ask for it by name."
    query = card.samples[0] if card.samples else card.description or Query.of((0, 1))
    decision = host.router.route(query)
    if decision.token_routing:
        return f"The router ({host.router.name}) weighs it by its weights, token by token."
    if basis := decision.basis.get(card.name):
        return f"The router knows it by {basis}."
    if card.name in host.router.modules:
        return "The router knows it."
    return (
        "The router has nothing to go by: ask for it by name, or load it again in place, with "
        "samples."
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
            raise ApiError(
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
