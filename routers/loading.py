"""Loading routers: from settings and tensors on disk to signals and scorers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapters.digest import file_digest, json_digest
from ..adapters.errors import RouterError
from .base import Encode, Scorer, Signal
from .chance import Chance
from .ensemble import Ensemble
from .fixed import Fixed
from .learned import Learned
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
    LearnedSettings,
    MemberSettings,
    PluginSettings,
    RouterSettings,
    RulesSettings,
    SignalSettings,
    TokenSettings,
)
from .signals import CACHED_PROMPTS, Cached, HiddenState, Joined, Recency
from .store import TENSORS_FILE, fixed_blend, read_settings
from .token_routing import TokenRouting

PLUGINS = "mergeroute.routers"
"""Entry points: each a function of (settings, modules, signal) that gives a `Scorer`."""


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
        return Fixed(fixed_blend(settings))

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


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return json_digest({path.name: file_digest(path) for path in files})
