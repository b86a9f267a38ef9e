"""router.json: what a router is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..adapters.manifest import check_name

DEFAULT_WINDOW = 128
DEFAULT_POLICY = "softmax | top_k(1) | abstain(0.002) | quantise"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SignalSettings(_Strict):
    """What of a prompt is read; everything that is named stands side by side."""

    layer: int | tuple[int, ...] | None = Field(
        None,
        description="after which of the backbone's layers, counted from 1; []: reads none; "
        "absent when a router is fitted: a twelfth of them",
    )
    pooling: Literal["mean", "last", "both"] = Field(
        "last", description="of hidden states, over the prompt's tokens"
    )
    window: int = Field(
        DEFAULT_WINDOW,
        ge=2,
        description="most tokens of a prompt: the beginning and the end, half each",
    )
    ngrams: int = Field(384, ge=0, le=65536, description="size of the n-gram vector; 0: none")
    embedding: str | None = Field(
        None, description="sentence-transformers model, a folder or hub id (extra: text)"
    )
    recency: float | None = Field(
        None, gt=0, lt=1, description="reads all turns, each weighing so much of the one after it"
    )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer or ()

    def settled(self, layers: int) -> SignalSettings:
        """With the layer stated: by default a twelfth of the backbone's, so that routing costs
        little beside the first token; more layers tell other prompts apart better.

        layers: how many the backbone has.
        """
        if self.layer is not None:
            return self
        return self.model_copy(update={"layer": max(1, layers // 12)})

    @model_validator(mode="after")
    def _reads_something(self) -> Self:
        if self.layer == () and not (self.ngrams or self.embedding):
            raise ValueError("the signal reads nothing: give layer, ngrams or embedding")
        if any(layer < 1 for layer in self.layers):
            raise ValueError(f"layer is {self.layer}: layers are counted from 1")
        return self


class _Common(_Strict):
    """What every router may say.

    What the file was fitted on is checked when it is loaded: hidden states of another backbone mean
    something else.
    """

    renamed: dict[str, str] | None = Field(
        None, description="where modules have gone since, by the name the scorer knows"
    )
    backbone: str | None = Field(None, description="digest of the backbone it was fitted on")

    @property
    def known(self) -> tuple[str, ...]:
        """The modules as the scorer knows them."""
        return ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        known, renamed = self.known, self.renamed or {}
        for name in (*known, *renamed.values()):
            check_name(name)
        if twice := {name for name in known if known.count(name) > 1}:
            raise ValueError(f"the module {min(twice)!r} is named twice: name it once")
        if unknown := renamed.keys() - set(known):
            raise ValueError(f"renamed speaks of {min(unknown)!r}, which is none of modules")
        return self


class _Modules(_Common):
    modules: tuple[str, ...] = Field(min_length=1, description="in the order of the tensors")

    @property
    def known(self) -> tuple[str, ...]:
        """The modules."""
        return self.modules


class LearnedSettings(_Modules):
    """A fitted router: its tensors lie beside the file."""

    scorer: Literal["prototype", "mlp", "retriever"] = "prototype"
    embedding: str | None = Field(
        None, description="digest of the signal's embedding model, as it was fitted on"
    )
    signal: SignalSettings = Field(default_factory=SignalSettings, description="what is read")
    policy: str = Field(DEFAULT_POLICY, description="steps joined by |")


class FixedSettings(_Common):
    """The same blend for every prompt."""

    scorer: Literal["fixed"] = "fixed"
    blend: str = Field(description="name=weight, joined by commas")

    @property
    def known(self) -> tuple[str, ...]:
        """The modules of the blend, as far as it can be read."""
        return tuple(part.split("=")[0].strip() for part in self.blend.split(",") if "=" in part)


class ChanceSettings(_Modules):
    """A module drawn evenly: a control."""

    scorer: Literal["chance"] = "chance"
    seed: int = Field(0, ge=0, description="of the draw")


class RuleSettings(_Strict):
    """One rule: every condition that it names must hold."""

    module: str | None = Field(None, description="what serves such prompts; absent: the backbone")
    keyword: str | tuple[str, ...] | None = Field(
        None, description="whole words, any of them, in any letter case"
    )
    regex: str | None = Field(None, max_length=1000, description="found in the text")
    metadata: dict[str, str | tuple[str, ...]] = Field(
        default_factory=dict, description="values by key of the request's metadata"
    )
    header: dict[str, str | tuple[str, ...]] = Field(
        default_factory=dict, description="values by name of the request's header"
    )


class RulesSettings(_Common):
    """First match wins; no match is left to the next member of an ensemble, or the backbone."""

    scorer: Literal["rules"] = "rules"
    rules: tuple[RuleSettings, ...] = Field(min_length=1, description="in order")

    @property
    def known(self) -> tuple[str, ...]:
        """The modules that rules name."""
        return tuple(dict.fromkeys(rule.module for rule in self.rules if rule.module))


class TokenSettings(_Common):
    """Layers choose for every token."""

    scorer: Literal["arrow", "spectr", "phatgoose"]
    settings: dict[str, Any] = Field(default_factory=dict, description="of the method")


class PluginSettings(_Modules):
    """A scorer of another package, by its entry point in the group mergeroute.routers."""

    scorer: Literal["plugin"] = "plugin"
    plugin: str = Field(description="name of the entry point")
    settings: dict[str, Any] = Field(default_factory=dict, description="the plugin's own")
    signal: SignalSettings = Field(default_factory=SignalSettings, description="what it may read")
    policy: str = Field(DEFAULT_POLICY, description="steps joined by |")


MemberSettings = Annotated[
    LearnedSettings | RulesSettings | FixedSettings | ChanceSettings | PluginSettings,
    Field(discriminator="scorer"),
]


class EnsembleSettings(_Common):
    """The first member with an opinion decides: rules, then what was learned."""

    scorer: Literal["ensemble"] = "ensemble"
    members: tuple[MemberSettings, ...] = Field(min_length=1, description="in order")
    policy: str = Field(DEFAULT_POLICY, description="steps joined by |")

    @property
    def known(self) -> tuple[str, ...]:
        """All that members know."""
        return tuple(dict.fromkeys(name for member in self.members for name in member.known))


RouterSettings = (
    LearnedSettings
    | FixedSettings
    | ChanceSettings
    | RulesSettings
    | EnsembleSettings
    | TokenSettings
    | PluginSettings
)
