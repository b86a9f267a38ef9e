"""Builds: a bank appears whole or not at all, and the same one every time."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.build import BuildTools, build
from mergeroute.adapters.errors import (
    BackboneError,
    BankError,
    CheckpointError,
    MergerouteError,
    ModuleError,
    RecipeError,
)
from mergeroute.adapters.lora import Module
from mergeroute.adapters.manifest import FORMAT_VERSION, MANIFEST, check_name
from mergeroute.adapters.recipe import Recipe

from ..experts import Zoo, blended, make_zoo, write_model
from ..tiny import make_model, make_rich_module

SUM = {"method": "task_arithmetic", "scale": 0.4}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"), make_model())


@pytest.fixture(scope="module")
def built(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build(recipe_of(zoo, "ac"), tmp_path_factory.mktemp("banks") / "bank")


def recipe_of(zoo: Zoo, names: str = "ac", **keys: Any) -> Recipe:
    return zoo.recipe(names, **{"backbone": SUM, "modules": {"rank": 3}, **keys})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(recipe: Recipe, folder: Path, kind: type[Exception], *texts: str, **keys: Any) -> None:
    """A build fails by name, and `folder` is as it was, whether a bank stood there or not."""
    before = files_of(folder)
    for target in (folder / "bank", folder / "deep" / "er" / "bank"):
        with pytest.raises(kind) as caught:
            build(recipe, target, force=True, **keys)
        for text in texts:
            assert text in str(caught.value)
    assert files_of(folder) == before
    assert {path.name for path in folder.iterdir()} == {Path(name).parts[0] for name in before}


@pytest.fixture
def beside(built: Bank, tmp_path: Path) -> Path:
    """A folder in which a bank stands already."""
    shutil.copytree(built.backbone.path.parent, tmp_path / "out" / "bank")
    return tmp_path / "out"


# What comes out.


def test_a_bank_holds_backbone_modules_recipe_and_sources(built: Bank, zoo: Zoo) -> None:
    folder = built.backbone.path.parent
    opened = Bank.open(folder)
    assert opened == built
    assert opened.name == "zoo"
    assert opened.backbone.name == "zoo-backbone"
    assert [module.name for module in opened.modules] == ["a", "c"]
    assert opened.recipe is not None
    assert Recipe.model_validate(opened.recipe) == recipe_of(zoo)
    document = json.loads((folder / MANIFEST).read_text())
    assert document["version"] == FORMAT_VERSION
    assert set(document["sources"]) == {"base", "a", "c"}
    assert len(set(document["sources"].values())) == 3
    assert all(value.startswith("sha256:") for value in document["sources"].values())
    for entry in opened.modules:
        assert entry.provenance["method"] == "svd"
        assert 0 < entry.provenance["error"] < 1


def test_descriptions_and_samples_reach_the_bank(zoo: Zoo, tmp_path: Path) -> None:
    entries = [e.model_dump() for e in recipe_of(zoo).experts]
    entries[0].update(description="Römische Zahlen", samples=["Write 14."])
    bank = build(recipe_of(zoo, experts=entries), tmp_path / "bank")
    assert bank.modules[0].description == "Römische Zahlen"
    assert bank.modules[0].samples == ("Write 14.",)


def test_the_backbone_is_a_plain_checkpoint_with_the_bases_tokenizer(built: Bank, zoo: Zoo) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(built.backbone.path)
    weights = blended(built, Blend())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.backbone.path)
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    names = {path.name for path in (zoo.folder / "base").iterdir()}
    assert {path.name for path in built.backbone.path.iterdir()} == names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_the_backbone_in_the_dtype_it_is_stored_in(
    dtype: str, tmp_path: Path
) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model().bfloat16())
    bank = build(recipe_of(zoo, "ab", dtype=dtype), tmp_path / "bank")
    model = transformers.AutoModelForCausalLM.from_pretrained(bank.backbone.path, dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_a_sharded_base_with_a_stored_copy_of_its_tied_head_is_built(tmp_path: Path) -> None:
    model = make_model(tied=True)
    zoo = make_zoo(tmp_path / "zoo", model)
    path = zoo.folder / "base" / "model.safetensors"
    tensors = load_file(path)
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, path, metadata={"format": "pt"})
    recipe = recipe_of(zoo, "ab", backbone={"method": "dare_linear", "density": 0.5})
    bank = build(recipe, tmp_path / "bank")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(bank.backbone.path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_without_modules_a_bank_is_static(zoo: Zoo, tmp_path: Path) -> None:
    bank = build(recipe_of(zoo, "ab", modules={"method": "none"}), tmp_path / "bank")
    assert not bank.modules
    assert not (tmp_path / "bank" / "modules").exists()


def test_progress_is_told_of_every_step(zoo: Zoo, tmp_path: Path) -> None:
    stages: dict[str, list[int]] = {}

    def progress(stage: str, total: int) -> Callable[[], None]:
        stages[stage] = [total, 0]

        def step() -> None:
            stages[stage][1] += 1

        return step

    recipe = recipe_of(zoo, kinds={"embedding": "svd", "head": "svd"})
    build(recipe, tmp_path / "bank", tools=BuildTools(progress=progress))
    assert list(stages) == ["experts", "backbone by task_arithmetic", "module a", "module c"]
    assert all(total == done > 0 for total, done in stages.values())


# The same recipe, the same bank.


@pytest.mark.parametrize(
    "keys",
    [
        {
            "names": "ab",
            "backbone": {"method": "dare_ties"},
            "modules": {"rank": 3, "dtype": "int8"},
        },
        {"names": "cd", "backbone": {"method": "lego", "rank": 2}, "shared": "module"},
        {"names": "ac", "kinds": {"norm": "exact", "embedding": "svd"}},
        {"names": "ab", "modules": {"method": "lego", "rank": 3}},
    ],
)
def test_two_builds_of_a_recipe_have_one_digest(
    keys: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    one, other = (build(recipe_of(zoo, **keys), tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_another_seed_is_another_bank_only_where_something_is_random(
    zoo: Zoo, tmp_path: Path
) -> None:
    def backbone(method: str, seed: int) -> str:
        recipe = recipe_of(zoo, "ab", backbone={"method": method}, seed=seed)
        return build(recipe, tmp_path / f"{method}{seed}").backbone.digest

    assert backbone("dare_linear", 0) != backbone("dare_linear", 1)
    assert backbone("ties", 0) == backbone("ties", 1)


# Nothing is left of what fails.


def entry(name: str, path: Path) -> dict[str, str]:
    return {"name": name, "path": str(path)}


def test_bad_experts_leave_nothing(zoo: Zoo, beside: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "qwen", make_model("qwen2"))
    write_model(tmp_path / "tied", make_model(tied=True))
    write_model(tmp_path / "vocabulary", make_model(vocab_size=310))
    write_model(tmp_path / "same", make_model())
    shutil.copytree(zoo.folder / "c", tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "lora" / "adapter_model.safetensors")
    wrong: Mapping[str, tuple[type[Exception], str]] = {
        "qwen": (BackboneError, "model_type"),
        "tied": (BackboneError, "tie_word_embeddings"),
        "vocabulary": (BackboneError, "vocab_size 310"),
        "same": (RecipeError, "equals the base"),
        "lora": (ModuleError, "NaN"),
        "nowhere": (BackboneError, "nowhere"),
    }
    for name, (kind, text) in wrong.items():
        recipe = recipe_of(zoo, experts=[entry("a", zoo.folder / "a"), entry("x", tmp_path / name)])
        refuse(recipe, beside, kind, "'x'", text)


@pytest.mark.parametrize("stage", ["experts", "backbone by task_arithmetic", "module a"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_at_any_time_leaves_nothing(
    error: type[BaseException], stage: str, zoo: Zoo, beside: Path
) -> None:
    def progress(name: str, _total: int) -> Callable[[], None]:
        steps = iter(range(3))

        def step() -> None:
            if name == stage and next(steps) == 1:
                raise error("stop")

        return step

    before = files_of(beside)
    for force, target in ((True, beside / "bank"), (False, beside / "new" / "bank")):
        with pytest.raises(error, match="stop"):
            build(recipe_of(zoo), target, force=force, tools=BuildTools(progress=progress))
        assert files_of(beside) == before
        assert [path.name for path in beside.iterdir()] == ["bank"]


def test_a_router_that_fails_leaves_nothing(zoo: Zoo, beside: Path) -> None:
    def write_router(_backbone: Path, folder: Path) -> None:
        (folder / "router.json").write_text("{")
        raise BankError("no router")

    recipe = recipe_of(zoo, router={"scorer": "fixed", "blend": "a=1"})
    refuse(recipe, beside, BankError, "no router", tools=BuildTools(write_router=write_router))
    refuse(recipe, beside, RecipeError, "mergeroute build")


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.02, 0.9, 1.01])
def test_a_full_disk_leaves_nothing(share: float, zoo: Zoo, beside: Path) -> None:
    """The limit is met by the other files, in the backbone, and in a module larger than it."""
    backbone = (zoo.folder / "base" / "model.safetensors").stat().st_size
    kinds = {"embedding": "svd", "head": "svd"}
    recipe = recipe_of(zoo, modules={"rank": 32, "dtype": "float32"}, kinds=kinds)
    with largest_file(int(share * backbone)):
        refuse(recipe, beside, MergerouteError, "cannot be written")


def test_an_existing_target_is_refused_before_anything_is_read(zoo: Zoo, beside: Path) -> None:
    recipe = recipe_of(zoo, base="/nowhere")
    before = files_of(beside)
    with pytest.raises(BankError, match="exists: choose another folder"):
        build(recipe, beside / "bank")
    (beside / "thesis").mkdir()
    (beside / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BankError, match="is no bank and will not be replaced"):
        build(recipe, beside / "thesis", force=True)
    with pytest.raises(BankError, match="is no bank"):
        build(recipe, beside / "thesis" / "chapter.txt", force=True)
    shutil.rmtree(beside / "thesis")
    assert files_of(beside) == before


def test_force_replaces_a_bank_whole(zoo: Zoo, beside: Path) -> None:
    (beside / "bank" / "stray").write_text("of the old bank")
    bank = build(recipe_of(zoo, name="other"), beside / "bank", force=True)
    assert Bank.open(beside / "bank") == bank
    assert bank.name == "other"
    assert not (beside / "bank" / "stray").exists()
    assert [path.name for path in beside.iterdir()] == ["bank"]


def test_a_place_that_cannot_be_written_is_named(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match=r"file/bank cannot be written"):
        build(recipe_of(zoo), tmp_path / "file" / "bank")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_named(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(BankError, match="cannot be written"):
        build(recipe_of(zoo), tmp_path / "locked" / "bank")


# Names.


@pytest.mark.parametrize("backbone", [SUM, {"method": "none"}])
@pytest.mark.parametrize(
    ("folder", "bank", "expert"),
    [
        ("a", "zoo", "a"),
        ("zoo", "zoo", "a"),
        ("auto", "zoo", "a"),
        ("blend", "zoo", "blend-backbone"),
        ("plain", "zoo", "zoo-backbone"),
        ("my base", "zoo", "my-base"),
        ("plain", "z" * 64, "a"),
        ("p" * 70, "zoo", "p" * 64),
    ],
)
def test_whatever_base_bank_and_expert_are_called_the_bank_is_served(
    folder: str, bank: str, expert: str, backbone: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    (tmp_path / folder).symlink_to(zoo.folder / "base")
    experts = [entry(expert, zoo.folder / "c"), entry("d", zoo.folder / "d")]
    keys: dict[str, Any] = {
        "name": bank,
        "base": str(tmp_path / folder),
        "experts": experts,
    }
    built = build(recipe_of(zoo, backbone=backbone, **keys), tmp_path / "out")
    names = [built.name, built.backbone.name, *(module.name for module in built.modules), "auto"]
    assert len(set(names)) == len(names)
    assert check_name(built.backbone.name) == built.backbone.name
    if (folder, bank) == ("plain", "zoo") and backbone["method"] == "none":
        assert built.backbone.name == "plain"


def test_experts_of_a_static_bank_leave_names_to_the_backbone(zoo: Zoo, tmp_path: Path) -> None:
    experts = [entry("zoo-backbone", zoo.folder / "a")]
    bank = build(recipe_of(zoo, experts=experts, modules={"method": "none"}), tmp_path / "bank")
    assert bank.backbone.name == "zoo-backbone"


# What an expert changes, and the recipe leaves out.


def test_an_expert_that_changes_only_what_is_left_out_is_refused(
    zoo: Zoo, beside: Path, tmp_path: Path
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    write_model(tmp_path / "normed", model)
    module = make_rich_module(make_model(), "r")
    Module("r", {}, {"model.norm.weight": module.vectors["model.norm.weight"]}).save(tmp_path / "r")
    none = {"method": "none"}
    left_out: list[dict[str, Any]] = [
        {"kinds": {"norm": "drop"}},
        {"backbone": none},
        {"backbone": none, "kinds": {"norm": "drop"}},
    ]
    for folder in ("normed", "r"):
        experts = [entry("x", tmp_path / folder), entry("a", zoo.folder / "a")]
        for keys in left_out:
            recipe = recipe_of(zoo, experts=experts, **keys)
            texts = ("'x'", "leaves out", "'model.norm.weight' of kind norm", "under kinds")
            refuse(recipe, beside, RecipeError, *texts)
        kept = recipe_of(zoo, experts=experts, backbone=none, kinds={"norm": "exact"})
        assert build(kept, tmp_path / f"{folder}-kept").modules
    merged = recipe_of(zoo, experts=[entry("x", tmp_path / "normed")], modules=none)
    assert build(merged, tmp_path / "merged").backbone


# Shared modules.


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ({"names": "cd", "backbone": {"method": "none"}}, ("needs a merge",)),
        ({"names": "cd", "backbone": {"method": "ties"}}, ("ties", "dense", "shared: folded")),
        ({"names": "ac"}, ("task_arithmetic", "dense")),
        (
            {"names": "cd", "backbone": {**SUM, "lines": {"alpha": 0, "beta": 0}}},
            ("would change nothing",),
        ),
    ],
)
def test_a_shared_module_that_would_be_none_is_refused(
    keys: dict[str, Any], texts: tuple[str, ...], zoo: Zoo, beside: Path
) -> None:
    refuse(recipe_of(zoo, shared="module", **keys), beside, RecipeError, "shared: module", *texts)


def test_a_shared_module_counts_for_the_digest_and_is_checked(zoo: Zoo, tmp_path: Path) -> None:
    bank = build(recipe_of(zoo, "cd", shared="module"), tmp_path / "bank")
    assert bank.shared is not None
    assert bank.load(bank.shared).deltas
    folded = build(recipe_of(zoo, "cd"), tmp_path / "folded")
    assert folded.shared is None
    assert folded.digest != bank.digest
    path = bank.shared.path / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BankError, match="shared/adapter_model"):
        Bank.open(tmp_path / "bank")


# What needs a model to be run.


def test_what_looks_at_data_needs_the_tools_for_it(zoo: Zoo, beside: Path) -> None:
    recipe = recipe_of(zoo, backbone={"method": "regmean"}, calibration="/prompts.jsonl")
    refuse(recipe, beside, RecipeError, "calibration prompts", "mergeroute build")


def test_a_source_that_vanishes_meanwhile_is_reported(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    moved = dataclasses.replace(zoo, folder=tmp_path / "zoo")

    def progress(name: str, _total: int) -> Callable[[], None]:
        if name.startswith("module"):
            shutil.rmtree(tmp_path / "zoo" / "a")
        return lambda: None

    with pytest.raises(CheckpointError, match="cannot be read"):
        build(recipe_of(moved, "ab"), tmp_path / "bank", tools=BuildTools(progress=progress))
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
