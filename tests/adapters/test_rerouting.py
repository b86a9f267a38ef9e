"""A bank with another router: everything else as it was, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.errors import BankError
from mergeroute.adapters.rerouting import with_router

from ..tiny import make_model, make_module, make_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_module(make_model(), "a", seed=1).save(tmp_path / "lora")
    module = BankModule("a", tmp_path / "lora", "what it is for", ("a sample",), {"made_by": "me"})
    write_bank(
        tmp_path / "bank",
        name="zoo",
        backbone=Backbone.open(tmp_path / "base"),
        modules=[module],
        write_router=lambda folder: write(folder, "old"),
        embed_backbone=True,
    )
    return tmp_path / "bank"


def write(folder: Path, text: str) -> None:
    (folder / "router.json").write_text(text)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }


def test_only_the_router_differs(path: Path, tmp_path: Path) -> None:
    seen: list[Bank] = []

    def write_router(bank: Bank, folder: Path) -> None:
        seen.append(bank)
        write(folder, "new")

    bank = with_router(path, tmp_path / "new", write_router=write_router)
    before = Bank.open(path)
    assert seen == [before]
    assert contents(tmp_path / "new") == {**contents(path), "router/router.json": b"new"}
    assert bank.digest != before.digest
    assert (bank.name, bank.backbone.digest) == (before.name, before.backbone.digest)
    assert [(m.name, m.description, m.samples, m.provenance) for m in bank.modules] == [
        (m.name, m.description, m.samples, m.provenance) for m in before.modules
    ]
    renamed = with_router(path, tmp_path / "b", write_router=write_router, name="other")
    assert Bank.open(tmp_path / "b").name == renamed.name == "other"


def test_a_backbone_elsewhere_stays_there(path: Path, tmp_path: Path) -> None:
    referring = write_bank(
        tmp_path / "small",
        name="zoo",
        backbone=Backbone.open(tmp_path / "base"),
        modules=[],
        embed_backbone=False,
    )
    bank = with_router(tmp_path / "small", tmp_path / "new", write_router=lambda _, f: write(f, ""))
    assert bank.backbone.path == referring.backbone.path
    assert not (tmp_path / "new" / "backbone").exists()


def test_a_bank_is_never_written_into_itself(path: Path, tmp_path: Path) -> None:
    for out in (path, path / "deep", tmp_path / "x" / ".." / "bank"):
        with pytest.raises(BankError, match="banks do not change"):
            with_router(path, out, write_router=lambda _, f: write(f, "new"), force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(BankError, match="is no bank and will not be replaced"):
        with_router(path, tmp_path / "mine", write_router=lambda _, f: write(f, ""), force=True)
    assert contents(path)["router/router.json"] == b"old"


def test_a_router_that_cannot_be_written_leaves_nothing(path: Path, tmp_path: Path) -> None:
    def fail(_bank: Bank, _folder: Path) -> None:
        raise BankError("no router")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(BankError, match="no router"):
        with_router(path, tmp_path / "deep" / "new", write_router=fail)
    assert sorted(tmp_path.iterdir()) == before
