"""Banks on disk: what is written is what is opened, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeroute.adapters.backbone import Backbone, checkpoint_files
from mergeroute.adapters.bank import Bank, BankModule, copy_files, new_bank, seal, write_bank
from mergeroute.adapters.digest import json_digest
from mergeroute.adapters.errors import BackboneError, BankError, ModuleError
from mergeroute.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, Module
from mergeroute.adapters.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RESERVED_NAMES,
    BackboneEntry,
)
from mergeroute.adapters.module_files import INT8_FILE, VECTORS_FILE

from ..tiny import make_model, make_module, make_rich_module, make_tokenizer


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """backbone/ and two module folders, a/ and b/. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("sources")
    model = make_model()
    model.save_pretrained(str(folder / "backbone"))
    make_tokenizer().save_pretrained(str(folder / "backbone"))
    for seed, name in enumerate(("a", "b")):
        make_module(model, name, seed=seed).save(folder / name)
    return folder


def modules_of(sources: Path) -> list[BankModule]:
    return [
        BankModule(
            "a", sources / "a", "Römische Zahlen 🐍", ("Write 14.", "XIV?"), {"steps": [1, 2.5]}
        ),
        BankModule("b", sources / "b"),
    ]


def write(sources: Path, target: Path, **changes: Any) -> Bank:
    arguments: dict[str, Any] = {
        "name": "zoo",
        "backbone": Backbone.open(sources / "backbone"),
        "modules": modules_of(sources),
        "write_router": lambda folder: (folder / "router.json").write_text('{"kind": "none"}'),
        **changes,
    }
    return write_bank(target, **arguments)


@pytest.fixture
def bank(sources: Path, tmp_path: Path) -> Path:
    """The folder of a sound bank, with room for a second one beside it."""
    write(sources, tmp_path / "bank")
    return tmp_path / "bank"


def edit_manifest(bank: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((bank / MANIFEST).read_text())
    edit(document)
    (bank / MANIFEST).write_text(json.dumps(document))


def refuse(bank: Path, *texts: str, verify: bool = True) -> None:
    with pytest.raises(BankError) as caught:
        Bank.open(bank, verify=verify)
    for text in texts:
        assert text in str(caught.value)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_opened(sources: Path, tmp_path: Path) -> None:
    written = write(sources, tmp_path / "deep" / "bank")
    opened = Bank.open(str(tmp_path / "deep" / "bank"))
    assert opened == written
    assert opened.name == "zoo"
    assert opened.digest.startswith("sha256:")
    assert opened.backbone.name == "backbone"
    assert opened.backbone.digest == Backbone.open(sources / "backbone").digest
    assert opened.backbone.digest == Backbone.open(opened.backbone.path).digest
    for found, given in zip(opened.modules, modules_of(sources), strict=True):
        assert dataclasses.replace(found, path=given.path) == given
    assert opened.router_path is not None
    assert (opened.router_path / "router.json").read_text() == '{"kind": "none"}'
    for path in opened.backbone.path.iterdir():
        assert path.read_bytes() == (sources / "backbone" / path.name).read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["bank"]


def test_modules_of_a_bank_load_and_keep_their_digest(bank: Path) -> None:
    opened = Bank.open(bank)
    model = make_model()
    for seed, entry in enumerate(opened.modules):
        module = opened.load(entry)
        assert module.name == entry.name
        assert module.digest == make_module(model, "any", seed=seed).digest
    assert opened.backbone.layers["model.layers.0.mlp.up_proj"] == (48, 32)
    assert "lm_head" not in opened.backbone.layers


def test_a_bank_can_be_moved(bank: Path, tmp_path: Path) -> None:
    before = Bank.open(bank)
    bank.rename(tmp_path / "elsewhere")
    after = Bank.open(tmp_path / "elsewhere")
    assert after.digest == before.digest
    assert after.load(after.modules[0]).digest


def test_equal_content_gives_equal_digests_and_equal_files(sources: Path, tmp_path: Path) -> None:
    one, other = write(sources, tmp_path / "one"), write(sources, tmp_path / "other")
    assert one.digest == other.digest
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_any_change_of_content_changes_the_digest(sources: Path, tmp_path: Path) -> None:
    a, b = modules_of(sources)
    other_backbone = tmp_path / "backbone"
    shutil.copytree(sources / "backbone", other_backbone)
    (other_backbone / "generation_config.json").write_text('{"eos_token_id": 7}')
    changes: list[dict[str, Any]] = [
        {},
        {"name": "zoo2"},
        {"modules": [a]},
        {"modules": [b, a]},
        {"modules": [a, dataclasses.replace(b, name="c")]},
        {"modules": [a, dataclasses.replace(b, path=a.path)]},
        {"modules": [dataclasses.replace(a, description="other"), b]},
        {"modules": [dataclasses.replace(a, samples=("XIV?",)), b]},
        {"modules": [dataclasses.replace(a, provenance={}), b]},
        {"write_router": None},
        {"write_router": lambda folder: (folder / "router.json").write_text("{}")},
        {"write_router": lambda folder: (folder / "other.json").write_text('{"kind": "none"}')},
        {"backbone": Backbone.open(other_backbone)},
        {"embed_backbone": False},
    ]
    digests = {write(sources, tmp_path / str(k), **c).digest for k, c in enumerate(changes)}
    assert len(digests) == len(changes)


def names_of_files() -> list[str]:
    backbone = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    modules = [f"modules/{m}/{file}" for m in "ab" for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return [*(f"backbone/{file}" for file in backbone), *modules, "router/router.json"]


def test_the_manifest_lists_every_file(bank: Path) -> None:
    listed = json.loads((bank / MANIFEST).read_text())["files"]
    assert set(listed) | {MANIFEST} == set(files_of(bank))
    assert set(names_of_files()) <= set(listed)


@pytest.mark.parametrize("name", names_of_files())
def test_every_damage_to_every_file_is_found(name: str, bank: Path) -> None:
    path = bank / name
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refuse(bank, name, "digest", "copy the bank again")
    path.write_bytes(content[:-1])
    refuse(bank, name, f"{len(content):,}", f"{len(content) - 1:,}", verify=False)
    path.write_bytes(content + b" ")
    refuse(bank, name, "bytes")
    path.unlink()
    refuse(bank, name, "missing", verify=False)
    path.mkdir()
    refuse(bank, name, "missing")
    path.rmdir()
    path.write_bytes(content)
    Bank.open(bank)


def test_without_verification_only_sizes_are_checked(bank: Path) -> None:
    path = bank / "router" / "router.json"
    path.write_text('{"kind": "NONE"}')
    refuse(bank, "router.json")
    Bank.open(bank, verify=False)


def test_progress_names_every_file_once(bank: Path) -> None:
    told: list[str] = []
    Bank.open(bank, progress=told.append)
    assert sorted([*told, MANIFEST]) == sorted(files_of(bank))


def test_a_folder_without_manifest_is_no_bank(bank: Path, tmp_path: Path) -> None:
    (bank / MANIFEST).unlink()
    refuse(bank, str(bank), "no bank", MANIFEST)
    refuse(tmp_path / "nowhere", "nowhere", "no bank")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_manifest_is_refused(share: float, bank: Path) -> None:
    text = (bank / MANIFEST).read_text().rstrip()
    (bank / MANIFEST).write_text(text[: int(len(text) * share)])
    refuse(bank, MANIFEST, "damaged")


@pytest.mark.parametrize("content", ["[]", "null", "{}", '"mergeroute-bank"', '{"format": "zip"}'])
def test_another_json_file_is_no_manifest(content: str, bank: Path) -> None:
    (bank / MANIFEST).write_text(content)
    refuse(bank, MANIFEST, "mergeroute-bank")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000])
def test_garbage_is_no_manifest(content: bytes, bank: Path) -> None:
    (bank / MANIFEST).write_bytes(content)
    refuse(bank, MANIFEST, "damaged")


@pytest.mark.parametrize("version", [3, 99, "1", None, 1.5, True, 0, -1])
def test_other_versions_are_refused(version: object, bank: Path) -> None:
    edit_manifest(bank, lambda m: m.update(version=version))
    refuse(bank, f"version {version}")


def test_a_newer_version_asks_for_an_upgrade_whatever_else_it_holds(bank: Path) -> None:
    edit_manifest(bank, lambda m: (m.update(version=3, future={}), m.pop("files")))
    refuse(bank, "version 3", "upgrade mergeroute")


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["backbone"].update(extra=1), "backbone.extra"),
        (lambda m: m["modules"][1].update(extra=1), "modules.1.extra"),
        (lambda m: m["files"]["router/router.json"].update(extra=1), "files.router/router.json"),
        (lambda m: m.pop("name"), "name"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m.update(name="auto"), "name"),
        (lambda m: m["modules"][0].update(name="a b"), "modules.0.name"),
        (lambda m: m["modules"][0].update(folder="../a"), "modules.0.folder"),
        (lambda m: m["modules"][0].update(folder="/etc"), "modules.0.folder"),
        (lambda m: m["backbone"].update(folder="x/../../y"), "backbone.folder"),
        (lambda m: m.update(router=".."), "router"),
        (lambda m: m.update(router=""), "router"),
        (lambda m: m["files"].update({"../x": {"bytes": 0, "digest": ""}}), "../x"),
        (lambda m: m["files"].update({"a\\b": {"bytes": 0, "digest": ""}}), "a\\\\b"),
        (lambda m: m["files"]["router/router.json"].update(bytes=-1), "bytes"),
    ],
)
def test_a_manifest_with_unknown_or_dangerous_content_is_refused(
    edit: Callable[[dict[str, Any]], object], where: str, bank: Path
) -> None:
    edit_manifest(bank, edit)
    refuse(bank, MANIFEST, "damaged", where)


def test_two_modules_of_one_name_in_a_manifest_are_refused(bank: Path) -> None:
    edit_manifest(bank, lambda m: m["modules"][1].update(name="a"))
    refuse(bank, "'a'", "twice")


@pytest.mark.parametrize("gone", ["router/router.json", f"modules/a/{CONFIG_FILE}"])
def test_what_the_manifest_uses_it_must_list(gone: str, bank: Path) -> None:
    edit_manifest(bank, lambda m: m["files"].pop(gone))
    refuse(bank, gone.rsplit("/", 1)[0].split("/")[-1])


@pytest.mark.parametrize(
    "name",
    ["backbone/generation_config2.json", f"modules/a/{WEIGHTS_FILE}2", "router/more.json"],
)
def test_files_slipped_in_beside_those_listed_are_refused(name: str, bank: Path) -> None:
    (bank / name).write_text("{}")
    refuse(bank, name, "not in the manifest")


def test_a_readme_at_the_top_of_a_bank_is_allowed(bank: Path) -> None:
    (bank / "README.md").write_text("what this bank is for")
    Bank.open(bank)


def test_links_out_of_the_bank_are_refused(bank: Path, tmp_path: Path) -> None:
    inside, outside = bank / "router" / "router.json", tmp_path / "router.json"
    inside.rename(outside)
    inside.symlink_to(outside)
    refuse(bank, "router.json", "link out of the bank")
    inside.unlink()
    outside.rename(inside)
    (bank / "modules").rename(tmp_path / "modules")
    (bank / "modules").symlink_to(tmp_path / "modules")
    refuse(bank, "modules", "link out of the bank")


def test_a_link_to_a_bank_opens_what_it_points_to(bank: Path) -> None:
    (bank.parent / "current").symlink_to(bank)
    assert Bank.open(bank.parent / "current") == Bank.open(bank)


def test_a_router_that_writes_nothing_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no file of router"):
        write(sources, tmp_path / "bank", write_router=lambda folder: None)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_refused_and_untouched(sources: Path, bank: Path) -> None:
    before = files_of(bank)
    with pytest.raises(BankError, match="exists"):
        write(sources, bank, name="other")
    assert files_of(bank) == before
    (bank.parent / "file").write_text("mine")
    with pytest.raises(BankError, match="exists"):
        write(sources, bank.parent / "file")
    assert (bank.parent / "file").read_text() == "mine"


def test_force_replaces_and_leaves_nothing_beside(sources: Path, bank: Path) -> None:
    old = Bank.open(bank)
    (bank / "stray").write_text("of the old bank")
    new = write(sources, bank, name="other", force=True)
    assert new.digest != old.digest
    assert Bank.open(bank).name == "other"
    assert not (bank / "stray").exists()
    assert [path.name for path in bank.parent.iterdir()] == ["bank"]


def test_a_bank_can_replace_the_one_it_is_made_from(bank: Path) -> None:
    old = Bank.open(bank)
    new = write_bank(bank, name="half", backbone=old.backbone, modules=old.modules[:1], force=True)
    assert new.load(new.modules[0]).digest
    assert new.backbone.digest == old.backbone.digest


def _broken_router(folder: Path) -> None:
    (folder / "half.json").write_text("{")
    raise RuntimeError("the router broke")


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_while_writing_leaves_nothing_behind(
    force: bool, sources: Path, bank: Path
) -> None:
    before = files_of(bank.parent)
    target = bank if force else bank.parent / "new"
    with pytest.raises(RuntimeError, match="the router broke"):
        write(sources, target, write_router=_broken_router, force=force)
    assert files_of(bank.parent) == before
    assert [path.name for path in bank.parent.iterdir()] == ["bank"]


@pytest.mark.parametrize("embed_backbone", [True, False])
def test_a_checkpoint_that_changed_meanwhile_keeps_the_old_bank(
    embed_backbone: bool, sources: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = tmp_path_factory.mktemp("changing") / "backbone"
    shutil.copytree(sources / "backbone", checkpoint)
    backbone = Backbone.open(checkpoint)
    (checkpoint / "generation_config.json").write_text("{}")
    before = files_of(bank.parent)
    with pytest.raises(BankError, match=r"digest"):
        write(sources, bank, backbone=backbone, embed_backbone=embed_backbone, force=True)
    assert files_of(bank.parent) == before


@pytest.mark.parametrize("gone", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_incomplete_module_folder_is_refused(gone: str, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "a", tmp_path / "a")
    (tmp_path / "a" / gone).unlink()
    module = BankModule("a", tmp_path / "a")
    with pytest.raises(BankError, match=gone):
        write(sources, tmp_path / "bank", modules=[module])
    with pytest.raises(BankError, match=gone):
        Bank.adhoc("zoo", Backbone.open(sources / "backbone"), [module])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        *RESERVED_NAMES,
        "",
        ".",
        "..",
        "-a",
        ".a",
        "a/b",
        "../a",
        "a b",
        "a=b",
        "a,b",
        "a:b",
        "ä",
        "a" * 65,
        "a\n",
    ],
)
def test_names_that_requests_cannot_use_are_refused(
    name: str, sources: Path, tmp_path: Path
) -> None:
    a, b = modules_of(sources)
    backbone = Backbone.open(sources / "backbone")
    changed = [a, dataclasses.replace(b, name=name)]
    for arguments in ({"name": name}, {"modules": changed}):
        with pytest.raises(BankError, match="name"):
            write(sources, tmp_path / "bank", **arguments)
    with pytest.raises(BankError, match="name"):
        Bank.adhoc(name, backbone, [a])
    with pytest.raises(BankError, match="name"):
        Bank.adhoc("zoo", backbone, changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("twice", ["a", "zoo"])
def test_names_given_twice_are_refused(twice: str, sources: Path, tmp_path: Path) -> None:
    a, b = modules_of(sources)
    modules = [a, dataclasses.replace(b, name=twice)]
    with pytest.raises(BankError, match=f"'{twice}' is given twice"):
        write(sources, tmp_path / "bank", modules=modules)
    with pytest.raises(BankError, match=f"'{twice}' is given twice"):
        Bank.adhoc("zoo", Backbone.open(sources / "backbone"), modules)


@pytest.mark.parametrize("name", ["a", "A", "7b", "qwen3-0.6b_v1.2", "a" * 64, "router", "zoo."])
def test_ordinary_names_are_allowed(name: str, sources: Path, tmp_path: Path) -> None:
    module = dataclasses.replace(modules_of(sources)[0], name=name)
    bank = write(sources, tmp_path / "bank", modules=[module])
    assert bank.load(bank.modules[0]).name == name


def test_a_referenced_backbone_is_checked_by_digest(sources: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(sources / "backbone", checkpoint)
    write(sources, tmp_path / "bank", backbone=Backbone.open(checkpoint), embed_backbone=False)
    bank = Bank.open(tmp_path / "bank")
    assert not (tmp_path / "bank" / "backbone").exists()
    assert bank.backbone.path == checkpoint.resolve()
    assert bank.load(bank.modules[0]).digest
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(tmp_path / "bank", "checkpoint", "digest", "put the same checkpoint there")
    weights.write_bytes(content)
    Bank.open(tmp_path / "bank")
    shutil.rmtree(checkpoint)
    with pytest.raises(BackboneError, match="checkpoint"):
        Bank.open(tmp_path / "bank")


def test_a_reference_can_be_relative_to_the_bank(sources: Path, tmp_path: Path) -> None:
    write(sources, tmp_path / "bank", embed_backbone=False)
    shutil.copytree(sources / "backbone", tmp_path / "checkpoint")
    edit_manifest(tmp_path / "bank", lambda m: m["backbone"].update(reference="../checkpoint"))
    opened = Bank.open(tmp_path / "bank")
    assert opened.backbone.path == (tmp_path / "checkpoint").resolve()


def test_a_backbone_from_nowhere_is_refused(bank: Path) -> None:
    edit_manifest(bank, lambda m: m["backbone"].update(folder=None, reference=None))
    refuse(bank, "neither a backbone folder nor a reference")


def test_an_embedded_backbone_of_another_digest_is_refused(bank: Path) -> None:
    edit_manifest(bank, lambda m: m["backbone"].update(digest="sha256:0"))
    refuse(bank, "sha256:0")


def test_an_adhoc_bank_reads_folders_as_they_stand(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "b", tmp_path / "b")
    backbone = Backbone.open(sources / "backbone")
    modules = [BankModule("a", sources / "a"), BankModule("b", tmp_path / "b")]
    bank = Bank.adhoc("zoo", backbone, modules)
    assert bank.router_path is None
    assert [bank.load(module).name for module in bank.modules] == ["a", "b"]
    assert bank.digest == Bank.adhoc("zoo", backbone, modules).digest
    assert bank.digest != Bank.adhoc("zoo2", backbone, modules).digest
    assert bank.digest != Bank.adhoc("zoo", backbone, modules[:1]).digest
    make_module(make_model(), "b", seed=9).save(tmp_path / "b")
    assert bank.digest != Bank.adhoc("zoo", backbone, modules).digest
    assert not Bank.adhoc("bare", backbone, []).modules


def test_a_module_that_was_made_for_another_backbone_is_not_loaded(
    sources: Path, tmp_path: Path
) -> None:
    backbone = Backbone.open(sources / "backbone")
    module = make_module(make_model(), "a")
    for name, digest in (("a", backbone.weights_digest), ("b", "sha256:0")):
        dataclasses.replace(module, backbones=(digest,)).save(tmp_path / name)
    modules = [BankModule(name, tmp_path / name) for name in "ab"]
    for bank in (
        Bank.adhoc("zoo", backbone, modules),
        write(sources, tmp_path / "bank", modules=modules),
    ):
        assert bank.load(bank.modules[0]).backbones == (backbone.weights_digest,)
        with pytest.raises(
            ModuleError, match=r"'b' was made for weights sha256:0, those of .*back"
        ):
            bank.load(bank.modules[1])


# Checkpoint folders.


def test_pickles_are_not_copied(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "backbone", tmp_path / "backbone")
    (tmp_path / "backbone" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    backbone = Backbone.open(tmp_path / "backbone")
    assert backbone.digest == Backbone.open(sources / "backbone").digest
    write(sources, tmp_path / "bank", backbone=backbone)
    assert "backbone/pytorch_model.bin" not in files_of(tmp_path / "bank")


def test_a_backbone_is_named_by_its_folder_or_as_told(sources: Path, tmp_path: Path) -> None:
    assert Backbone.open(sources / "backbone").name == "backbone"
    assert Backbone.open(f"{sources}/backbone/").name == "backbone"
    assert Backbone.open(sources / "backbone", name="tiny").name == "tiny"
    (tmp_path / "link").symlink_to(sources / "backbone")
    assert Backbone.open(tmp_path / "link").path == (sources / "backbone").resolve()


def test_folders_that_are_no_checkpoint_are_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="neither a folder nor a hub id"):
        Backbone.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BackboneError, match="neither a folder nor a hub id"):
        Backbone.open(tmp_path / "file")
    with pytest.raises(BackboneError, match=r"no config\.json"):
        Backbone.open(tmp_path)
    with pytest.raises(BackboneError, match=r"nobody/nothing .* could not be fetched"):
        Backbone.open("nobody/nothing")
    shutil.copy(sources / "backbone" / "config.json", tmp_path)
    with pytest.raises(BackboneError, match=r"no \*\.safetensors"):
        Backbone.open(tmp_path)
    torch.save(make_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickled weights are never opened"):
        Backbone.open(tmp_path)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "unheard_of"}', '{"model_type": "t5"}', "{}"]
)
def test_a_config_of_no_causal_model_is_refused_when_layers_are_asked_for(
    config: str, sources: Path, tmp_path: Path
) -> None:
    shutil.copy(sources / "backbone" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(config)
    backbone = Backbone.open(tmp_path)
    with pytest.raises(BackboneError, match="no causal language model"):
        _ = backbone.layers


def test_the_loaded_module_is_the_one_that_was_verified(bank: Path) -> None:
    """A module is read from inside the bank, wherever the process stands."""
    here = os.getcwd()
    try:
        os.chdir(bank.parent)
        opened = Bank.open("bank")
        os.chdir("/")
        assert isinstance(opened.load(opened.modules[0]), Module)
    finally:
        os.chdir(here)


def test_an_interrupt_while_a_bank_is_replaced_keeps_the_old_one(
    sources: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(bank)
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == bank and ".old." not in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(sources, bank, name="other", force=True)
    assert files_of(bank) == before
    assert Bank.open(bank).name == "zoo"


def test_only_a_bank_is_replaced(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BankError, match="is no bank and will not be replaced"):
        write(sources, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


# Format 2: shared modules, recipes, sources, modules in int8 and with vectors.

_SHARED_RECIPE = {"name": "zoo", "base": "./base", "seed": 0}
_SOURCES = {"base": "sha256:1", "a": "sha256:2"}


def write_sealed(sources: Path, target: Path, changes: dict[str, Any] | None = None) -> Bank:
    """A bank with everything that format 1 had no place for."""
    backbone = Backbone.open(sources / "backbone")
    keys: dict[str, Any] = {"recipe": _SHARED_RECIPE, "sources": _SOURCES, **(changes or {})}
    with new_bank(target) as folder:
        copy_files(checkpoint_files(backbone.path), folder / "backbone")
        copy_files(list((sources / "a").iterdir()), folder / "modules" / "a")
        copy_files(list((sources / "b").iterdir()), folder / "shared")
        entry = BackboneEntry(name="base", folder="backbone", digest=backbone.digest)
        module = BankModule("a", folder / "modules" / "a")
        seal(folder, name="zoo", backbone=entry, modules=[module], **keys)
    return Bank.open(target)


@pytest.fixture
def sealed(sources: Path, tmp_path: Path) -> Path:
    write_sealed(sources, tmp_path / "sealed")
    return tmp_path / "sealed"


def test_a_sealed_folder_opens_with_its_shared_module_and_recipe(sealed: Path) -> None:
    opened = Bank.open(sealed)
    document = json.loads((sealed / MANIFEST).read_text())
    assert (document["version"], document["shared"]) == (FORMAT_VERSION, "shared")
    assert document["sources"] == _SOURCES
    assert opened.recipe == _SHARED_RECIPE
    assert opened.shared is not None
    assert opened.load(opened.shared).digest == make_module(make_model(), "b", seed=1).digest
    assert opened.router_path is None


def test_recipe_sources_and_shared_module_count_for_the_digest(
    sources: Path, sealed: Path, tmp_path: Path
) -> None:
    digests = {Bank.open(sealed).digest}
    changes: list[dict[str, Any]] = [
        {"recipe": {**_SHARED_RECIPE, "seed": 1}},
        {"recipe": None},
        {"sources": {**_SOURCES, "a": "sha256:3"}},
        {"sources": None},
    ]
    for k, change in enumerate(changes):
        digests.add(write_sealed(sources, tmp_path / str(k), change).digest)
    assert len(digests) == 5
    assert write_sealed(sources, tmp_path / "again").digest == Bank.open(sealed).digest
    edit_manifest(sealed, lambda m: m.update(shared=None))
    assert Bank.open(sealed).digest not in digests


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_every_damage_to_a_shared_module_is_found(name: str, sealed: Path) -> None:
    path = sealed / "shared" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(sealed, f"shared/{name}", "digest")
    path.unlink()
    refuse(sealed, f"shared/{name}", "missing", verify=False)
    path.write_bytes(content)
    (sealed / "shared" / "stray.safetensors").write_bytes(content)
    refuse(sealed, "stray.safetensors", "not in the manifest")


@pytest.mark.parametrize("shared", ["../b", "/etc", "", "nowhere"])
def test_a_shared_folder_elsewhere_is_refused(shared: str, sealed: Path) -> None:
    edit_manifest(sealed, lambda m: m.update(shared=shared))
    refuse(sealed, "shared" if shared != "nowhere" else "nowhere")


def as_format_1(folder: Path) -> dict[str, Any]:
    """Rewrite a manifest as the first format had it."""

    def edit(document: dict[str, Any]) -> None:
        document.update(version=1)
        for key in ("shared", "recipe", "sources"):
            document.pop(key)

    edit_manifest(folder, edit)
    document: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return document


def test_a_bank_of_format_1_opens_with_the_digest_it_had(bank: Path) -> None:
    document = as_format_1(bank)
    opened = Bank.open(bank)
    assert opened.digest == json_digest(document)
    assert (opened.shared, opened.recipe) == (None, None)
    demo = Path(__file__).parents[2] / "serving" / "demo_bank"
    stated = json.loads((demo / MANIFEST).read_text())
    if stated["version"] == 1:
        assert Bank.open(demo).digest == json_digest(stated)


def test_the_format_counts_for_the_digest(bank: Path) -> None:
    before = Bank.open(bank).digest
    as_format_1(bank)
    assert Bank.open(bank).digest != before


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_modules_keep_all_their_files_in_a_bank(
    dtype: torch.dtype, sources: Path, tmp_path: Path
) -> None:
    model = make_model()
    rich = make_rich_module(model, "rich")
    rich.save(tmp_path / "rich", dtype=dtype)
    stored = Module.read(tmp_path / "rich", name="rich")
    bank = write(sources, tmp_path / "bank", modules=[BankModule("rich", tmp_path / "rich")])
    (entry,) = bank.modules
    assert bank.load(entry).digest == stored.digest
    assert bank.load(entry).vectors.keys() == rich.vectors.keys()
    names = {file.name for file in entry.path.iterdir()}
    assert (VECTORS_FILE in names, INT8_FILE in names) == (True, dtype == torch.int8)
    for name in names:
        content = (entry.path / name).read_bytes()
        (entry.path / name).unlink()
        refuse(tmp_path / "bank", name, "missing")
        (entry.path / name).write_bytes(content)


def test_vectors_count_for_the_digest_of_an_adhoc_bank(sources: Path, tmp_path: Path) -> None:
    backbone, model = Backbone.open(sources / "backbone"), make_model()
    rich = make_rich_module(model, "m")
    rich.save(tmp_path / "one")
    vectors = {name: vector * 2 for name, vector in rich.vectors.items()}
    dataclasses.replace(rich, vectors=vectors).save(tmp_path / "other")
    digests = {
        Bank.adhoc("zoo", backbone, [BankModule("m", tmp_path / name)]).digest
        for name in ("one", "other")
    }
    assert len(digests) == 2


@pytest.mark.parametrize("depth", [1, 3])
def test_folders_on_the_way_are_removed_again(depth: int, sources: Path, tmp_path: Path) -> None:
    target = tmp_path.joinpath(*"xyz"[:depth], "bank")
    with pytest.raises(RuntimeError, match="the router broke"):
        write(sources, target, write_router=_broken_router)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    with pytest.raises(RuntimeError, match="the router broke"):
        write(sources, target, write_router=_broken_router)
    assert [path.name for path in tmp_path.rglob("*")] == ["x"]


def test_a_place_that_cannot_be_written_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match=r"file/bank cannot be written"):
        write(sources, tmp_path / "file" / "bank")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bank_can_be_read_by_others(bank: Path) -> None:
    """safetensors makes private files, and who builds is often not who serves."""
    assert {path.stat().st_mode & 0o777 for path in bank.rglob("*") if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (bank, *bank.rglob("*/"))} == {0o755}
