"""The picture of `benchmarks.merging`: normalised score against the bytes of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES = {
    ("twin", "full"): ("Twin, full fine-tunes", "o", "#0072B2"),
    ("twin", "lora"): ("Twin, LoRA experts", "s", "#009E73"),
    ("lego", "lora"): ("LEGO, LoRA experts", "^", "#CC79A7"),
    ("compressor", "full"): ("other compressors", "x", "#D55E00"),
}


def plot(entries: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw modules as points and the static merges as a band. file: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    static = [e["normalised"] for e in entries if e["group"] == "static"]
    if static:
        axes.axhspan(min(static), max(static), color="0.9", label="static merges (no module)")
    for (group, experts), (label, marker, colour) in STYLES.items():
        points = [
            (e["module_percent"], e["normalised"])
            for e in entries
            if e["group"] == group and e["experts"] == experts and e["module_bytes"]
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    axes.axhline(100, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_xlabel("bytes of a module, % of the model")
    axes.set_ylabel("normalised score (experts = 100)")
    axes.set_title("Oracle routing on the zoo")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)
