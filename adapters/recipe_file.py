"""Recipe files: YAML of ours or of mergekit in, a checked recipe out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .backbone import HUB_ID
from .errors import RecipeError
from .mergekit import from_mergekit
from .recipe import Recipe
from .smoe.recipe import MoeRecipe
from .unique_yaml import load_yaml

_UNKNOWN = ("extra_forbidden", "invalid_key")


def read_recipe(path: str | Path) -> Recipe:
    """A recipe that merges models; see `read_any_recipe`.

    Raises:
        RecipeError: it cannot be read, or merges the experts of one sparse model.
    """
    recipe = read_any_recipe(path)
    if isinstance(recipe, MoeRecipe):
        raise RecipeError(
            f"{path}: experts is a mapping, which merges the experts of one sparse model: list "
            "models, {name: ..., path: ...}"
        )
    return recipe


def read_any_recipe(path: str | Path) -> Recipe | MoeRecipe:
    """A recipe, ours or mergekit's. Relative paths are relative to the file. One whose `experts` is
    a mapping merges the experts of one sparse model.

    Raises:
        RecipeError: it is no YAML, or a key is unknown, missing or out of range.
    """
    file = Path(path).expanduser()
    document = _read_yaml(file)
    if not isinstance(document, dict):
        raise RecipeError(f"{file} is no mapping of keys: see docs/build.md for a recipe")
    if "merge_method" in document:
        document = from_mergekit(document, source=str(file))
    kind = MoeRecipe if isinstance(document.get("experts"), dict) else Recipe
    try:
        recipe = kind.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{file}: {_explained(error, kind)}") from error
    except RecipeError as error:
        raise RecipeError(f"{file}: backbone: {error}") from error
    if isinstance(recipe, MoeRecipe):
        return _resolved_moe(recipe, file.parent)
    return resolved(recipe, file.parent)


def _read_yaml(file: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    if not file.is_file():
        what = "is a folder: name the recipe in it" if file.is_dir() else "does not exist"
        raise RecipeError(f"{file} {what}")
    try:
        return load_yaml(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        remedy = " (tabs cannot indent YAML: use spaces)" if "'\\t'" in str(error) else ""
        raise RecipeError(f"{file} cannot be read as YAML: {error}{remedy}") from error


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its relative paths made absolute; hub ids stay."""

    source, data = partial(_source, folder), partial(_data, folder)
    router = recipe.router
    if router is not None:
        said = router.signal
        if said.embedding is not None:
            said = said.model_copy(update={"embedding": source(said.embedding)})
        files = {"data": data(router.data), "none": data(router.none)}
        router = router.model_copy(update={**files, "signal": said})
    experts = tuple(e.model_copy(update={"path": source(e.path)}) for e in recipe.experts)
    return recipe.model_copy(
        update={
            "base": source(recipe.base),
            "experts": experts,
            "router": router,
            "calibration": data(recipe.calibration),
        }
    )


def _resolved_moe(recipe: MoeRecipe, folder: Path) -> MoeRecipe:
    paths = {"base": _source(folder, recipe.base), "calibration": _data(folder, recipe.calibration)}
    return recipe.model_copy(update=paths)


def _source(folder: Path, text: str) -> str:
    path = folder / Path(text).expanduser()
    is_hub_id = HUB_ID.fullmatch(text) is not None and not text.startswith((".", "~", "/"))
    return text if is_hub_id and not path.exists() else str(path.resolve())


def _data(folder: Path, text: str | None) -> str | None:
    return None if text is None else str((folder / Path(text).expanduser()).resolve())


def _explained(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first complaint, with its key and what is allowed there; a key that is unknown says more
    than the one that is missing for it.
    """
    found = error.errors()
    first = next((e for e in found if e["type"] in _UNKNOWN), found[0])
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in _UNKNOWN:
        return f"{key} is unknown; {_allowed(first['loc'][:-1], kind)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"].startswith("model_") or first["type"] == "dict_type":
        return f"{key} is {first['input']!r}, keys are needed; {_allowed(first['loc'], kind)}"
    if first["type"] == "too_short":
        return f"{key} is empty: list at least one, {{name: ..., path: ...}}"
    return f"{key}: {message}" + (f" (it is {first['input']!r})" if _is_plain(first) else "")


def _is_plain(detail: Mapping[str, Any]) -> bool:
    return isinstance(detail["input"], str | int | float | bool)


def _allowed(location: Sequence[int | str], kind: type[BaseModel]) -> str:
    """The keys that may stand at a place of the recipe."""
    model: Any = kind
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
