"""Module folders with embeddings, heads, vectors and int8 factors, against real PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import ModuleError
from mergeroute.adapters.lora import Module
from mergeroute.adapters.module_files import (
    CONFIG_FILE,
    INT8_FILE,
    VECTORS_FILE,
    WEIGHTS_FILE,
    dequantise,
    module_files,
    quantise,
)
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.merging import merge_into

from ..tiny import make_model, make_module, make_prompt, make_rich_module

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LAYER = "model.layers.1.mlp.up_proj"
TIED, UNTIED = make_model(tied=True), make_model(tied=False)
RICH = make_rich_module(UNTIED, "m")
PEFT_REMARKS = pytest.mark.filterwarnings(
    "ignore:The following alpha_pattern keys:RuntimeWarning",
    "ignore:Model has `tie_word:UserWarning",
    "ignore:Setting `save_embedding:UserWarning",
    "ignore:You have requested `ensure:UserWarning",
    "ignore:Found missing adapter keys:UserWarning",  # the tied head's, which are the embedding's
)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([make_prompt(20, seed=1)])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def merged(model: Any, module: Module) -> torch.Tensor:
    changed = copy.deepcopy(model)
    merge_into(changed, {"m": module}, Blend({"m": 1.0}))
    return logits_of(changed)


def train(model: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Save a PEFT model with random factors to the folder; its logits."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.mul_(0.1)
    peft_model.save_pretrained(str(folder))
    return logits_of(peft_model)


# PEFT's folders.


@PEFT_REMARKS
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["q_proj", "lm_head"], [EMBEDDING, "lm_head"]]
)
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_peft_adapters_of_embedding_and_head_change_the_logits_as_in_peft(
    targets: list[str], ensure: bool, tied: bool, tmp_path: Path
) -> None:
    model = TIED if tied else UNTIED
    options = {"alpha_pattern": {"embed_tokens": 2, "lm_head": 2}, "ensure_weight_tying": ensure}
    expected = train(model, tmp_path, target_modules=targets, **options)
    module = Module.load(tmp_path, name="m", layers=Shapes.of(model))
    torch.testing.assert_close(merged(model, module), expected, atol=1e-3, rtol=0)
    assert (expected - logits_of(model)).abs().max() > 1e-2


@PEFT_REMARKS
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize(("architecture", "target"), [("gpt2", "wte"), ("gpt_neox", "embed_in")])
def test_peft_ties_no_other_names_and_so_do_we(
    architecture: str, target: str, ensure: bool, tmp_path: Path
) -> None:
    model = make_model(architecture, tied=True)
    expected = train(model, tmp_path, target_modules=[target], ensure_weight_tying=ensure)
    module = Module.load(tmp_path, name="m", layers=Shapes.of(model))
    assert not module.ties_head
    torch.testing.assert_close(merged(model, module), expected, atol=1e-3, rtol=0)


@PEFT_REMARKS
def test_gemmas_scaled_embedding_is_as_in_peft(tmp_path: Path) -> None:
    model = make_model("gemma3", tied=True)
    expected = train(model, tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    module = Module.load(tmp_path, name="m", layers=Shapes.of(model))
    torch.testing.assert_close(merged(model, module), expected, atol=1e-3, rtol=0)


def without_vectors(module: Module) -> Module:
    return Module("m", module.deltas, {}, module.embeddings, module.ties_head)


@PEFT_REMARKS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ties_head", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_peft_reads_what_a_module_saves(
    architecture: str, ties_head: bool, tied: bool, tmp_path: Path
) -> None:
    model = make_model(architecture, tied=tied)
    module = without_vectors(make_rich_module(model, "m", ties_head=ties_head))
    module.save(tmp_path)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(peft_model), merged(model, module), atol=2e-3, rtol=1e-4)


def test_a_plain_modules_folder_is_pefts_byte_for_byte(tmp_path: Path) -> None:
    make_module(TIED, "m").save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    header = (tmp_path / WEIGHTS_FILE).read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header
    assert "ensure_weight_tying" not in json.loads((tmp_path / CONFIG_FILE).read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("ties_head", [False, True])
def test_what_a_module_stands_on_is_kept_and_counts_for_nothing(
    ties_head: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    module = make_rich_module(TIED, "m", ties_head=ties_head)
    backbones = ("sha256:1", "sha256:2")
    for folder, stated in (("one", backbones), ("other", backbones), ("plain", ())):
        replace(module, backbones=stated).save(tmp_path / folder, dtype=dtype)
    one, plain = (Module.read(tmp_path / f, name="m") for f in ("one", "plain"))
    assert (one.backbones, one.ties_head) == (backbones, ties_head)
    assert (plain.backbones, plain.ties_head) == ((), ties_head)
    assert one.digest == plain.digest
    for file in module_files(tmp_path / "one"):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_peft_reads_a_module_that_says_what_it_stands_on(tmp_path: Path) -> None:
    module = replace(make_module(UNTIED, "m"), backbones=("sha256:1",))
    module.save(tmp_path)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(UNTIED), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(peft_model), merged(UNTIED, module), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("ties_head", [False, True])
def test_folders_of_before_backbones_were_recorded_are_read(
    ties_head: bool, tmp_path: Path
) -> None:
    make_rich_module(TIED, "m").save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    save_file(load_file(path), path, metadata={"ties_head": str(ties_head).lower()})
    assert Module.read(tmp_path, name="m").ties_head == ties_head


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"backbones": 3}', "[" * 100_000])
def test_damaged_metadata_is_refused(text: str, tmp_path: Path) -> None:
    make_module(TIED, "m").save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    save_file(load_file(path), path, metadata={"mergeroute": text})
    with pytest.raises(ModuleError, match=r"adapter_model.*the metadata 'mergeroute' is damaged"):
        Module.read(tmp_path, name="m")


def test_a_plain_modules_digest_is_what_it_always_was() -> None:
    """Banks, prefix caches and routers keep digests: they must not change between releases."""
    deltas = {
        "model.layers.0.mlp.up_proj": LowRank(torch.ones(3, 2), torch.arange(8.0).view(2, 4)),
        "model.layers.0.mlp.down_proj": LowRank(torch.ones(4, 1), torch.full((1, 3), 0.5)),
    }
    assert Module("m", deltas).digest == PLAIN_DIGEST


PLAIN_DIGEST = "sha256:b882e4e34de973c91ce13add43881c7930f22b741df7bacc9ddcc1c12678ec4c"


# Our own folders.


@pytest.mark.parametrize("ties_head", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_save_and_load_keep_every_bit_and_the_digest(
    architecture: str, ties_head: bool, tmp_path: Path
) -> None:
    model = make_model(architecture)
    module = make_rich_module(model, "m", ties_head=ties_head)
    module.save(tmp_path)
    loaded = Module.load(tmp_path, name="other", layers=Shapes.of(model))
    assert loaded.digest == module.digest
    assert loaded.embeddings == module.embeddings
    assert loaded.ties_head == ties_head
    names = [file.name for file in module_files(tmp_path)]
    assert names == [CONFIG_FILE, WEIGHTS_FILE, VECTORS_FILE]


def test_the_digest_is_of_everything_that_a_module_changes() -> None:
    name = next(iter(RICH.vectors))
    moved = {**RICH.vectors, name: RICH.vectors[name] + 1e-6}
    variants = [
        RICH,
        without_vectors(RICH),
        Module("m", RICH.deltas, moved, RICH.embeddings),
        Module("m", RICH.deltas, RICH.vectors, RICH.embeddings, ties_head=False),
        Module("m", RICH.deltas, RICH.vectors),
    ]
    assert len({module.digest for module in variants}) == len(variants)
    assert (
        Module(
            "other", dict(reversed(list(RICH.deltas.items()))), RICH.vectors, RICH.embeddings
        ).digest
        == RICH.digest
    )


def test_saving_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    for module, dtype, files in (
        (RICH, torch.int8, [CONFIG_FILE, INT8_FILE, VECTORS_FILE]),
        (make_module(UNTIED, "m"), torch.float32, [CONFIG_FILE, WEIGHTS_FILE]),
        (make_module(UNTIED, "m"), torch.int8, [CONFIG_FILE, INT8_FILE]),
    ):
        module.save(tmp_path, dtype=dtype)
        assert [file.name for file in module_files(tmp_path)] == files
        assert len(list(tmp_path.iterdir())) == len(files)


def test_vectors_alone_make_a_module(tmp_path: Path) -> None:
    module = Module("m", {}, {"model.norm.weight": torch.ones(32)})
    for dtype in (torch.float32, torch.int8):
        module.save(tmp_path, dtype=dtype)
        loaded = Module.load(tmp_path, name="m", layers=Shapes.of(TIED))
        assert loaded.digest == module.digest
        assert loaded.rank == 0


def test_coverage_counts_embeddings_head_and_vectors() -> None:
    coverage = RICH.coverage(Shapes.of(UNTIED))
    assert (coverage.layers_matched, coverage.layers_total) == (20, 21)
    assert coverage.outer == (HEAD, EMBEDDING)
    assert coverage.vectors == len(RICH.vectors) == 7
    assert coverage.ranks == (4, 5)
    squares = [float(d.dense().double().square().sum()) for d in RICH.deltas.values()]
    squares += [float(v.double().square().sum()) for v in RICH.vectors.values()]
    assert coverage.effect == pytest.approx(sum(squares) ** 0.5, rel=1e-6)
    assert "20 of 21 layers and lm_head, model.embed_tokens" in str(coverage)
    assert "7 vectors" in str(coverage)


# int8.


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    dim=st.sampled_from([0, 1]),
)
def test_an_int8_entry_is_off_by_half_its_components_scale(
    seed: int, shape: tuple[int, int], size: float, dim: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(shape, generator=generator) * size
    factor *= torch.randint(0, 3, (shape[0], 1), generator=generator)  # zero rows too
    levels, scales = quantise(factor, dim=dim)
    assert levels.dtype == torch.int8
    assert scales.shape == (shape[dim],)
    for k in range(shape[dim]):
        component, back = (t.select(dim, k) for t in (factor, dequantise(levels, scales, dim=dim)))
        assert float(scales[k]) == pytest.approx(float(component.abs().max()) / 127, rel=2**-8)
        assert (back - component).abs().max() <= scales[k] * 0.5001


def test_int8_takes_a_quarter_of_the_bytes_and_changes_little(tmp_path: Path) -> None:
    plain = without_vectors(RICH)
    for name, dtype in (("full", torch.float32), ("int8", torch.int8)):
        plain.save(tmp_path / name, dtype=dtype)
    full, small = (tmp_path / "full" / WEIGHTS_FILE, tmp_path / "int8" / INT8_FILE)
    tensors = sum(t.nbytes for t in load_file(small).values())
    assert tensors < 0.32 * sum(t.nbytes for t in load_file(full).values())
    assert small.stat().st_size < full.stat().st_size
    loaded = Module.load(tmp_path / "int8", name="m", layers=Shapes.of(UNTIED))
    assert loaded.digest != plain.digest
    for layer, delta in plain.deltas.items():
        assert loaded.deltas[layer].left.dtype == torch.float32
        difference = (loaded.deltas[layer].dense() - delta.dense()).norm()
        assert difference < 0.015 * delta.norm()
    loaded.save(tmp_path / "again", dtype=torch.int8)
    assert (tmp_path / "again" / INT8_FILE).read_bytes() == small.read_bytes()


def test_zero_components_survive_int8(tmp_path: Path) -> None:
    left = torch.ones(48, 2)
    left[:, 1] = 0
    Module("m", {LAYER: LowRank(left, torch.ones(2, 32))}).save(tmp_path, dtype=torch.int8)
    delta = Module.read(tmp_path, name="m").deltas[LAYER]
    torch.testing.assert_close(delta.left, left, atol=0.5 / 127, rtol=0)
    assert not delta.left[:, 1].any()


# Damaged folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RICH.save(tmp_path, dtype=torch.int8)
    Module.load(tmp_path, name="m", layers=Shapes.of(UNTIED))
    return tmp_path


def refuse(folder: Path, *texts: str) -> None:
    with pytest.raises(ModuleError) as caught:
        Module.load(folder, name="m", layers=Shapes.of(UNTIED))
    for text in texts:
        assert text in str(caught.value)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_factors_in_both_files_are_refused(folder: Path) -> None:
    save_file({}, folder / WEIGHTS_FILE)
    refuse(folder, WEIGHTS_FILE, INT8_FILE, "remove one")
    with pytest.raises(ModuleError, match="remove one"):
        module_files(folder)


def test_factors_in_neither_file_are_refused(folder: Path) -> None:
    (folder / INT8_FILE).unlink()
    refuse(folder, f"holds no {WEIGHTS_FILE} and no {INT8_FILE}")
    with pytest.raises(ModuleError, match="holds no"):
        module_files(folder)


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(ModuleError, match=CONFIG_FILE):
        module_files(folder)


@pytest.mark.parametrize("name", [INT8_FILE, VECTORS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(name: str, share: float, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    refuse(folder, name, "damaged or truncated")


FACTOR = f"{LAYER}.lora_B"


@pytest.mark.parametrize(
    ("name", "tensor", "texts"),
    [
        (FACTOR, torch.ones(48, 4), [FACTOR, "torch.float32", "int8 matrix"]),
        (FACTOR, torch.ones(4, dtype=torch.int8), [FACTOR, "(4,)", "int8 matrix"]),
        (FACTOR, None, ["(180,)", "(176,)", "one scale per component"]),
        ("scales", None, ["'scales'", "missing", "incomplete"]),
        ("scales", torch.ones(3).bfloat16(), ["(3,)", "(180,)", "one scale per component"]),
        ("scales", torch.ones(180).half(), ["torch.float16", "bfloat16"]),
        ("scales", torch.full((180,), torch.inf).bfloat16(), ["NaN, inf", "damaged"]),
        ("scales", torch.full((180,), torch.nan).bfloat16(), ["NaN, inf", "damaged"]),
        ("scales", -torch.ones(180).bfloat16(), ["negative"]),
        (f"{LAYER}.bias", torch.ones(4), [f"{LAYER}.bias", "no int8 factor"]),
        (f"{EMBEDDING}.lora_A", torch.ones(5, 32, dtype=torch.int8), ["(180,)", "(185,)"]),
        (f"{EMBEDDING}.lora_embedding_A", torch.ones(5, 9, dtype=torch.int8), ["9 x 32"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_damaged_int8_files_are_refused(
    name: str, tensor: torch.Tensor | None, texts: list[str], folder: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    edit(folder / INT8_FILE, change)
    refuse(folder, *texts)


def test_one_layer_of_two_kinds_is_refused(folder: Path) -> None:
    extra = {
        f"{EMBEDDING}.lora_A": torch.ones(5, 32, dtype=torch.int8),
        "scales": torch.ones(185).bfloat16(),
    }
    edit(folder / INT8_FILE, lambda tensors: tensors.update(extra))
    refuse(folder, "twice", EMBEDDING)


@pytest.mark.parametrize(
    ("name", "tensor", "texts"),
    [
        ("model.norm.weight", torch.ones(2, 16), ["model.norm.weight", "(2, 16)", "vector"]),
        ("model.norm.weight", torch.ones(32, dtype=torch.int64), ["torch.int64", "floats"]),
        ("model.norm.weight", torch.ones(33), ["(33,)", "32 entries"]),
        ("model.norm.bias", torch.ones(32), ["model.norm.bias", "another base"]),
        ("model.norm.weight", torch.full((32,), torch.nan), ["NaN", "model.norm.weight"]),
        ("model.base_layer.weight", torch.ones(32), ["no parameter"]),
    ],
)
def test_damaged_vectors_are_refused(
    name: str, tensor: torch.Tensor, texts: list[str], folder: Path
) -> None:
    edit(folder / VECTORS_FILE, lambda tensors: tensors.update({name: tensor}))
    refuse(folder, *texts)


def test_other_storages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="int32"):
        RICH.save(tmp_path, dtype=torch.int32)
