"""YAML in which no key may stand twice: YAML itself would take the last and say nothing."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the text holds
    """What a text holds.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping holds a key twice.
        RecursionError: it is nested too deeply.
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Safe, and refuses a key that is there already."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the mapping at line {line} holds {key!r} twice: keep one")
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
