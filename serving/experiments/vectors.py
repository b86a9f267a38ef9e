"""docs/assignment_vectors.json, what other languages are tested with:
`python -m mergeroute.serving.experiments.vectors`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .allocation import allocate, ramped
from .hashing import bucket
from .layers import Ranges, claim, holds, layer_bucket
from .units import Unit

_KEYS = (
    "1",
    "42",
    "alice",
    "Alice",
    "bob@example.org",
    "José",
    "用户-7",
    "🙂",
    "a key: 2 words",
    "k" * 300,
)
_SALTS = ("2f1c9a7be0d34c58", "checkout", "v2.salt_A")
_LAYERS = ("default", "prompts")
_RAMPS: tuple[tuple[dict[str, float], ...], ...] = (
    (
        {"control": 0.99, "routed": 0.01},
        {"control": 0.5, "routed": 0.5},
        {"control": 0, "routed": 1},
    ),
    (
        {"control": 0.3334, "b": 0.3333, "c": 0.3333},
        {"control": 0.5, "b": 0.25, "c": 0.25},
        {"control": 0.1, "b": 0.8, "c": 0.1},
        {"control": 0.1, "b": 0.2, "c": 0.3, "d": 0.4},
    ),
)


def document() -> dict[str, list[dict[str, Any]]]:
    """All vectors, by what they are of."""
    return {
        "bucket": [{"salt": s, "key": k, "bucket": bucket(s, k)} for s in _SALTS for k in _KEYS],
        "layer_bucket": [
            {"layer": name, "key": k, "bucket": layer_bucket(name, k)}
            for name in _LAYERS
            for k in _KEYS
        ],
        "assignment": [_assigned(key) for key in _KEYS],
        "ramp": [_ramped(steps) for steps in _RAMPS],
        "claim": _claims(),
        "digest": [
            {"secret": "s3cret", "key": k, "digest": Unit("user", k).digest("s3cret")}
            for k in _KEYS
        ],
    }


def _assigned(key: str) -> dict[str, Any]:
    """The variant of a key; null: it takes no part."""
    salt, layer, ranges = _SALTS[0], _LAYERS[0], claim([], 0.94)
    allocation = ramped(allocate(_RAMPS[1][0]), _RAMPS[1][1])
    takes_part = holds(ranges, layer_bucket(layer, key))
    return {
        "key": key,
        "layer": layer,
        "ranges": ranges,
        "salt": salt,
        "runs": allocation.as_lists(),
        "variant": allocation.variant_of(bucket(salt, key)) if takes_part else None,
    }


def _ramped(steps: tuple[dict[str, float], ...]) -> dict[str, Any]:
    """Weights one after another, each with the runs they lead to."""
    allocation = allocate(steps[0])
    found = []
    for weights in steps:
        allocation = ramped(allocation, weights)
        found.append({"weights": weights, "runs": allocation.as_lists()})
    return {"steps": found}


def _claims() -> list[dict[str, Any]]:
    """Experiments of one layer: the second takes what is free, then the first gives some up, then
    the second takes more.
    """
    first = _claimed([], 0.3, ())
    second = _claimed([first["ranges"]], 0.2, ())
    less = _claimed([second["ranges"]], 0.1, first["ranges"])
    more = _claimed([less["ranges"]], 0.6, second["ranges"])
    return [first, second, less, more]


def _claimed(taken: list[Ranges], traffic: float, held: Ranges) -> dict[str, Any]:
    ranges = claim(taken, traffic, held=held)
    return {"taken": taken, "traffic": traffic, "held": held, "ranges": ranges}


def text() -> str:
    """The file, one vector a line."""
    lines = []
    for name, rows in document().items():
        shown = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        lines.append(f' "{name}": [\n{shown}\n ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.stdout.write(text())
