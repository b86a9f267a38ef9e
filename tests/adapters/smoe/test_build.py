"""Banks of sparse models with fewer experts: plain checkpoints, reports, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.checkpoint import Checkpoint
from mergeroute.adapters.errors import BackboneError, BankError, RecipeError
from mergeroute.adapters.smoe.accounting import cost_of
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.layout import MoeCheckpoint
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.adapters.smoe.stored import TENSORS, ExpertsReport, read_report
from mergeroute.adapters.smoe.usage import LayerUsage, Usage
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.sparse_blocks import sparse_blocks

from ...moe import CAUSAL, EXPERTS, HIDDEN, make_moe, make_prompts, save_moe, usage_of
from ...tiny import make_model, make_prompt

M_SMOE = {"method": "m-smoe", "keep": 2}


def make_recipe(folder: Path, experts: Mapping[str, Any], **others: Any) -> MoeRecipe:
    """Over the model in `folder / moe`."""
    document = {"base": str(folder / "moe"), "experts": experts, "calibration": "prompts"}
    return MoeRecipe.model_validate({**document, **others})


def build_in(
    folder: Path, experts: Mapping[str, Any], *, usage: Usage | None = None, **others: Any
) -> Bank:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "moe").eval()
    tools = MoeTools(collect=lambda _: usage_of(model) if usage is None else usage)
    return build_moe(
        make_recipe(folder, experts, **others), folder / "bank", force=True, tools=tools
    )


def report_of(bank: Bank) -> ExpertsReport:
    report = read_report(bank.backbone.path)
    assert report is not None
    return report


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A folder with a tiny Mixtral in `moe`."""
    save_moe(make_moe(), tmp_path / "moe")
    return tmp_path


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize("method", ["m-smoe", "reap"])
def test_stock_transformers_load_a_compact_bank(
    name: str, is_published: bool, method: str, tmp_path: Path
) -> None:
    original = make_moe(name)
    original.save_pretrained(tmp_path / "moe", save_original_format=is_published)
    bank = build_in(tmp_path, {"method": method, "keep": 3})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        bank.backbone.path, output_loading_info=True
    )
    assert not any(report.values())
    for layer, block in sparse_blocks(model).items():
        found = block
        assert found.experts.down_proj.shape[0] == 3
        assert found.gate.weight.shape == (3, HIDDEN)
        if method == "reap":
            groups = next(own.groups for own in report_of(bank).layers if own.layer == layer)
            kept = [expert for expert, group in enumerate(groups) if group >= 0]
            whole: Any = original.get_submodule(layer)
            assert torch.equal(found.gate.weight, whole.gate.weight[kept])
            assert torch.equal(found.experts.gate_up_proj, whole.experts.gate_up_proj[kept])
    others = {n: p for n, p in original.named_parameters() if ".experts." not in n}
    for parameter, value in model.named_parameters():
        if parameter in others and "mlp.gate.weight" not in parameter:
            assert torch.equal(value, others[parameter])  # shared experts among them


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_compact_bank_routes_much_as_one_with_summed_probabilities(
    name: str, tmp_path: Path
) -> None:
    """Its router rows are in the order of its centres: in another one at most two of three tokens
    agree.
    """
    make_moe(name).save_pretrained(tmp_path / "moe")
    experts = {"method": "m-smoe", "keep": 3}
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        build_in(tmp_path, experts).backbone.path
    ).eval()
    path = build_in(tmp_path, {**experts, "router": "groups"}).backbone.path
    whole = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    for layer, block in sparse_blocks(stock).items():
        merged = whole.get_submodule(layer).experts
        assert torch.equal(block.experts.gate_up_proj, merged.gate_up)
        assert torch.equal(block.experts.down_proj, merged.down)
    ids = torch.tensor([make_prompt(200, seed=seed) for seed in range(1, 4)])
    said, wanted = (model(ids).logits.argmax(-1) for model in (stock, whole))
    assert (said == wanted).float().mean() > 0.7


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe", "average", "random", "shared"])
@pytest.mark.parametrize("router", ["exact", "groups", "compact"])
def test_every_method_reports_what_it_did(method: str, router: str, mixtral: Path) -> None:
    keep = {} if method == "shared" else {"keep": 2}
    report = report_of(build_in(mixtral, {"method": method, "router": router, **keep}))
    assert (report.method, report.router) == (method, router)
    assert (report.experts, report.top_k, report.residual_bytes) == (EXPERTS, 2, 0)
    assert report.merged.bytes == report.original.bytes * (1 if method == "shared" else 2) // 4
    for layer in report.layers:
        assert set(layer.groups) == set(range(layer.experts))
        assert layer.errors == layer.centre_errors
        assert 0 < max(layer.errors) < 1.5
        assert layer.router_kl is not None
        assert layer.router_kl >= 0
        assert sum(layer.counts or ()) == 2 * 143


def test_errors_fall_as_the_rank_rises_and_bytes_rise(mixtral: Path) -> None:
    reports = [
        report_of(build_in(mixtral, {"method": "shared", "residuals": {"rank": rank}}))
        for rank in (2, 8, 16)
    ]
    errors = [max(report.layers[0].errors) for report in reports]
    assert errors == sorted(errors, reverse=True)
    assert all(
        report.layers[0].centre_errors == reports[0].layers[0].centre_errors for report in reports
    )
    for report, rank in zip(reports, (2, 8, 16), strict=True):
        factors = 3 * EXPERTS * rank * ((48 + HIDDEN) + (HIDDEN + 24)) * 2
        assert report.residual_bytes == factors + 3 * 2 * EXPERTS * 4  # ranks are counted too
        assert report.merged.bytes == report.original.bytes // EXPERTS + report.residual_bytes


def test_costs_are_those_of_what_is_stored(mixtral: Path) -> None:
    bank = build_in(mixtral, {"method": "shared", "residuals": {"rank": 4, "dtype": "int8"}})
    report = report_of(bank)
    tensors = load_file(bank.backbone.path / TENSORS)
    residuals = sum(x.nbytes for n, x in tensors.items() if ".gate_up." in n or ".down." in n)
    assert report.residual_bytes == residuals
    assert cost_of(bank.backbone.path) == report.merged
    assert cost_of(mixtral / "moe") == report.original
    centre = 3 * 24 * HIDDEN
    assert report.original.flops == 3 * 2 * (EXPERTS * HIDDEN + 2 * centre)
    low_rank = 4 * ((48 + HIDDEN) + (HIDDEN + 24))
    assert report.merged.flops == 3 * 2 * (EXPERTS * HIDDEN + centre + 2 * low_rank)


def test_residuals_make_up_for_the_rounding_of_the_centres(mixtral: Path) -> None:
    residuals = {"rank": 99, "dtype": "float32"}
    bank = build_in(mixtral, {"method": "shared", "residuals": residuals}, dtype="bfloat16")
    assert max(report_of(bank).layers[0].errors) < 1e-5
    config = json.loads((bank.backbone.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    dtypes = {info.dtype for info in Checkpoint.open(bank.backbone.path).tensors.values()}
    assert dtypes == {torch.bfloat16}


def test_adaptive_allocation_gives_layers_what_they_use(mixtral: Path) -> None:
    usage = dict(usage_of(make_moe()))
    names = [f"model.layers.{k}.mlp" for k in range(3)]
    for name, counts in zip(names, ([5, 5, 5, 5], [17, 1, 1, 1], [9, 9, 1, 1]), strict=True):
        usage[name] = with_counts(usage[name], counts)
    experts = {**M_SMOE, "allocation": "adaptive", "router": "exact"}
    bank = build_in(mixtral, experts, usage=usage)
    assert [layer.experts for layer in report_of(bank).layers] == [3, 1, 2]
    plain = MoeCheckpoint.open(bank.backbone.path)
    assert (plain.experts, plain.top_k) == (1, 1)


def with_counts(usage: LayerUsage, counts: list[int]) -> LayerUsage:
    return LayerUsage(
        tokens=usage.tokens,
        counts=torch.tensor(counts),
        logit_gram=usage.logit_gram,
        saliency=usage.saliency,
        hidden=usage.hidden,
        mean_outputs=usage.mean_outputs,
        moment=usage.moment,
    )


def test_a_layer_with_one_expert_left_sends_every_token_to_it(mixtral: Path) -> None:
    bank = build_in(mixtral, {"method": "reap", "keep": 1})
    model = transformers.AutoModelForCausalLM.from_pretrained(bank.backbone.path).eval()
    assert model.config.num_experts_per_tok == 1
    gates: list[torch.Tensor] = []
    block: Any = next(iter(sparse_blocks(model).values()))
    block.gate.register_forward_hook(lambda _m, _i, output: gates.append(output[1]))
    model(input_ids=torch.tensor([make_prompts(20)[0].token_ids]))
    assert torch.equal(gates[0], torch.ones(20, 1))


@pytest.mark.parametrize("method", ["m-smoe", "average", "hc-smoe", "reap"])
def test_experts_never_used_in_calibration_are_merged_or_left_out(
    method: str, mixtral: Path
) -> None:
    usage = {n: with_counts(own, [9, 0, 0, 7]) for n, own in usage_of(make_moe()).items()}
    report = report_of(build_in(mixtral, {"method": method, "keep": 2}, usage=usage))
    assert all(layer.unused == (1, 2) for layer in report.layers)


def test_one_short_prompt_is_enough(mixtral: Path) -> None:
    usage = usage_of(make_moe(), lengths=(2,))
    for method in ("m-smoe", "hc-smoe", "reap"):
        build_in(mixtral, {"method": method, "keep": 2}, usage=usage)


def test_equal_recipes_give_equal_banks(mixtral: Path) -> None:
    experts = {**M_SMOE, "residuals": {"rank": 3, "fit": "outputs"}}
    assert build_in(mixtral, experts).digest == build_in(mixtral, experts).digest


def test_a_bank_that_was_tampered_with_is_refused(mixtral: Path) -> None:
    bank = build_in(mixtral, {"method": "shared", "residuals": {"rank": 2}})
    path = bank.backbone.path / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BankError, match="is corrupt or was changed"):
        Bank.open(mixtral / "bank")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"method": "m-smoe", "keep": 4}, r"keep is 4, the layers .* have 4 experts: keep 1 to 3"),
        ({"method": "reap", "keep": 9}, "keep is 9"),
        ({**M_SMOE, "router": "exact", "skip_layers": [3]}, "skip_layers names 3"),
        ({**M_SMOE, "router": "exact", "skip_layers": [0, 1, 2]}, "names every sparse layer"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    experts: dict[str, Any], message: str, mixtral: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        build_in(mixtral, experts)
    assert not (mixtral / "bank").exists()


def test_a_layer_of_one_expert_has_nothing_to_merge(mixtral: Path) -> None:
    one = build_in(mixtral, {"method": "shared"}, calibration=None).backbone.path
    again = make_recipe(mixtral, {"method": "shared"}, base=str(one), calibration=None)
    with pytest.raises(RecipeError, match="have one expert each: there is nothing to merge"):
        build_moe(again, mixtral / "again")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "moe")
    with pytest.raises(BackboneError, match="no sparse mixture of experts that is known"):
        build_moe(make_recipe(tmp_path, {"method": "shared"}), tmp_path / "bank")


def test_switch_makes_no_bank_as_it_is_no_causal_model(tmp_path: Path) -> None:
    make_moe("switch").save_pretrained(tmp_path / "moe")
    with pytest.raises(BackboneError, match="is no causal language model"):
        build_moe(make_recipe(tmp_path, {"method": "shared"}), tmp_path / "bank")


def test_prompts_need_somebody_who_runs_the_model(mixtral: Path) -> None:
    with pytest.raises(RecipeError, match="build it by mergeroute build"):
        build_moe(make_recipe(mixtral, M_SMOE), mixtral / "bank")


def test_merged_experts_with_residuals_are_not_merged_again(mixtral: Path) -> None:
    bank = build_in(mixtral, {**M_SMOE, "residuals": {"rank": 2}})
    again = make_recipe(mixtral, {"method": "shared"}, base=str(bank.backbone.path))
    with pytest.raises(RecipeError, match="merge the model that it came from"):
        build_moe(again, mixtral / "again", tools=MoeTools(collect=lambda _: usage_of(make_moe())))


def test_a_compact_bank_is_a_model_like_any_other(mixtral: Path) -> None:
    bank = build_in(mixtral, {"method": "average", "keep": 3})
    again = make_recipe(
        mixtral, {"method": "shared"}, base=str(bank.backbone.path), calibration=None
    )
    report = report_of(build_moe(again, mixtral / "again"))
    assert (report.experts, report.layers[0].experts) == (3, 1)


def test_the_record_of_a_bases_recovery_is_not_the_banks(mixtral: Path) -> None:
    (mixtral / "moe" / "recovery.json").write_text("{}")
    bank = build_in(mixtral, M_SMOE)
    assert not (bank.backbone.path / "recovery.json").exists()


PEAK = """
import json, sys, threading, time
from pathlib import Path
from mergeroute.adapters.smoe.build import build_moe
from mergeroute.adapters.smoe.recipe import MoeRecipe

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def build(folder):
    recipe = MoeRecipe(base=folder + "/moe", experts=json.loads(sys.argv[3]))
    build_moe(recipe, folder + "/bank")

def watch():
    while not done:
        seen.append(held())
        time.sleep(0.002)

build(sys.argv[1])
seen, done = [held()], []
watcher = threading.Thread(target=watch)
watcher.start()
build(sys.argv[2])
done.append(True)
watcher.join()
print(max(seen) - seen[0])
"""


UNEVEN = {"method": "random", "keep": 1, "router": "exact", "skip_layers": [*range(1, 16)]}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "experts",
    [{"method": "shared", "residuals": {"rank": 4}}, UNEVEN],
    ids=["shared", "uneven"],
)
def test_memory_peaks_below_the_model(experts: dict[str, Any], tmp_path: Path) -> None:
    """Of a model so large (200 MB) that what allocators keep for themselves is little."""
    large: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8}
    make_moe(num_hidden_layers=16, **large).save_pretrained(tmp_path / "large" / "moe")
    make_moe(num_hidden_layers=16).save_pretrained(tmp_path / "small" / "moe")
    folders = (str(tmp_path / name) for name in ("small", "large"))
    command = [sys.executable, "-c", PEAK, *folders, json.dumps(experts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = Checkpoint.open(tmp_path / "large" / "moe").nbytes
    assert int(done.stdout) < 1.3 * size
