"""Recipe: the YAML file a bank is built from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import RecipeError
from .manifest import check_name
from .merging.methods import find_method, validated_parameters

DtypeName = Literal["float32", "bfloat16", "float16"]
ModuleDtype = Literal["float32", "bfloat16", "float16", "int8"]

DEFAULT_RANK = 16
DEFAULT_DENSITY = 0.2
FULL_RANK_METHODS = ("magnitude", "compeft", "bitdelta", "tall", "emr")
"""Compressors whose result has full rank: it is converted to low rank before it is served."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B)?\s*", re.IGNORECASE)


def parse_size(text: object) -> int:
    """Bytes from `2MB`, `500 kB` or a number.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or (size := int(float(match[1]) * _UNITS[(match[2] or "").upper()])) < 1:
        raise ValueError(f"{text!r} is no size: write 2MB, 500KB or a number of bytes")
    return size


_STANDS_ON = {"emr": ("emr",), "tall": ("task_arithmetic",)}


class Strict(BaseModel):
    """A section of a recipe: no unknown keys, no truth values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: object) -> object:
        """Pydantic would take true for the number 1, and YAML reads yes and on as true."""
        if isinstance(value, bool):
            raise ValueError("true or false (in YAML also yes, no, on, off) means nothing here")
        return value


class ExpertEntry(Strict):
    """A model to merge."""

    name: Annotated[str, AfterValidator(check_name)] = Field(description="its module's name")
    path: str = Field(min_length=1, description="full checkpoint or PEFT LoRA: folder or hub id")
    weight: float = Field(1.0, allow_inf_nan=False, description="its weight in the merge")
    description: str = Field("", description="what it is for, one sentence")
    samples: tuple[str, ...] = Field((), description="prompts it is for")


class Lines(Strict):
    """LiNeS: the merged change is scaled by alpha + beta * depth."""

    alpha: float | None = Field(
        None, allow_inf_nan=False, description="at depth 0; default: by the norms of the deltas"
    )
    beta: float = Field(allow_inf_nan=False, description="how much more at the last block")


class BackboneSettings(BaseModel):
    """How the experts are merged. The method's own parameters stand beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = Field("task_arithmetic", description="a merge method, or none to keep the base")
    lines: Lines | None = Field(None, description="scale the change by depth")

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        validated_parameters(self.method, self.model_extra or {})
        if self.method == "none" and self.lines is not None:
            raise ValueError("lines scales a merged change and method none has none: remove it")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's parameters, defaults filled in."""
        return validated_parameters(self.method, self.model_extra or {})


class ModuleSettings(Strict):
    """How what is exclusive to each expert is kept."""

    method: Literal[
        "svd", "lora", "lego", "magnitude", "compeft", "bitdelta", "tall", "emr", "none"
    ] = Field("svd", description="how it is compressed; lora keeps a LoRA's own factors")
    rank: int | None = Field(None, ge=1, description="components of every layer")
    energy: float | None = Field(None, gt=0, le=1, description="share of the energy to keep")
    bytes: Annotated[int, BeforeValidator(parse_size)] | None = Field(
        None, description="most bytes of a module"
    )
    allocation: Literal["fixed", "energy"] = Field(
        "fixed", description="how a byte budget is spent: one rank, or where most energy is"
    )
    fit: Literal["weights", "outputs"] = Field(
        "weights", description="what is kept closest; outputs looks at the calibration prompts"
    )
    scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of what is kept; above 1 against truncation"
    )
    dtype: ModuleDtype = Field("bfloat16", description="of the factors")
    density: float | None = Field(
        None, gt=0, le=1, description="share kept by magnitude and compeft; default 0.2"
    )

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        stated = [n for n in ("rank", "energy", "bytes") if getattr(self, n) is not None]
        if len(stated) > 1:
            raise ValueError(f"{' and '.join(stated)} are both given: give one of them")
        if self.method in ("lora", "none") and stated:
            raise ValueError(f"{stated[0]} means nothing to method {self.method}: remove it")
        if self.method == "lego" and self.rank is None:
            raise ValueError("method lego needs rank, the number of clusters")
        if self.method in FULL_RANK_METHODS and not stated:
            raise ValueError(
                f"a {self.method} delta has full rank and cannot be served: give rank, energy or "
                "bytes to convert it to low rank (its error is reported)"
            )
        if self.allocation != "fixed" and self.bytes is None:
            raise ValueError(f"allocation {self.allocation} spends a budget: give bytes")
        if self.density is not None and self.method not in ("magnitude", "compeft"):
            raise ValueError(f"density means nothing to method {self.method}: remove it")
        if self.scale != 1 and self.method in ("lora", "none"):
            raise ValueError(f"scale means nothing to method {self.method}: remove it")
        if self.fit == "outputs" and self.method in ("lora", "lego", "none"):
            raise ValueError(f"fit outputs means nothing to method {self.method}: remove it")
        return self

    @property
    def is_converted(self) -> bool:
        """Whether a compressor's result of full rank is converted to low rank."""
        return self.method in FULL_RANK_METHODS

    @property
    def compressor_parameters(self) -> dict[str, float]:
        """What the compressor takes."""
        if self.method not in ("magnitude", "compeft"):
            return {}
        return {"density": DEFAULT_DENSITY if self.density is None else self.density}

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every layer, unless energy or bytes decides it."""
        return self.rank or (DEFAULT_RANK if self.energy is None and self.bytes is None else None)


class KindSettings(Strict):
    """What is done with the parameters that are no linear layers' weights."""

    embedding: Literal["shared", "svd", "drop"] = "shared"
    head: Literal["shared", "svd", "drop"] = "shared"
    norm: Literal["shared", "exact", "drop"] = "shared"
    bias: Literal["shared", "exact", "drop"] = "shared"


class SignalSection(Strict):
    """What of the prompt the router reads; everything that is named stands side by side."""

    layer: int | tuple[int, ...] | None = Field(
        None,
        description="after which of the backbone's layers, counted from 1; []: reads none; "
        "absent: a twelfth of them",
    )
    pooling: Literal["mean", "last", "both"] = Field("last", description="over the prompt's tokens")
    window: int = Field(128, ge=2, description="most tokens of a prompt that are read")
    ngrams: int = Field(384, ge=0, le=65536, description="size of the n-gram vector; 0: none")
    embedding: str | None = Field(None, description="sentence-transformers model (extra: text)")
    recency: float | None = Field(
        None, gt=0, lt=1, description="reads all turns, each weighing so much of the one after it"
    )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer or ()

    @model_validator(mode="after")
    def _reads_something(self) -> Self:
        if low := [layer for layer in self.layers if layer < 1]:
            raise ValueError(f"layer is {low[0]}: layers are counted from 1")
        if self.layer == () and not (self.ngrams or self.embedding):
            raise ValueError("the signal reads nothing: give layer, ngrams or embedding")
        return self


FITTED_SCORERS = ("prototype", "mlp", "retriever")
TOKEN_SCORERS = ("arrow", "spectr", "phatgoose")


class RouterSection(Strict):
    """The router that is fitted with the bank."""

    scorer: Literal["prototype", "mlp", "retriever", "fixed", "arrow", "spectr", "phatgoose"] = (
        Field("prototype", description="how it decides")
    )
    signal: SignalSection = Field(default_factory=SignalSection)
    policy: str = Field(
        "softmax | top_k(1) | abstain(0.002) | quantise", description="steps joined by |"
    )
    data: str | None = Field(None, description="JSON lines of prompts with their task")
    none: str | None = Field(
        None, description="JSON lines of prompts that no module serves, which it learns to leave"
    )
    blend: str | None = Field(None, description="scorer fixed: name=weight, joined by commas")
    settings: dict[str, Any] | None = Field(
        None, description="scorers arrow, spectr and phatgoose: top_k, temperature, none and more"
    )

    @property
    def is_fitted(self) -> bool:
        """Whether it is fitted on prompts."""
        return self.scorer in FITTED_SCORERS

    @model_validator(mode="after")
    def _check_scorer(self) -> Self:
        if self.is_fitted and self.data is None:
            raise ValueError(
                f"scorer {self.scorer} needs data: a JSON lines file of prompts and tasks"
            )
        if self.scorer == "fixed" and self.blend is None:
            raise ValueError("scorer fixed needs blend: name=weight, joined by commas")
        for key in sorted(self.model_fields_set & self._unused):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} means nothing to scorer {self.scorer}: remove it")
        return self

    @property
    def _unused(self) -> frozenset[str]:
        """The keys that the scorer does not look at."""
        fitted = {"signal", "policy", "data", "none"}
        if self.is_fitted:
            return frozenset({"blend", "settings"})
        return frozenset(fitted | ({"settings"} if self.scorer == "fixed" else {"blend"}))

    @model_serializer(mode="wrap")
    def _used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without defaults that the scorer does not look at: what is written can be read again."""
        return {key: value for key, value in serialise(self).items() if key not in self._unused}


class Recipe(Strict):
    """What a bank is built from. Paths are absolute, or hub ids."""

    name: Annotated[str, AfterValidator(check_name)] = Field("bank", description="the bank's name")
    base: str = Field(min_length=1, description="the common ancestor: folder or hub id")
    experts: tuple[ExpertEntry, ...] = Field(min_length=1, description="what is merged")
    backbone: BackboneSettings = Field(
        default_factory=lambda: BackboneSettings.model_validate(
            {"method": "task_arithmetic", "scale": 0.3}
        ),
        description="how they are merged",
    )
    shared: Literal["folded", "module", "none"] = Field(
        "folded", description="where the merged change goes"
    )
    modules: ModuleSettings = Field(default_factory=lambda: ModuleSettings())
    kinds: KindSettings = Field(default_factory=KindSettings)
    router: RouterSection | None = Field(None, description="the router; absent: none")
    calibration: str | None = Field(
        None, description="JSON lines of prompts with their task, for methods that look at data"
    )
    seed: int = Field(0, ge=0, description="of everything random")
    dtype: DtypeName | None = Field(None, description="of the backbone; default: the base's")

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        self._check_names()
        self._check_weights()
        self._check_modules()
        _check_parameters(self.backbone, [expert.name for expert in self.experts])
        if self.shared == "none" and self.backbone.method != "none":
            raise ValueError("shared none keeps the base: set backbone: {method: none} too")
        needs = find_method(self.backbone.method).needs
        if (needs or self.modules.fit == "outputs") and self.calibration is None:
            raise ValueError(
                f"{self.backbone.method if needs else 'modules: {fit: outputs}'} looks at data: "
                "give calibration, a JSON lines file of prompts with their task"
            )
        lines = self.backbone.lines
        if needs == "sequential" and (self.shared == "module" or (lines and lines.alpha is None)):
            raise ValueError(
                f"{self.backbone.method} runs through what is merged already, once and in order: "
                "use shared: folded, and state alpha of lines, or use regmean"
            )
        return self

    def _check_names(self) -> None:
        names = [expert.name for expert in self.experts]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two experts are called {min(twice)!r}: give each a name of its own")
        if self.name in names and self.modules.method != "none":
            raise ValueError(
                f"the bank and an expert are both called {self.name!r}: requests could not tell "
                "them apart, set another name"
            )

    def _check_weights(self) -> None:
        weights = [expert.weight for expert in self.experts]
        if self.backbone.parameters.get("scale") == 0:
            raise ValueError(
                "backbone.scale is 0: nothing would be merged, say so by backbone: {method: none}"
            )
        if not any(weights):
            raise ValueError("the weights of all experts are 0: nothing would be merged")
        if find_method(self.backbone.method).needs and min(weights) < 0:
            raise ValueError(
                f"expert {self.experts[weights.index(min(weights))].name!r} has weight "
                f"{min(weights):g}, {self.backbone.method} takes none below 0"
            )
        is_mean = self.backbone.method in ("linear", "average")
        if is_mean and self.backbone.parameters["normalize"] and not sum(weights):
            raise ValueError(
                "the weights add up to 0, of which there is no mean: change them, or set "
                "normalize: false for the sum"
            )

    @property
    def _is_plain_sum(self) -> bool:
        is_scaled = self.backbone.parameters.get("scale", 1) != 1 or self.backbone.lines is not None
        return not is_scaled and all(expert.weight == 1 for expert in self.experts)

    def _check_modules(self) -> None:
        """The modules stand on what the backbone gives them."""
        method, backbone = self.modules.method, self.backbone.method
        if method in _STANDS_ON and (backbone not in _STANDS_ON[method] or self.shared == "module"):
            raise ValueError(
                f"modules: {{method: {method}}} masks a merged change: set backbone: "
                f"{{method: {_STANDS_ON[method][0]}}} and shared: folded"
            )
        if method == "tall" and not self._is_plain_sum:
            raise ValueError(
                "modules: {method: tall} masks the plain sum of the changes: leave out scale and "
                "lines of the backbone, and the experts' weights"
            )
        if method == "lora" and backbone != "none":
            raise ValueError(
                "modules: {method: lora} keeps factors that stand on the base: set backbone: "
                "{method: none}, or use method svd"
            )


def _check_parameters(backbone: BackboneSettings, experts: Sequence[str]) -> None:
    """What a method's parameters must be together, or beside the experts.

    Raises:
        RecipeError: they do not fit.
    """
    method, stated = backbone.method, backbone.parameters
    if method == "mwa" and len(stated["losses"]) != len(experts):
        raise RecipeError(
            f"mwa: {len(stated['losses'])} losses for {len(experts)} experts: give one for each, "
            "in their order"
        )
    if method == "layer_swap":
        for key in ("outer", "inner"):
            if stated[key] not in experts:
                raise RecipeError(
                    f"layer_swap: {stated[key]!r} is no expert, {key} is one of "
                    f"{', '.join(experts)}"
                )
    if method in ("della", "della_linear") and stated["density"] < 1:
        low, high = (stated["density"] + sign * stated["epsilon"] for sign in (-1, 1))
        if low <= 0 or high > 1:
            raise RecipeError(
                f"{method}: density {stated['density']:g} with epsilon {stated['epsilon']:g} keeps "
                f"entries with probabilities from {low:g} to {high:g}, they must lie in (0, 1]: "
                "choose a smaller epsilon"
            )
