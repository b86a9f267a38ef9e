"""mergekit's YAML files, for the methods that both have, as recipes of a static bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import RecipeError

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

_METHODS: dict[str, tuple[str, Mapping[str, str]]] = {
    "linear": ("linear", {"normalize": "normalize"}),
    "task_arithmetic": ("task_arithmetic", {"lambda": "scale"}),
    "ties": ("ties", {"density": "density", "normalize": "normalize", "lambda": "scale"}),
    "dare_linear": ("dare_linear", {"density": "density", "lambda": "scale"}),
    "dare_ties": ("dare_ties", {"density": "density", "normalize": "normalize", "lambda": "scale"}),
    "della": (
        "della",
        {"density": "density", "epsilon": "epsilon", "normalize": "normalize", "lambda": "scale"},
    ),
    "della_linear": (
        "della_linear",
        {"density": "density", "epsilon": "epsilon", "lambda": "scale"},
    ),
    "breadcrumbs": ("breadcrumbs", {"density": "density", "gamma": "gamma", "lambda": "scale"}),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        {"density": "density", "gamma": "gamma", "normalize": "normalize", "lambda": "scale"},
    ),
    "sce": ("sce", {"select_topk": "select_topk"}),
}
"""merge_method: our method, and its parameters by mergekit's names."""


def from_mergekit(document: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A mergekit configuration as a recipe's document: the merge alone, no modules.

    Raises:
        RecipeError: it uses a method, key or parameter form that has no counterpart here.
    """
    fail = _failure(source)
    unknown = document.keys() - _KEYS
    if unknown:
        raise fail(
            f"{min(unknown)!r} of mergekit has no counterpart here: write the merge of whole "
            f"models with {', '.join(sorted(_KEYS))}"
        )
    method = document["merge_method"]
    if method not in _METHODS:
        raise fail(f"merge_method {method!r} is not read; known are {', '.join(_METHODS)}")
    base = document.get("base_model")
    if not isinstance(base, str):
        raise fail("base_model is missing: name the common ancestor, by which deltas are taken")
    if document.get("tokenizer_source") not in (None, "base", base):
        raise fail("tokenizer_source must be base: vocabularies are not merged here")
    models = [model for model in _models(document, fail) if model["model"] != base]
    own, names = _METHODS[method]
    stated = _shared_parameters(models, document.get("parameters") or {}, names, fail)
    return {
        "name": str(document.get("name", Path(source).stem)),
        "base": base,
        "experts": _experts(models, document.get("parameters") or {}, fail),
        "backbone": {"method": own, **stated},
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
            raise fail(f"{min(extra)!r} of model {model['model']!r} is not read")
    return models


def _experts(
    models: list[Mapping[str, Any]], common: Mapping[str, Any], fail: Failure
) -> list[dict[str, Any]]:
    experts = []
    for index, model in enumerate(models):
        weight = (model.get("parameters") or {}).get("weight", common.get("weight", 1.0))
        _check_number("weight", weight, fail)
        name = Path(model["model"]).name or f"expert{index}"
        taken = {expert["name"] for expert in experts}
        experts.append(
            {
                "name": name if name not in taken else f"{name}-{index}",
                "path": model["model"],
                "weight": weight,
            }
        )
    return experts


def _shared_parameters(
    models: list[Mapping[str, Any]],
    common: Mapping[str, Any],
    names: Mapping[str, str],
    fail: Failure,
) -> dict[str, Any]:
    """The method's parameters; one that models state on their own must be the same in all."""
    stated: dict[str, Any] = {}
    known = {*names, "weight", *_IGNORED_PARAMETERS}
    for parameters in (common, *(model.get("parameters") or {} for model in models)):
        if unknown := parameters.keys() - known:
            raise fail(
                f"parameter {min(unknown)!r} is not read; known are {', '.join(sorted(known))}"
            )
        for key in parameters.keys() & names.keys():
            value = parameters[key]
            if not isinstance(value, bool):
                _check_number(key, value, fail)
            if stated.setdefault(names[key], value) != value:
                raise fail(f"{key} differs between models: state one value for all")
    return stated


def _check_number(key: str, value: object, fail: Failure) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(f"{key} is {value!r}: give one number (gradients and filters are not read)")
