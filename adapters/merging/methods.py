"""The merge methods by name, and their parameters as recipes state them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ..errors import RecipeError

Space = Literal["elementwise", "spectral", "none"]
Needs = Literal["moments", "sequential", "fishers"]
ENTRY_POINTS = "mergeroute.merge_methods"


@dataclass(frozen=True)
class Method:
    """A merge method.

    function: `elementwise` takes a Stack and gives the blocks of the merged delta; `spectral` takes
    LowRank deltas of a linear layer, and their weights, and gives a LowRank; what is no linear
    layer's weight is then averaged.
    factored: the same merge of LoRA deltas in factors, for an elementwise method that is linear.
    dense: the same merge of dense deltas [o, i], for a spectral method that gains nothing from
    factors.
    needs: what it must know of the experts' behaviour on calibration prompts.
    """

    space: Space
    function: Callable[..., Any]
    _: KW_ONLY
    factored: Callable[..., Any] | None = None
    dense: Callable[..., Any] | None = None
    needs: Needs | None = None


_GIVEN = ("weights", "seed", "grams", "diagonals")
"""What a build gives to a method; the other keyword parameters are the recipe's."""

_REGMEAN = ("calibrated.regmean", "calibrated.regmean_dense")

_METHODS: dict[str, tuple[Space, str, str | None, Needs | None]] = {
    "none": ("none", "linear.keep_base", None, None),
    "linear": ("elementwise", "elementwise.linear", "linear.linear_factors", None),
    "average": ("elementwise", "elementwise.linear", "linear.linear_factors", None),
    "task_arithmetic": (
        "elementwise",
        "elementwise.task_arithmetic",
        "linear.task_arithmetic_factors",
        None,
    ),
    "ties": ("elementwise", "elementwise.ties", None, None),
    "dare_linear": ("elementwise", "elementwise.dare_linear", None, None),
    "dare_ties": ("elementwise", "elementwise.dare_ties", None, None),
    "della": ("elementwise", "elementwise.della", None, None),
    "della_linear": ("elementwise", "elementwise.della_linear", None, None),
    "breadcrumbs": ("elementwise", "elementwise.breadcrumbs", None, None),
    "breadcrumbs_ties": ("elementwise", "elementwise.breadcrumbs_ties", None, None),
    "sce": ("elementwise", "elementwise.sce", None, None),
    "pcb": ("elementwise", "elementwise.pcb", None, None),
    "consensus": ("elementwise", "elementwise.consensus", None, None),
    "emr": ("elementwise", "elementwise.emr", None, None),
    "widen": ("elementwise", "elementwise.widen", None, None),
    "mwa": ("elementwise", "elementwise.mwa", None, None),
    "layer_swap": ("elementwise", "elementwise.layer_swap", None, None),
    "fisher": ("elementwise", "linear.fisher_merge", None, "fishers"),
    "regmean": ("spectral", "calibrated.regmean", "calibrated.regmean_dense", "moments"),
    "regmean_plus_plus": (
        "spectral",
        "calibrated.regmean",
        "calibrated.regmean_dense",
        "sequential",
    ),
    "tsv": ("spectral", "spectral.tsv", None, None),
    "iso_c": ("spectral", "spectral.iso_c", None, None),
    "knots": ("spectral", "subspaces.knots", None, None),
    "wudi": ("spectral", "spectral.wudi", None, None),
    "opcm": ("spectral", "subspaces.opcm", None, None),
    "lego": ("spectral", "linear.lego_merge", None, None),
}
"""name: space, function, its form in factors (elementwise) or dense (spectral), what it needs."""


def method_names() -> list[str]:
    """All methods, those of other packages included."""
    return [*_METHODS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))]


@cache
def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        RecipeError: there is none.
    """
    if name in _METHODS:
        space, function, other, needs = _METHODS[name]
        form = None if other is None else _load(other)
        is_dense = space == "spectral"
        return Method(
            space,
            _load(function),
            factored=None if is_dense else form,
            dense=form if is_dense else None,
            needs=needs,
        )
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        method = entry.load()
        if not isinstance(method, Method):
            raise RecipeError(f"the entry point {entry.value} of method {name!r} is no Method")
        return method
    close = get_close_matches(name, method_names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError(f"method {name!r} is unknown; {hint}known are {', '.join(method_names())}")


def validated_parameters(name: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """A method's parameters with its defaults filled in.

    Raises:
        RecipeError: the method or a parameter is unknown, or a value is out of range.
    """
    model = _parameter_model(name)
    for key, value in stated.items():
        if isinstance(value, bool) and key in model.model_fields and not _is_flag(model, key):
            raise RecipeError(f"method {name}: {key} is {value}, a number or a name is needed")
    try:
        return dict(model.model_validate(dict(stated)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(model.model_fields) or "none"
            raise RecipeError(
                f"{key} is no parameter of method {name}; its parameters: {allowed}"
            ) from error
        raise RecipeError(
            f"method {name}: {key}: {first['msg'].removeprefix('Value error, ')}"
            f" (it is {first['input']!r})"
        ) from error


@cache
def _parameter_model(name: str) -> type[BaseModel]:
    """The keyword-only parameters of a method's function, the weights left out."""
    signature = inspect.signature(find_method(name).function, eval_str=True)
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN
    }
    return create_model(
        f"{name}_parameters", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )


def _is_flag(model: type[BaseModel], key: str) -> bool:
    return model.model_fields[key].annotation is bool


def _load(reference: str) -> Callable[..., Any]:
    module, _, function = reference.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(f".{module}", __package__), function)
    return found
