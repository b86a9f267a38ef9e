"""Recipe files: YAML of ours or of mergekit in, a checked recipe out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import RecipeError
from .mergekit import from_mergekit
from .recipe import Recipe

_UNKNOWN = ("extra_forbidden", "invalid_key")


def read_recipe(path: str | Path) -> Recipe:
    """A recipe, ours or mergekit's. Relative paths are relative to the file.

    Raises:
        RecipeError: it is no YAML, or a key is unknown, missing or out of range.
    """
    file = Path(path).expanduser()
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{file} is no mapping of keys: see docs/build.md for a recipe")
    if "merge_method" in document:
        document = from_mergekit(document, source=str(file))
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{file}: {_explained(error)}") from error
    except RecipeError as error:
        raise RecipeError(f"{file}: backbone: {error}") from error
    return resolved(recipe, file.parent)


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its relative paths made absolute; hub ids stay."""

    def source(text: str) -> str:
        path = folder / Path(text).expanduser()
        return str(path.resolve()) if path.exists() or text.startswith((".", "~", "/")) else text

    def data(text: str | None) -> str | None:
        return None if text is None else str((folder / Path(text).expanduser()).resolve())

    router = recipe.router
    if router is not None:
        router = router.model_copy(update={"data": data(router.data), "none": data(router.none)})
    experts = tuple(e.model_copy(update={"path": source(e.path)}) for e in recipe.experts)
    return recipe.model_copy(
        update={
            "base": source(recipe.base),
            "experts": experts,
            "router": router,
            "calibration": data(recipe.calibration),
        }
    )


def _explained(error: ValidationError) -> str:
    """The first complaint, with its key and what is allowed there; a key that is unknown says more
    than the one that is missing for it.
    """
    found = error.errors()
    first = next((e for e in found if e["type"] in _UNKNOWN), found[0])
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in _UNKNOWN:
        return f"{key} is unknown; {_allowed(first['loc'][:-1])}"
    if first["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {message}" + (f" (it is {first['input']!r})" if _is_plain(first) else "")


def _is_plain(detail: Mapping[str, Any]) -> bool:
    return isinstance(detail["input"], str | int | float | bool)


def _allowed(location: Sequence[int | str]) -> str:
    """The keys that may stand at a place of the recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _model_in(model.model_fields[part].annotation)
    keys = ", ".join(getattr(model, "model_fields", {}))
    return f"allowed there: {keys}"


def _model_in(annotation: Any) -> Any:  # noqa: ANN401 - a type expression
    """The pydantic model in a type such as tuple[Model, ...] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if (found := _model_in(part)) is not None:
            return found
    return None
