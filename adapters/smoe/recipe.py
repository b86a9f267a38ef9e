"""MoeRecipe: a recipe whose `experts:` says how the experts of one sparse model are merged."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ..manifest import check_name
from ..recipe import DtypeName, ModuleDtype, Strict

Method = Literal["m-smoe", "hc-smoe", "average", "random", "shared", "reap"]

RouterForm = Literal["exact", "groups", "compact"]

_BY_USAGE = ("m-smoe", "hc-smoe", "average", "reap")


class ResidualSettings(Strict):
    """How what each expert has beside its centre is kept."""

    rank: int = Field(ge=1, description="components of each expert's matrices")
    dtype: ModuleDtype = Field("bfloat16", description="of the factors and rows")
    rows: float = Field(0.0, ge=0, le=1, description="share of rows kept whole, beside the rank")
    fit: Literal["weights", "outputs"] = Field(
        "weights",
        description="what of gate and up is kept closest: outputs looks at calibration prompts",
    )


class ExpertSettings(Strict):
    """How the experts of each sparse layer are merged."""

    method: Method = Field(description="how they are grouped, or pruned (reap)")
    keep: int | None = Field(
        None, ge=1, description="experts left in a layer; shared: 1, which is the default there"
    )
    allocation: Literal["fixed", "adaptive"] = Field(
        "fixed", description="as many in every layer, or on average, where usage needs them"
    )
    skip_layers: tuple[int, ...] = Field(
        (), description="sparse layers, counted from 0, that keep all experts"
    )
    align: Literal["dominant", "none"] | None = Field(
        None, description="put neurons into one order before merging; default: m-smoe does"
    )
    floor: float = Field(
        1e-3, gt=0, lt=1, description="what an expert weighs at least in a mean by usage"
    )
    router: RouterForm | None = Field(
        None,
        description="exact: as before, for experts; groups: for groups, by summed probabilities; "
        "compact: a row per group, fitted. Default: exact with residuals, else compact",
    )
    residuals: ResidualSettings | None = Field(
        None, description="keep what is exclusive to each expert beside its centre"
    )

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.method == "shared" and self.keep not in (None, 1):
            raise ValueError(
                f"method shared keeps one expert and keep is {self.keep}: use m-smoe, hc-smoe, "
                "average or random for several"
            )
        if self.method != "shared" and self.keep is None:
            raise ValueError(f"method {self.method} needs keep, the experts left in a layer")
        self._check_pruning()
        if self.residuals is not None and self.form != "exact":
            raise ValueError("residuals are chosen by the experts' own router: use router: exact")
        if self.form == "compact":
            self._check_compact()
        if self.allocation == "adaptive" and self.method in ("shared", "random"):
            raise ValueError(f"allocation adaptive means nothing to method {self.method}")
        return self

    def _check_pruning(self) -> None:
        if self.method != "reap":
            return
        for key in ("residuals", "align"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} means nothing to method reap, which merges no experts")
        if self.form != "compact":
            raise ValueError("method reap leaves experts out: only router: compact goes with it")

    def _check_compact(self) -> None:
        """A plain checkpoint has as many experts in every layer."""
        uneven = {
            "allocation: adaptive": self.allocation == "adaptive",
            "skip_layers": bool(self.skip_layers),
        }
        if stated := [key for key, is_stated in uneven.items() if is_stated]:
            remedy = "remove it" if self.method == "reap" else "remove it, or use router: exact"
            raise ValueError(
                f"{stated[0]} leaves more experts in one layer than in another, which no plain "
                f"checkpoint has: {remedy}"
            )

    @property
    def count(self) -> int:
        """Experts left in a layer."""
        return self.keep or 1

    @property
    def form(self) -> RouterForm:
        """What becomes of the router."""
        return self.router or ("exact" if self.residuals else "compact")

    @property
    def is_aligned(self) -> bool:
        """Whether neurons are put into one order."""
        return (self.align or ("dominant" if self.method == "m-smoe" else "none")) == "dominant"

    @property
    def weighs_by_usage(self) -> bool:
        """Whether the mean of a group weighs its experts by how often they were selected."""
        return self.method in ("m-smoe", "hc-smoe")

    @property
    def fits_outputs(self) -> bool:
        """Whether residuals are fitted to what the experts read."""
        return self.residuals is not None and self.residuals.fit == "outputs"

    @property
    def needs(self) -> str | None:
        """What of it looks at calibration prompts; None: nothing does."""
        if self.method in _BY_USAGE:
            return f"method {self.method}"
        if self.fits_outputs:
            return "residuals: {fit: outputs}"
        return "router: compact" if self.form == "compact" and self.method != "shared" else None


class MoeRecipe(Strict):
    """What a bank is built from whose backbone is a sparse model with fewer experts."""

    name: Annotated[str, AfterValidator(check_name)] = Field("bank", description="the bank's name")
    base: str = Field(min_length=1, description="the sparse mixture of experts: folder or hub id")
    experts: ExpertSettings = Field(description="how its experts are merged")
    calibration: str | None = Field(None, description="JSON lines of prompts to look at")
    seed: int = Field(0, ge=0, description="of everything random")
    dtype: DtypeName | None = Field(None, description="of the backbone; default: the base's")

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.experts.needs and self.calibration is None:
            raise ValueError(
                f"{self.experts.needs} looks at how prompts are routed: give calibration, a JSON "
                "lines file of prompts"
            )
        return self
