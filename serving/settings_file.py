"""Reading serve.yaml, and saying what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..adapters.unique_yaml import load_yaml
from .errors import SettingsError, UsageError
from .settings import NO_STATE, ServeSettings
from .settings_engine import merged

_PATHS = {"banks": list, "modules": dict, "module_roots": list, "api_keys": str}
_ENGINE_PATHS = ("modules_folder", "logs")
_SHOWN = 60
_RULES = {
    "tuple_type": "it must be a list",
    "model_type": "it must be keys with values",
    "dict_type": "it must be keys with values",
}
"""Rules that pydantic tells in Python's words."""


def read_settings(path: Path | None, overrides: Mapping[str, object]) -> ServeSettings:
    """Settings of a file, if there is one, with the command line's on top.

    overrides: by field; None and what is empty says nothing.

    Raises:
        SettingsError: the file cannot be read, or what it says is not allowed.
        UsageError: what the command line says is not.
    """
    said = {key: value for key, value in overrides.items() if value not in (None, (), {})}
    stated = _read_file(path) if path else {}
    values = stated | said
    if "engine" in said:
        values["engine"] = merged(stated.get("engine"), said["engine"])
    if path and (untrue := _bare_truths(values, ServeSettings)):
        raise SettingsError("\n".join(f"{path}: {fault}" for fault in untrue))
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        faults = _faults(error.errors(), values)
        is_usage = path is None or any(key in said for key, _ in faults)
        where = "" if is_usage else f"{path}: "
        text = "\n".join(where + fault for _, fault in faults)
        raise (UsageError if is_usage else SettingsError)(text) from error


def _read_file(path: Path) -> dict[str, object]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: write 'banks: [path/to/bank]'")
    for key, kind in _PATHS.items():
        if isinstance(values.get(key), kind):
            values[key] = _beside(path, values[key])
    if isinstance(engine := values.get("engine"), dict):
        paths = {key: _beside(path, engine[key]) for key in _ENGINE_PATHS if key in engine}
        values["engine"] = {**engine, **paths}
    if values.get("state", NO_STATE) not in (NO_STATE, None):
        values["state"] = _beside(path, values["state"])
    if (path.parent / str(values.get("backbone"))).exists():  # else a hub id
        values["backbone"] = _beside(path, values["backbone"])
    return {str(key): value for key, value in values.items()}


def _beside(path: Path, value: object) -> object:
    """The paths in a value, relative ones beside the file."""
    if isinstance(value, list):
        return [_beside(path, item) for item in value]
    if isinstance(value, dict):
        return {key: _beside(path, item) for key, item in value.items()}
    return str(path.parent / Path(value).expanduser()) if isinstance(value, str) else value


def _bare_truths(
    values: Mapping[str, object], model: type[BaseModel], where: str = ""
) -> list[str]:
    """What is true or false, and no switch: pydantic would take true for the number 1, and YAML
    reads yes and on as true.
    """
    found: list[str] = []
    for name, field in model.model_fields.items():
        value, section = values.get(name), section_of(model, name)
        if section and isinstance(value, dict):
            found += _bare_truths(value, section, f"{where}{name}.")
        elif isinstance(value, bool) and field.annotation is not bool:
            found.append(
                f"{where}{name} is {str(value).lower()} (in YAML also yes, no, on, off), which "
                f"means nothing here: {_remedy(model, name)}"
            )
    return found


def _faults(errors: Sequence[ErrorDetails], values: Mapping[str, object]) -> list[tuple[str, str]]:
    """What is wrong, each with the outermost key that it is about; a key's faults are one."""
    faults: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for error in errors:
        faults.setdefault(_path(error), []).append(error)
    return [(path[0] if path else "", _told(path, found, values)) for path, found in faults.items()]


def _path(error: ErrorDetails) -> tuple[str, ...]:
    """The keys that lead to what is wrong; places in lists and forms of a value are left out."""
    model: type[BaseModel] | None = ServeSettings
    path: list[str] = []
    for part in error["loc"]:
        if model is None:
            break
        path.append(str(part))
        model = section_of(model, str(part))
    return tuple(path)


def _told(path: tuple[str, ...], errors: Sequence[ErrorDetails], values: object) -> str:
    if not path:  # of several fields together
        return errors[0]["msg"].removeprefix("Value error, ")
    model: type[BaseModel] = ServeSettings
    for part in path[:-1]:
        model = section_of(model, part) or model
        values = values.get(part) if isinstance(values, dict) else None
    name = ".".join(path)
    if path == ("experiments",):  # a list of documents: the place in it is told, too
        where = ".".join(map(str, errors[0]["loc"]))
        return f"{where}: {_rule(errors[0])}"
    if errors[0]["type"] == "extra_forbidden":
        return f"{name} is no setting: {_nearest(path[-1], model)}"
    if errors[0]["type"] == "value_error":  # ours, which states value, rule and remedy
        return f"{name}: {_rule(errors[0])}"
    value = repr(values.get(path[-1]) if isinstance(values, dict) else values)
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    return f"{name} is {shown}: {' or '.join(map(_rule, errors))}; {_remedy(model, path[-1])}"


def _rule(error: ErrorDetails) -> str:
    if error["type"] in _RULES:
        return _RULES[error["type"]]
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return rule[:1].lower() + rule[1:]


def _remedy(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    default = field.get_default(call_default_factory=True)
    is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    without = f" for {default}" if is_plain else ""
    return f"correct it ({field.description}), or leave it out{without}"


def _nearest(name: str, model: type[BaseModel]) -> str:
    """What may have been meant."""
    known = list(model.model_fields)
    if near := get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    return f"leave it out; there are {', '.join(known)}"


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The settings under a key; None where it holds a value."""
    field = model.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
