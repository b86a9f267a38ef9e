"""Routers on disk: router.json, and the tensors of what was fitted beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.blend import Blend
from ..adapters.digest import file_digest, json_digest
from ..adapters.errors import BlendError, RouterError
from .base import Encode, Scorer, Signal
from .chance import Chance
from .ensemble import Ensemble
from .fixed import Fixed
from .learned import Fitted, Learned
from .mlp import Mlp
from .ngrams import Ngrams
from .policies import Policy
from .prototype import Prototype
from .retriever import Retriever
from .router import RequestRouter, Router, TokenRouter
from .rules import Rule, Rules
from .settings import (
    ChanceSettings,
    EnsembleSettings,
    FixedSettings,
    LearnedSettings,
    MemberSettings,
    PluginSettings,
    RouterSettings,
    RulesSettings,
    SignalSettings,
    TokenSettings,
)
from .signals import CACHED_PROMPTS, Cached, HiddenState, Joined, Recency
from .token_routing import TokenRouting

CONFIG_FILE = "router.json"
TENSORS_FILE = "scorer.safetensors"
PLUGINS = "mergeroute.routers"
"""Entry points: each a function of (settings, modules, signal) that gives a `Scorer`."""


class _Settings(BaseModel):
    router: Annotated[RouterSettings, Field(discriminator="scorer")]


def save_router(
    folder: Path,
    settings: RouterSettings,
    *,
    fitted: Mapping[int, Fitted] | Fitted | None = None,
) -> None:
    """Write a router into a folder.

    fitted: the scorer, where it was fitted; of an ensemble by the member's place.

    Raises:
        RouterError: an embedding model that it reads is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fitted is not None:
        save_file(_tensors(fitted), folder / TENSORS_FILE)
    _write(folder, _with_embeddings(settings))


def load_router(folder: Path, *, encode: Encode, backbone: str) -> Router:
    """Read a router.

    encode: runs the backbone's first layers. backbone: its digest, to be compared with that of the
    backbone on which the router was fitted.

    Raises:
        RouterError: a file is missing or damaged, a setting is out of range, or the router was
            fitted on another backbone or embedding model, or does not say on which.
    """
    settings = read_settings(folder)
    for part in _parts(settings):
        _check_backbone(folder, part, part.backbone or settings.backbone, backbone)
    digest = _digest(folder)
    if isinstance(settings, TokenSettings):
        return TokenRouter(_token_routing(settings), digest)
    scorer = _Parts(folder, encode).scorer(settings)
    policy = Policy.parse(getattr(settings, "policy", "quantise"))
    return RequestRouter(scorer, policy, digest=digest, renamed=settings.renamed or {})


def read_settings(folder: Path) -> RouterSettings:
    """What router.json says.

    Raises:
        RouterError: it is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        _json(document).encode("utf-8")  # JSON may hold lone surrogates, and nothing else may
        return _Settings.model_validate({"router": document}).router
    except (OSError, ValueError, RecursionError) as error:
        detail = _explained(error) if isinstance(error, ValidationError) else str(error)
        raise RouterError(f"{path} is missing or damaged: {detail}") from error


def modules_of(folder: Path) -> tuple[str, ...]:
    """The modules a router on disk may name, by their new names where they were renamed.

    Raises:
        RouterError: as `load_router`.
    """
    settings = read_settings(folder)
    renamed = settings.renamed or {}
    return tuple(dict.fromkeys(renamed.get(name, name) for name in settings.known))


def rename_modules(folder: Path, names: Mapping[str, str]) -> None:
    """Tell a router on disk where modules have gone. It is not fitted again: it decides as before,
    and what it gave to the old names goes to the new ones.

    names: old to new; modules that are not named keep theirs. Several may get one name.

    Raises:
        RouterError: as `load_router`; or a fixed blend would give one module a weight beyond 8.
    """
    settings = read_settings(folder)
    before = settings.renamed or {}
    moved = {name: before.get(name, name) for name in settings.known}
    after = {name: names.get(now, now) for name, now in moved.items()}
    if isinstance(settings, FixedSettings):
        _check_sum(_blend(settings), after)
    renamed = {name: now for name, now in after.items() if now != name}
    _write(folder, settings.model_copy(update={"renamed": renamed or None}))


def signal_of(
    settings: SignalSettings, *, encode: Encode, capacity: int = CACHED_PROMPTS
) -> Signal:
    """The signal that settings describe, remembering what it has read.

    capacity: most prompts that are remembered.
    """
    if settings.layer is None:
        raise RouterError("the signal states no layer: write 'layer', or fit the router again")
    parts: list[Signal] = []
    if settings.layers:
        parts.append(HiddenState(encode, settings.layers, settings.pooling, settings.window))
    if settings.ngrams:
        parts.append(Ngrams(settings.ngrams))
    if settings.embedding:
        from .embedding import SentenceEmbedding

        parts.append(SentenceEmbedding(settings.embedding))
    cached = Cached(parts[0] if len(parts) == 1 else Joined(tuple(parts)), capacity)
    return cached if settings.recency is None else Recency(cached, settings.recency)


class _Parts:
    """Makes scorers; those with the same signal settings share the signal."""

    def __init__(self, folder: Path, encode: Encode) -> None:
        self._folder = folder
        self._encode = encode
        self._signals: dict[SignalSettings, Signal] = {}

    def scorer(self, settings: MemberSettings | EnsembleSettings, prefix: str = "") -> Scorer:
        if isinstance(settings, EnsembleSettings):
            members = enumerate(settings.members)
            return Ensemble(tuple(self.scorer(member, f"{k}.") for k, member in members))
        if isinstance(settings, LearnedSettings):
            return self._learned(settings, prefix)
        if isinstance(settings, RulesSettings):
            return Rules(tuple(Rule(**rule.model_dump()) for rule in settings.rules))
        if isinstance(settings, ChanceSettings):
            return Chance(settings.modules, seed=settings.seed)
        if isinstance(settings, PluginSettings):
            make = _plugin(settings.plugin)
            return make(settings.settings, settings.modules, self._signal(settings.signal))
        return Fixed(_blend(settings))

    def _learned(self, settings: LearnedSettings, prefix: str) -> Scorer:
        path = self._folder / TENSORS_FILE
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RouterError(f"{path} is missing or damaged: {error}") from error
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        _check_embedding(self._folder, settings)
        signal, modules = self._signal(settings.signal), settings.modules
        if settings.scorer == "retriever":
            return Retriever.from_state(state, modules, signal=signal)
        kind: type[Prototype | Mlp] = Prototype if settings.scorer == "prototype" else Mlp
        return Learned(signal, kind.from_state(state, modules))

    def _signal(self, settings: SignalSettings) -> Signal:
        if settings not in self._signals:
            self._signals[settings] = signal_of(settings, encode=self._encode)
        return self._signals[settings]


def _parts(settings: RouterSettings) -> tuple[RouterSettings, ...]:
    """The router itself, and an ensemble's members."""
    return (settings, *settings.members) if isinstance(settings, EnsembleSettings) else (settings,)


def _check_backbone(folder: Path, part: RouterSettings, stated: str | None, backbone: str) -> None:
    if stated is None and isinstance(part, LearnedSettings) and part.signal.layers:
        raise RouterError(
            f"the router of {folder} reads a backbone's layers and does not say which backbone's "
            "it was fitted on: fit it again (mergeroute router fit)"
        )
    if stated not in (None, backbone):
        raise RouterError(
            f"the router of {folder} was fitted on backbone {stated}, this one is {backbone}: "
            "fit it again (mergeroute router fit)"
        )


def _with_embeddings(settings: RouterSettings) -> RouterSettings:
    """With the digests of the embedding models, as they are now."""
    if isinstance(settings, EnsembleSettings):
        members = tuple(_with_embeddings(member) for member in settings.members)
        return settings.model_copy(update={"members": members})
    if not (isinstance(settings, LearnedSettings) and settings.signal.embedding):
        return settings
    from .embedding import digest_of

    return settings.model_copy(update={"embedding": digest_of(settings.signal.embedding)})


def _check_embedding(folder: Path, settings: LearnedSettings) -> None:
    if not settings.signal.embedding:
        return
    from .embedding import digest_of

    digest = digest_of(settings.signal.embedding)
    if settings.embedding != digest:
        raise RouterError(
            f"the router of {folder} was fitted on embedding model {settings.embedding}, "
            f"{settings.signal.embedding} is {digest}: put the former back, or fit it again "
            "(mergeroute router fit)"
        )


def _plugin(name: str) -> Callable[..., Scorer]:
    found = entry_points(group=PLUGINS, name=name)
    if not found:
        known = ", ".join(sorted(point.name for point in entry_points(group=PLUGINS))) or "none"
        raise RouterError(
            f"router plugin {name!r} is not installed ({PLUGINS} has: {known}): install its package"
        )
    make: Callable[..., Scorer] = next(iter(found)).load()
    return make


def _token_routing(settings: TokenSettings) -> TokenRouting:
    return TokenRouting.parse({"method": settings.scorer, **settings.settings})


def _tensors(fitted: Mapping[int, Fitted] | Fitted) -> dict[str, Tensor]:
    if isinstance(fitted, Mapping):
        states = {f"{place}.": each.state() for place, each in fitted.items()}
        return {f"{prefix}{name}": t for prefix, s in states.items() for name, t in s.items()}
    return dict(fitted.state())


def _check_sum(blend: Blend, names: Mapping[str, str]) -> None:
    try:
        blend.renamed(names)
    except BlendError as error:
        raise RouterError(
            f"the fixed router's weights add up beyond what a module may have: {error}"
        ) from error


def _blend(settings: FixedSettings) -> Blend:
    try:
        return Blend.parse(settings.blend)
    except BlendError as error:
        raise RouterError(f"the fixed router's blend cannot be read: {error}") from error


def _explained(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][2:])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _write(folder: Path, settings: BaseModel) -> None:
    document: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True)
    (folder / CONFIG_FILE).write_text(_json(document) + "\n", encoding="utf-8")


def _json(document: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(document, indent=2, ensure_ascii=False)


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return json_digest({path.name: file_digest(path) for path in files})
