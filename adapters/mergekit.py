"""mergekit's YAML files, for the methods that both have, as recipes of a static bank."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .manifest import RESERVED_NAMES

_KEYS = {
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "name",
}
_IGNORED_PARAMETERS = {"int8_mask"}
"""Trades memory for nothing that shows in the result."""

_TASK = {"density": "density", "normalize": "normalize", "lambda": "scale"}
_SUM = {"density": "density", "lambda": "scale"}

_METHODS: dict[str, tuple[Mapping[str, str], Mapping[str, Any]]] = {
    "linear": ({"normalize": "normalize"}, {}),
    "task_arithmetic": ({"lambda": "scale"}, {}),
    "ties": (_TASK, {"density": 1.0}),
    "dare_linear": (_SUM, {"density": 1.0}),
    "dare_ties": (_TASK, {"density": 1.0, "normalize": False}),
    "della": ({**_TASK, "epsilon": "epsilon"}, {"density": 1.0}),
    "della_linear": ({**_SUM, "epsilon": "epsilon"}, {"density": 1.0}),
    "breadcrumbs": ({**_SUM, "gamma": "gamma"}, {"density": 1.0}),
    "breadcrumbs_ties": ({**_TASK, "gamma": "gamma"}, {"density": 1.0, "normalize": False}),
    "sce": ({"select_topk": "select_topk"}, {}),
}
"""merge_method, ours and theirs: our parameters by mergekit's names, and its defaults where ours
differ."""


def from_mergekit(document: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A mergekit configuration as a recipe's document: the merge alone, no modules.

    Raises:
        RecipeError: it uses a method, key or parameter form that has no counterpart here.
    """
    fail = _failure(source)
    unknown = document.keys() - _KEYS
    if unknown:
        raise fail(
            f"{min(map(str, unknown))!r} of mergekit has no counterpart here: write a merge of "
            f"whole models with {', '.join(sorted(_KEYS))}"
        )
    method = document["merge_method"]
    if not isinstance(method, str) or method not in _METHODS:
        raise fail(f"merge_method {method!r} is not read; known are {', '.join(_METHODS)}")
    base = document.get("base_model")
    if not isinstance(base, str):
        raise fail("base_model is missing: name the common ancestor, by which deltas are taken")
    if document.get("tokenizer_source") not in (None, "base", base):
        raise fail("tokenizer_source must be base: vocabularies are not merged here")
    models = _models(document, fail)
    common = _mapping("parameters", document.get("parameters"), fail)
    names, defaults = _METHODS[method]
    stated = {**defaults, **_shared_parameters(models, common, names, fail)}
    weights = [_weight(model, common, fail) for model in models]
    if method == "sce":
        weights = [1.0] * len(models)  # mergekit does not read them there
    if method == "linear":
        weights = _shares(weights, stated, fail)
    return {
        "name": _as_name(str(document.get("name", Path(source).stem)), "bank"),
        "base": base,
        "experts": _experts(models, weights, base, fail),
        "backbone": {"method": method, **stated},
        "modules": {"method": "none"},
        "dtype": document.get("out_dtype") or document.get("dtype"),
    }


Failure = Callable[[str], RecipeError]


def _failure(source: str) -> Failure:
    return lambda text: RecipeError(f"{source} (a mergekit file): {text}")


def _models(document: Mapping[str, Any], fail: Failure) -> list[Mapping[str, Any]]:
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise fail("models is missing: list the models to merge (slices are not read)")
    for model in models:
        if not isinstance(model, dict) or not isinstance(model.get("model"), str):
            raise fail(f"models holds {model!r}: each needs model: a path or hub id")
        if extra := model.keys() - {"model", "parameters"}:
            raise fail(f"{min(map(str, extra))!r} of model {model['model']!r} is not read")
    return [{**m, "parameters": _mapping("parameters", m.get("parameters"), fail)} for m in models]


def _mapping(key: str, value: object, fail: Failure) -> Mapping[str, Any]:
    if not isinstance(value, dict | None):
        raise fail(f"{key} is {value!r}: give keys with values")
    return value or {}


def _weight(model: Mapping[str, Any], common: Mapping[str, Any], fail: Failure) -> float:
    weight = model["parameters"].get("weight", common.get("weight", 1.0))
    _check_number("weight", weight, fail)
    return float(weight)


def _shares(weights: Sequence[float], stated: dict[str, Any], fail: Failure) -> list[float]:
    """Weights of whole models as weights of their changes, where the base counts as a model too."""
    total = sum(weights)
    is_mean = stated.pop("normalize", True)
    if not total or (not is_mean and abs(total - 1) > 1e-6):
        raise fail(
            f"the weights add up to {total:g}, so the merge is no mean of models but a multiple of "
            "one: make them add up to 1"
        )
    stated["normalize"] = False
    return [weight / total for weight in weights]


def _experts(
    models: Sequence[Mapping[str, Any]], weights: Sequence[float], base: str, fail: Failure
) -> list[dict[str, Any]]:
    """The models but the base, whose change is zero."""
    found: dict[str, dict[str, Any]] = {}
    for index, (model, weight) in enumerate(zip(models, weights, strict=True)):
        if model["model"] != base:
            name = _as_name(Path(model["model"]).name, f"expert{index}")
            name = f"{name[:59]}-{index}" if name in found else name
            found[name] = {"name": name, "path": model["model"], "weight": weight}
    if not found:
        raise fail("models holds the base alone: list the models to merge")
    return list(found.values())


def _as_name(text: str, otherwise: str) -> str:
    """A name that requests can use."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:64]
    return otherwise if not name or name in RESERVED_NAMES else name


def _shared_parameters(
    models: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    names: Mapping[str, str],
    fail: Failure,
) -> dict[str, Any]:
    """The method's parameters; one that models state on their own must be the same in all."""
    stated: dict[str, Any] = {}
    known = {*names, "weight", *_IGNORED_PARAMETERS}
    for parameters in (common, *(model["parameters"] for model in models)):
        if unknown := parameters.keys() - known:
            raise fail(
                f"parameter {min(map(str, unknown))!r} is not read; known are "
                f"{', '.join(sorted(known))}"
            )
        for key in parameters.keys() & names.keys():
            value = parameters[key]
            if key != "normalize":
                _check_number(key, value, fail)
            if stated.setdefault(names[key], value) != value:
                raise fail(f"{key} differs between models: state one value for all")
    return stated


def _check_number(key: str, value: object, fail: Failure) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(f"{key} is {value!r}: give one number (gradients and filters are not read)")
