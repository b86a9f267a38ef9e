"""docs/config.md, made of the settings themselves: `python -m mergeroute.serving.config_docs`."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .settings import ServeSettings
from .settings_file import section_of

_HEAD = """# serve.yaml

```
mergeroute serve --config serve.yaml
mergeroute doctor --config serve.yaml       # says what will not work, and starts nothing
```
Made by `python -m mergeroute.serving.config_docs` of the settings themselves. A file that states \
everything is [examples/serve.yaml](../examples/serve.yaml). Relative paths are relative to the \
file. What the command line says goes before what the file says. A key that is not here is \
refused, and so is a value that is not allowed.
"""
_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "value",
}
_RULES = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_SINGULAR = {"modules": "module", "module_roots": "module_root", "banks": "BANK"}


def document() -> str:
    """The page, Markdown."""
    return "\n".join(_lines()) + "\n"


def option_names() -> dict[str, str]:
    """The command line's name of each setting that it knows, by field."""
    from .cli import app

    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), "serve")  # type: ignore[attr-defined]
    taken = {parameter.name: parameter.opts[0] for parameter in command.params}
    given = {field: taken.get(_SINGULAR.get(field, field)) for field in ServeSettings.model_fields}
    return {**{f: name for f, name in given.items() if name}, "banks": "BANK"}


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "## Top level"
    yield from _rows(ServeSettings, option_names())
    for name, field in ServeSettings.model_fields.items():
        if section := section_of(ServeSettings, name):
            yield f"\n## {name}\n\n{_said(field).capitalize()}."
            yield from _rows(section, None)


def _rows(model: type[BaseModel], options: dict[str, str] | None) -> Iterator[str]:
    """A table of a section's keys; of the top level with the options beside them."""
    columns = ["key", *(["option"] if options is not None else []), "type", "unless stated", ""]
    yield f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for name, field in model.model_fields.items():
        cells = [f"`{name}`"]
        if options is not None:
            cells.append(f"`{options[name]}`" if name in options else "")
        cells += [_type(field), _default(field, model, name), _said(field)]
        yield f"| {' | '.join(cells)} |"


def _said(field: FieldInfo) -> str:
    assert field.description, "every setting has a description"
    return field.description.replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    said = _named(field.annotation)
    limits = [
        f"{words} {limit}"
        for rule in field.metadata
        for name, words in _RULES.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    return ", ".join([said, *limits])


def _named(kind: Any) -> str:  # noqa: ANN401 - an annotation
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_named, parts))
    if origin is tuple and issubclass(parts[0], BaseModel):
        return "list of keys with values"
    if origin is tuple:
        return f"list of {_named(parts[0])}s"
    if origin is dict:
        return f"{_named(parts[1])}s by name"
    return "keys below"


def _default(field: FieldInfo, model: type[BaseModel], name: str) -> str:
    if section_of(model, name):
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n")
    return f"`{text.strip()}`"


if __name__ == "__main__":
    sys.stdout.write(document())
