"""`mergeroute build` of a sparse model with merged experts: calibration, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from ..adapters.bank import Bank
from ..adapters.build import Progress
from ..adapters.digest import short
from ..adapters.smoe.build import MoeTools, build_moe
from ..adapters.smoe.layout import MoeCheckpoint
from ..adapters.smoe.recipe import MoeRecipe
from ..adapters.smoe.stored import Cost, ExpertsReport, LayerReport
from ..adapters.smoe.usage import Usage
from ..routers.data import read_examples
from ..runtime.expert_usage import UsageOptions, expert_usage
from ..runtime.loading import load_model, load_tokenizer
from ..runtime.rendering import Rendered, render


def build_moe_bank(
    recipe: MoeRecipe, out: Path, *, force: bool, device: torch.device, stage: Progress
) -> Bank:
    """Build a bank from a sparse model; see `mergeroute.adapters.smoe.build.build_moe`."""
    tools = MoeTools(device, stage, lambda moe: measured_usage(recipe, moe, device, stage))
    return build_moe(recipe, out, force=force, tools=tools)


def measured_usage(
    recipe: MoeRecipe, moe: MoeCheckpoint, device: torch.device, stage: Progress
) -> Usage:
    """How a model routes a recipe's calibration prompts; it runs in the dtype it is stored in, and
    is gone from memory afterwards.

    Raises:
        DataError: the prompts cannot be read or rendered.
        UnsupportedModelError: the model cannot be loaded, or gives NaN.
    """
    assert recipe.calibration is not None
    prompts = _prompts(Path(recipe.calibration), moe.path)
    model = load_model(moe.path, device=device, dtype=moe.layers[0].dtype)
    options = UsageOptions(
        outputs=recipe.experts.method == "hc-smoe",
        moments=recipe.experts.fits_outputs,
        seed=recipe.seed,
    )
    return expert_usage(model, prompts, options, on_prompt=stage("calibration", len(prompts)))


def experts_table(bank: Bank, report: ExpertsReport) -> Table:
    """What came out: a row per sparse layer."""
    whole, left = report.original, report.merged
    table = Table(
        title=f"bank {escape(bank.name)} {short(bank.digest)}, experts by {report.method}, "
        f"{report.router} router",
        caption=f"experts {_change(whole, left, 'bytes')}, operations of a token "
        f"{_change(whole, left, 'flops')}",
    )
    rows = [_row(layer, report) for layer in report.layers]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in columns:
        table.add_column(name, justify="left" if name == "layer" else "right")
    for row in rows:
        table.add_row(*(escape(row[name]) for name in columns))
    return table


def _row(layer: LayerReport, report: ExpertsReport) -> dict[str, str]:
    """A sparse layer in figures; what it has none of is empty."""
    has_gap = layer.router_kl is not None and layer.router_agreement is not None
    return {
        "layer": layer.layer,
        "experts": f"{layer.experts} of {report.experts}",
        "unused": str(len(layer.unused) or ""),
        "error of centres": _span(layer.centre_errors) if report.residual_bytes else "",
        "error": _span(layer.errors),
        "router KL": f"{layer.router_kl:.4f}" if has_gap else "",
        "router agreement": f"{layer.router_agreement:.1%}" if has_gap else "",
    }


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{high:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def _change(whole: Cost, left: Cost, what: str) -> str:
    before, after = getattr(whole, what), getattr(left, what)
    unit = "MB" if what == "bytes" else "MFLOP"
    return f"{before / 1e6:,.2f} to {after / 1e6:,.2f} {unit} ({after / before:.1%})"


def _prompts(path: Path, model: Path) -> list[Rendered]:
    tokenizer = load_tokenizer(model)
    return [render(tokenizer, example) for example in read_examples(path)]
