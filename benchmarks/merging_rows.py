"""The rows of `benchmarks.merging`: what is built and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Experts = Literal["full", "lora"]
Group = Literal["reference", "static", "twin", "lego", "compressor"]

SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    backbone, modules: as in a recipe. scales: of the merge, module_scales: of the modules, to
    choose from by answers to training inputs. compressor: name and parameters, instead of a bank.
    looks_at_data: whether it needs calibration prompts.
    """

    label: str
    group: Group
    experts: Experts
    backbone: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=lambda: {"method": "none"})
    scales: tuple[float, ...] = ()
    module_scales: tuple[float, ...] = ()
    compressor: tuple[str, Mapping[str, Any]] | None = None
    looks_at_data: bool = False


STATIC: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("weight average", {"method": "linear"}),
    ("task arithmetic", {"method": "task_arithmetic"}),
    (
        "task arithmetic + LiNeS",
        {"method": "task_arithmetic", "lines": {"alpha": 0.5, "beta": 1.0}},
    ),
    ("TIES", {"method": "ties"}),
    ("DARE-linear", {"method": "dare_linear"}),
    ("DARE-TIES", {"method": "dare_ties"}),
    ("DELLA", {"method": "della"}),
    ("Breadcrumbs", {"method": "breadcrumbs"}),
    ("SCE", {"method": "sce", "select_topk": 0.5}),
    ("PCB", {"method": "pcb"}),
    ("Consensus", {"method": "consensus"}),
    ("EMR, unified only", {"method": "emr"}),
    ("WIDEN", {"method": "widen"}),
    ("TSV-M", {"method": "tsv"}),
    ("ISO-C", {"method": "iso_c"}),
    ("KnOTS-TIES", {"method": "knots"}),
    ("WUDI, ridge", {"method": "wudi"}),
    ("OPCM", {"method": "opcm"}),
    ("Fisher", {"method": "fisher"}),
    ("RegMean", {"method": "regmean"}),
    ("RegMean++", {"method": "regmean_plus_plus"}),
)
UNSCALED = ("linear", "fisher", "regmean", "regmean_plus_plus")
CALIBRATED = ("fisher", "regmean", "regmean_plus_plus")
TWIN = {"method": "task_arithmetic", "scale": 0.2}
MERGED = {"method": "task_arithmetic"}
TWIN_RANKS = (1, 2, 4, 8, 16, 32, 64)


def rows() -> list[Row]:
    """The rows in the order in which they are printed."""
    kinds: tuple[Experts, ...] = ("full", "lora")
    return [
        *(Row("base", "reference", kind, {"method": "none"}) for kind in kinds),
        *(Row("experts", "reference", kind) for kind in kinds),
        *(_static(label, backbone, kind) for kind in kinds for label, backbone in STATIC),
        *_twin_rows(),
        *_lego_rows(),
        *_compressor_rows(),
    ]


def _static(label: str, backbone: Mapping[str, Any], kind: Experts) -> Row:
    method = backbone["method"]
    scales = () if method in UNSCALED else SCALES
    return Row(label, "static", kind, backbone, scales=scales, looks_at_data=method in CALIBRATED)


def _twin_rows() -> Iterator[Row]:
    def twin(label: str, kind: Experts = "full", /, **modules: Any) -> Row:
        looks = modules.get("fit") == "outputs"
        return Row(label, "twin", kind, TWIN, {"method": "svd", **modules}, looks_at_data=looks)

    for rank in TWIN_RANKS:
        yield twin(f"Twin, rank {rank}, int8", rank=rank, dtype="int8")
    for rank in (8, 16):
        yield twin(f"Twin, rank {rank}, bfloat16", rank=rank, dtype="bfloat16")
    for rank in (8, 16):
        modules = {"method": "svd", "rank": rank, "dtype": "int8"}
        label = f"Twin, rank {rank}, int8, scales chosen"
        yield Row(label, "twin", "full", MERGED, modules, (0.15, 0.2, 0.3), (1.0, 1.1, 1.2))
    for percent in (5, 10):
        budget = {"bytes": percent * 17_200, "dtype": "int8"}
        yield twin(f"Twin, {percent} % of the bytes, int8", **budget)
        for fit in ("weights", "outputs"):
            label = f"Twin, {percent} %, int8, rank by energy of {fit}"
            yield twin(label, **budget, allocation="energy", fit=fit)
        yield twin(f"Twin, {percent} %, int8, closest outputs", **budget, fit="outputs")
    for rank in (4, 8, 16):
        yield twin(f"Twin, rank {rank}, bfloat16", "lora", rank=rank, dtype="bfloat16")
    for rank in (8, 16):
        yield twin(f"Twin, rank {rank}, int8", "lora", rank=rank, dtype="int8")
    own = {"method": "lora", "dtype": "bfloat16"}
    yield Row("LoRAs as they are, routed", "twin", "lora", {"method": "none"}, own)


def _lego_rows() -> Iterator[Row]:
    for rank in (8, 16, 32, 64):
        backbone = {"method": "lego", "rank": rank}
        yield Row(f"LEGO, {rank} clusters, merged", "lego", "lora", backbone, scales=SCALES)
    raw = {"method": "lego", "rank": 8, "gauge": "raw"}
    yield Row("LEGO, 8 clusters, raw gauge, merged", "lego", "lora", raw, scales=SCALES)
    for rank in (2, 4):
        modules = {"method": "lego", "rank": rank}
        yield Row(
            f"LEGO, each to {rank} units, routed", "lego", "lora", {"method": "none"}, modules
        )


def _compressor_rows() -> Iterator[Row]:
    named: list[tuple[str, str, dict[str, Any]]] = [
        *((f"magnitude, {d:.0%} kept", "magnitude", {"density": d}) for d in (0.05, 0.1, 0.2, 0.5)),
        *((f"ComPEFT, {d:.0%} kept", "compeft", {"density": d}) for d in (0.2, 0.5)),
        ("BitDelta, no distillation", "bitdelta", {}),
        ("TALL masks", "tall", {}),
        ("EMR masks", "emr", {}),
        *((f"expert in int{bits}", "quantised", {"bits": bits}) for bits in (8, 4, 3)),
    ]
    for label, name, parameters in named:
        yield Row(label, "compressor", "full", compressor=(name, parameters))
    modules = {"method": "magnitude", "density": 0.2, "rank": 16, "dtype": "int8"}
    yield Row("magnitude, 20 %, to rank 16, int8", "compressor", "full", TWIN, modules)
