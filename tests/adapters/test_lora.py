"""Modules against real PEFT, both ways, and one damaged folder per refusal."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import ModuleError
from mergeroute.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, Module
from mergeroute.runtime.merging import merge_into

from ..tiny import make_model, make_module, make_prompt

LAYERS = linear_layers(make_model())
FIRST = "model.layers.0.self_attn.q_proj"
LAST = "model.layers.2.mlp.down_proj"
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {r".*\.1\..*": 2, "{0}": 7}},
    "alpha_pattern": {"alpha_pattern": {r".*\.1\..*": 3, "{0}": 40}},
    "patterns_rslora": {
        "rank_pattern": {"{1}": 2, "{2}": 9},
        "alpha_pattern": {"{1}": 32, "{2}": 3},
        "use_rslora": True,
    },
    "some_layers": {"layers_to_transform": [0, 2]},
}


def options_for(architecture: str, options: str) -> dict[str, Any]:
    """The options with an architecture's layer names put in for {0} and {1}."""
    targets = TARGETS[architecture]

    def named(pattern: dict[str, int]) -> dict[str, int]:
        return {k.format(*targets) if "{" in k else k: v for k, v in pattern.items()}

    return {
        "target_modules": targets,
        "fan_in_fan_out": architecture == "gpt2",
        **{k: named(v) if isinstance(v, dict) else v for k, v in OPTIONS[options].items()},
    }


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([make_prompt(20, seed=1)])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def merged(model: Any, module: Module) -> Any:
    plain = copy.deepcopy(model)
    merge_into(plain, {module.name: module}, Blend({module.name: 1.0}))
    return plain


def train(model: Any, folder: Path, **options: Any) -> Any:
    """A PEFT model with random factors, saved to the folder."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
    peft_model.save_pretrained(str(folder))
    return peft_model


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_loaded_peft_adapter_changes_the_logits_as_peft_does(
    architecture: str, options: str, tmp_path: Path
) -> None:
    model = make_model(architecture)
    expected = logits_of(train(model, tmp_path, **options_for(architecture, options)))
    module = Module.load(tmp_path, name="m", layers=linear_layers(model))
    torch.testing.assert_close(logits_of(merged(model, module)), expected, atol=1e-4, rtol=0)
    assert (expected - logits_of(model)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT sees a Conv1D by itself
@pytest.mark.parametrize("architecture", TARGETS)
def test_peft_reads_what_a_module_saves(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    random = make_module(model, "m", scale=0.1)
    module = Module("m", {layer: _cut(d, k) for k, (layer, d) in enumerate(random.deltas.items())})
    assert len({delta.rank for delta in module.deltas.values()}) == 4
    module.save(tmp_path, base="somewhere/base")
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    expected = logits_of(merged(model, module))
    torch.testing.assert_close(logits_of(peft_model), expected, atol=1e-4, rtol=0)
    assert (expected - logits_of(model)).abs().max() > 1e-2
    assert peft_model.peft_config["default"].base_model_name_or_path == "somewhere/base"


def _cut(delta: LowRank, layer: int) -> LowRank:
    rank = 1 + layer % 4
    return LowRank(delta.left[:, :rank], delta.right[:rank])


def test_save_and_load_keep_every_bit_and_the_digest(tmp_path: Path) -> None:
    module = make_module(make_model(), "m")
    module.save(tmp_path)
    loaded = Module.load(tmp_path, name="other", layers=LAYERS)
    assert loaded.deltas.keys() == module.deltas.keys()
    for layer, delta in module.deltas.items():
        assert torch.equal(loaded.deltas[layer].left, delta.left)
        assert torch.equal(loaded.deltas[layer].right, delta.right)
    assert loaded.digest == module.digest
    assert loaded.name == "other"


def test_save_in_bfloat16_halves_the_file_and_rounds(tmp_path: Path) -> None:
    module = make_module(make_model(), "m")
    module.save(tmp_path / "full")
    module.save(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / kind / WEIGHTS_FILE).stat().st_size for kind in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Module.load(tmp_path / "half", name="m", layers=LAYERS)
    for layer, delta in module.deltas.items():
        assert loaded.deltas[layer].left.dtype == torch.float32
        assert torch.equal(loaded.deltas[layer].right, delta.right.bfloat16().float())
    assert loaded.digest != module.digest


def test_factors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    wide = torch.randn(8, 32)
    module = Module(
        "m",
        {
            f"model.layers.{k}.self_attn.q_proj": LowRank(torch.randn(32, 4), wide[2 * k :][:4])
            for k in range(3)
        },
    )
    module.save(tmp_path)
    assert Module.load(tmp_path, name="m", layers=LAYERS).digest == module.digest


def test_the_digest_is_of_the_content_alone() -> None:
    model = make_model()
    module = make_module(model, "m")
    backwards = {layer: module.deltas[layer] for layer in sorted(module.deltas, reverse=True)}
    assert Module("other", backwards).digest == module.digest
    changed = {layer: copy.deepcopy(delta) for layer, delta in module.deltas.items()}
    changed[LAST].left[3, 1] += 1e-6
    fewer = {layer: delta for layer, delta in module.deltas.items() if layer != LAST}
    moved = {**fewer, "model.layers.2.mlp.other": module.deltas[LAST]}
    digests = {Module("m", deltas).digest for deltas in (changed, fewer, moved, module.deltas)}
    assert len(digests) == 4


def test_coverage_counts_what_was_matched(tmp_path: Path) -> None:
    train(make_model(), tmp_path, target_modules=["q_proj"], rank_pattern={r".*\.1\..*": 2})
    module = Module.load(tmp_path, name="m", layers=LAYERS)
    coverage = module.coverage(LAYERS)
    assert (coverage.layers_matched, coverage.layers_total) == (3, len(LAYERS)) == (3, 21)
    assert coverage.ranks == (2, 4)
    assert module.rank == 4
    assert coverage.nbytes == 4 * (32 + 32) * (4 + 2 + 4)
    dense = torch.stack([delta.dense() for delta in module.deltas.values()])
    assert coverage.effect == pytest.approx(float(dense.norm()), rel=1e-5)
    assert "3 of 21 layers, ranks 2 to 4" in str(coverage)


# Refusals. Each folder is saved by PEFT itself where PEFT can make it.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder: q_proj and down_proj of every layer, rank 4."""
    train(make_model(), tmp_path, target_modules=["q_proj", "down_proj"])
    (tmp_path / "README.md").unlink()
    Module.load(tmp_path, name="m", layers=LAYERS)
    return tmp_path


def refuse(folder: Path, *texts: str) -> None:
    with pytest.raises(ModuleError) as caught:
        Module.load(folder, name="m", layers=LAYERS)
    for text in texts:
        assert text in str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"use_dora": True}, ["use_dora=True", "train with use_dora=False"]),
        ({"bias": "lora_only"}, ["bias='lora_only'", "train with bias='none'"]),
        ({"bias": "all"}, ["bias='all'", "train with bias='none'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "train without modules_to_save"]),
        ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens=[5]", "plain LoRA"]),
        ({"lora_bias": True}, ["lora_bias=True", "lora_bias=False"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices", "train without"]),
        ({"layer_replication": [(0, 2), (1, 3)]}, ["layer_replication", "train without"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own remarks on these options
def test_what_cannot_be_blended_is_refused(
    options: dict[str, Any], texts: list[str], tmp_path: Path
) -> None:
    train(make_model(), tmp_path, **{"target_modules": ["q_proj"], **options})
    refuse(tmp_path, *texts)


def test_other_adapters_than_lora_are_refused(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path / "vera"))
    refuse(tmp_path / "vera", "VERA", "only LORA is served", "convert")
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(make_model(), ia3).save_pretrained(str(tmp_path / "ia3"))
    refuse(tmp_path / "ia3", "IA3", "only LORA is served", "convert")


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_initialisations_that_change_the_base_are_refused(kind: str, folder: Path) -> None:
    edit_config(folder, init_lora_weights=kind)
    refuse(folder, f"init_lora_weights={kind!r}", "path_initial_model_for_weight_conversion")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base:UserWarning")  # which is the point
def test_a_real_pissa_folder_is_refused_and_its_converted_form_is_exact(tmp_path: Path) -> None:
    model = make_model()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    peft_model = get_peft_model(copy.deepcopy(model), config)
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(str(tmp_path / "initial"))
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    peft_model.save_pretrained(str(tmp_path / "raw"))
    refuse(tmp_path / "raw", "pissa")
    expected = logits_of(peft_model.eval())
    initial = str(tmp_path / "initial")
    converted = tmp_path / "converted"
    peft_model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=initial)
    module = Module.load(converted, name="m", layers=LAYERS)
    torch.testing.assert_close(logits_of(merged(model, module)), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_keep_the_base_are_loaded(kind: object, folder: Path) -> None:
    edit_config(folder, init_lora_weights=kind)
    Module.load(folder, name="m", layers=LAYERS)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", ["DoRA"]),
        ("base_model.model.model.embed_tokens.base_layer.weight", ["modules_to_save"]),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", ["lora_bias=False"]),
        ("base_model.model.model.norm.weight", ["norm.weight", "modules_to_save"]),
        ("something", ["something"]),
    ],
)
def test_tensors_beside_the_factors_are_refused_by_name(
    name: str, texts: list[str], folder: Path
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    refuse(folder, name, *texts)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        if old in name:
            tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("new", "texts"),
    [
        ("lm_head", ["'lm_head'", "head", "inner layers"]),
        ("model.embed_tokens", ["'model.embed_tokens'", "embedding", "inner layers"]),
        ("model.layers.9.self_attn.q_proj", ["layers.9.self_attn.q_proj", "another base"]),
        ("transformer.h.0.attn.c_attn", ["transformer.h.0.attn.c_attn", "q_proj"]),
    ],
)
def test_unknown_layers_are_refused(new: str, texts: list[str], folder: Path) -> None:
    edit_tensors(folder, lambda tensors: rename(tensors, FIRST, new))
    refuse(folder, *texts)


def test_a_module_of_another_base_is_refused(tmp_path: Path) -> None:
    train(make_model("gpt2"), tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    refuse(tmp_path, "transformer.h.0.attn.c_attn", "no layer of the backbone")


def test_a_wrong_shape_is_refused(folder: Path) -> None:
    key = f"base_model.model.{FIRST}.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(48, 4)}))
    refuse(folder, FIRST, "48 x 32", "32 x 32", "another base")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_nan_and_inf_are_refused(value: float, side: str, folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_{side}.weight"
    edit_tensors(folder, lambda tensors: tensors[key][1].fill_(value))
    refuse(folder, LAST, "NaN or inf", "diverged")


def test_an_overflow_in_folding_is_refused(folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[key].fill_(3e38))
    refuse(folder, LAST, "NaN or inf")


def test_a_module_saved_before_training_is_refused(tmp_path: Path) -> None:
    train(make_model(), tmp_path, target_modules=["q_proj"], init_lora_weights=True)
    refuse(tmp_path, "'m'", "changes nothing", "before training")


def test_one_zero_layer_among_others_is_allowed(folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[key].zero_())
    assert Module.load(folder, name="m", layers=LAYERS).deltas[LAST].norm() == 0


def test_an_alpha_of_zero_is_refused(folder: Path) -> None:
    edit_config(folder, lora_alpha=0)
    refuse(folder, "changes nothing")


def test_a_missing_factor_of_an_embedding_is_refused(folder: Path) -> None:
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(4, 300)}))
    refuse(folder, "'model.embed_tokens'", "lacks lora_embedding_B", "incomplete")


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_missing_factor_is_refused(side: str, folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_{side}.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    refuse(folder, LAST, f"lacks lora_{side}", "incomplete")


def test_a_factor_given_twice_is_refused(folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_B.weight"
    edit_tensors(
        folder, lambda tensors: tensors.update({f"{LAST}.lora_B.weight": tensors[key] * 2})
    )
    refuse(folder, LAST, "twice")


def test_factors_that_do_not_multiply_are_refused(folder: Path) -> None:
    key = f"base_model.model.{LAST}.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(32, 3)}))
    refuse(folder, LAST, "(4, 48)", "(32, 3)", "do not multiply")


def test_ranks_that_the_configuration_does_not_state_are_refused(folder: Path) -> None:
    edit_config(folder, r=8)
    refuse(folder, "rank 4", "states 8", "do not belong together")


def test_ranks_that_the_pattern_does_not_state_are_refused(folder: Path) -> None:
    edit_config(folder, rank_pattern={"down_proj": 2})
    refuse(folder, "down_proj", "rank 4", "states 2")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refuse(folder, str(path), "damaged or truncated")


def test_garbage_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"\x80\x04garbage" * 50)
    refuse(folder, WEIGHTS_FILE, "damaged or truncated")


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    save_file({}, folder / WEIGHTS_FILE)
    refuse(folder, "no tensors", "change nothing")


class _Trap:
    """A pickle that writes a file when it is opened."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self._proof, "executed"))


def test_a_pickle_is_refused_unopened(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    trap = pickle.dumps(_Trap(proof))
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(trap)
    refuse(folder, WEIGHTS_FILE, "pickle", "never opened", "safe_serialization=True")
    (folder / WEIGHTS_FILE).write_bytes(trap)
    refuse(folder, WEIGHTS_FILE, "damaged")
    assert not proof.exists()
    pickle.loads(trap)  # the trap itself works
    assert proof.read_text() == "executed"


def test_an_empty_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), CONFIG_FILE, "name a PEFT LoRA folder")
    refuse(tmp_path / "nowhere", "nowhere", CONFIG_FILE)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    refuse(folder, f"holds no {WEIGHTS_FILE}")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"r"', b"\xff\xfe{}", b'{"r": ' + b"[" * 100_000]
)
def test_a_damaged_configuration_is_refused(content: bytes, folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    refuse(folder, CONFIG_FILE)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": None}, "'r'"),
        ({"r": "4"}, "'r'"),
        ({"r": 4.0}, "'r'"),
        ({"r": 0}, "'r'"),
        ({"r": -4}, "'r'"),
        ({"r": True}, "'r'"),
        ({"lora_alpha": "16"}, "'lora_alpha'"),
        ({"lora_alpha": None}, "'lora_alpha'"),
        ({"lora_alpha": [6]}, "'lora_alpha'"),
        ({"lora_alpha": float("nan")}, "'lora_alpha'"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern'"),
        ({"rank_pattern": {"q_proj": "4"}}, "'rank_pattern'"),
        ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern'"),
        ({"rank_pattern": {"(": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"q_proj": "big"}}, "'alpha_pattern'"),
        ({"alpha_pattern": {"*": 1}}, "'alpha_pattern'"),
        ({"alpha_pattern": 7}, "'alpha_pattern'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": 3}, "only LORA is served"),
        ({"peft_type": None}, "only LORA is served"),
    ],
    ids=repr,
)
def test_malformed_values_in_the_configuration_are_refused(
    changes: dict[str, Any], text: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    refuse(folder, text, CONFIG_FILE if text[0] == "'" else "")


def test_a_configuration_without_rank_is_refused(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    refuse(folder, "'r'", CONFIG_FILE)


def test_without_alpha_pefts_default_counts(folder: Path) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    left = Module.load(folder, name="m", layers=LAYERS).deltas[LAST].left
    stored = load_file(folder / WEIGHTS_FILE)[f"base_model.model.{LAST}.lora_B.weight"]
    torch.testing.assert_close(left, stored * LoraConfig().lora_alpha / 4)
