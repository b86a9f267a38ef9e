"""The picture of `benchmarks.smoe`: what is kept against the experts' bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES = {
    "quantised": ("all experts, rounded", "x", "#D55E00"),
    "merged": ("merged or pruned", "s", "#999999"),
    "grouped": ("groups + residuals", "^", "#CC79A7"),
    "shared": ("one shared + residuals", "o", "#0072B2"),
    "recovered": ("after recovery", "d", "#009E73"),
}
AXES = (
    ("bytes_percent", "bytes of the experts, % of all 8 in bfloat16"),
    ("flops_percent", "operations of a token in sparse layers, %"),
)


def plot(entries: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the rows as points, once against bytes and once against operations. file: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, (key, label) in zip(both, AXES, strict=True):
        for group, (name, marker, colour) in STYLES.items():
            points = [(e[key], e["kept"]) for e in entries if e["group"] == group]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=name)
        axes.axhline(100, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("exact match kept, % of the mixture's")
    both[0].legend(loc="lower right")
    figure.suptitle("Merging the experts of the zoo's mixture")
    figure.savefig(file, dpi=130)
    plt.close(figure)
