"""Folding banks on disk: what is merged, what is carried over, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, copy_files, new_bank, seal, write_bank
from mergeroute.adapters.errors import BankError, ModuleError
from mergeroute.adapters.fold import fold, stored_dtype
from mergeroute.adapters.fold_settings import FoldSettings
from mergeroute.adapters.lora import Module
from mergeroute.adapters.manifest import BackboneEntry, read_manifest
from mergeroute.adapters.module_files import module_files
from mergeroute.adapters.pool import FoldMethod, merge_modules, relative_error
from mergeroute.adapters.ranks import component_bytes

from ..tiny import make_model, make_module, make_tokenizer

MODEL = make_model()
METHODS = get_args(FoldMethod)


@dataclass
class Renaming:
    """Stands where the router's own renaming does, and remembers."""

    names: dict[str, str] = field(default_factory=dict)

    def __call__(self, folder: Path, names: Mapping[str, str]) -> None:
        assert (folder / "router.json").read_text() == "{}"
        self.names = dict(names)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    MODEL.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Backbone.open(folder)


def entries(folder: Path, modules: Sequence[Module]) -> list[BankModule]:
    """Module folders, with a description, a sample and a provenance each."""
    found = []
    for module in modules:
        path = folder / module.name
        module.save(path, base="the-base", dtype=torch.bfloat16)
        found.append(
            BankModule(
                module.name, path, f"for {module.name}", (f"ask {module.name}",), {"from": "test"}
            )
        )
    return found


def pool() -> list[Module]:
    """b, and a twice."""
    a, b = make_module(MODEL, "a", seed=1), make_module(MODEL, "b", seed=2)
    return [b, a, replace(a, name="copy")]


def write_pool(folder: Path, backbone: Backbone, modules: Sequence[Module]) -> Path:
    def write_router(path: Path) -> None:
        (path / "router.json").write_text("{}")

    write_bank(
        folder / "bank",
        name="zoo",
        backbone=backbone,
        modules=entries(folder / "loras", modules),
        write_router=write_router,
    )
    return folder / "bank"


@pytest.fixture
def bank(backbone: Backbone, tmp_path: Path) -> Path:
    return write_pool(tmp_path, backbone, pool())


def folded(bank: Path, *, out: str = "out", **settings: Any) -> Bank:
    return fold(bank, bank.parent / out, FoldSettings(**settings), rename=Renaming())


@pytest.mark.parametrize("method", METHODS)
def test_duplicates_collapse_and_the_rest_stays_as_it_is(bank: Path, method: FoldMethod) -> None:
    renaming = Renaming()
    out = fold(bank, bank.parent / "out", FoldSettings(to=2, method=method), rename=renaming)
    assert renaming.names == {"a": "a.copy", "copy": "a.copy"}
    b, merged = out.modules
    assert (b.name, merged.name) == ("b", "a.copy")
    before = Bank.open(bank)
    assert (b.description, b.samples, b.provenance) == ("for b", ("ask b",), {"from": "test"})
    for one, other in zip(module_files(b.path), module_files(before.modules[0].path), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert merged.description == "for a; for copy"
    assert merged.samples == ("ask a", "ask copy")
    stored = out.load(merged)
    a = before.load(before.modules[1])
    assert relative_error(stored, a, out.backbone.shapes) < 0.004  # bfloat16, as a is stored
    report = merged.provenance
    assert [member["name"] for member in report["members"]] == ["a", "copy"]
    assert [m["provenance"] for m in report["members"]] == [{"from": "test"}] * 2
    assert report["error"] == max(member["error"] for member in report["members"]) < 0.004
    assert (report["method"], report["folded_by"], report["dtype"]) == ("fold", method, "bfloat16")
    assert report["fold"] == {"to": 2, "method": method, "bank": before.digest}
    config = json.loads(module_files(merged.path)[0].read_text())
    assert config["base_model_name_or_path"] == "the-base"


def test_groups_of_duplicates_lose_nothing(backbone: Backbone, tmp_path: Path) -> None:
    modules: list[BankModule] = []
    for name in "ab":
        module = make_module(MODEL, name, seed=len(modules))
        for copy in "xy":
            path = tmp_path / "loras" / f"{name}-{copy}"
            module.save(path)
            modules.append(BankModule(path.name, path))
    write_bank(tmp_path / "bank", name="zoo", backbone=backbone, modules=modules)
    out = folded(tmp_path / "bank", to=2)
    assert [module.name for module in out.modules] == ["a-x.a-y", "b-x.b-y"]
    assert out.router_path is None
    for merged in out.modules:
        assert merged.provenance["error"] < 1e-5
        assert stored_dtype(merged.path) == "float32"


def test_tasks_are_found_however_often_their_modules_were_folded(
    backbone: Backbone, tmp_path: Path
) -> None:
    modules = [make_module(MODEL, name, seed=k) for k, name in enumerate("abcd")]
    write_pool(tmp_path, backbone, modules)
    chain: list[dict[str, Any]] = [{"to": 3}, {"to": 2}, {"nbytes": 20_000}, {"nbytes": 10_000}]
    source, own = tmp_path / "bank", {name: name for name in "abcd"}
    for step, settings in enumerate(chain):
        before = Bank.open(source)
        out = folded(source, out=f"out-{step}", **settings)
        source = tmp_path / f"out-{step}"
        for task, old in own.items():
            module = out.module_of(task)
            assert module is not None
            assert set(old.split(".")) <= set(module.name.split("."))
            assert out.module_of(old) == module
            own[task] = module.name
        assert before.digest in {m.provenance.get("fold", {}).get("bank") for m in out.modules}
        assert out.module_of("nobody") is None
    assert set(own.values()) == {module.name for module in out.modules}
    assert len(out.modules) == 2


def test_the_order_of_modules_and_another_run_change_nothing(
    backbone: Backbone, tmp_path: Path
) -> None:
    modules = [make_module(MODEL, name, seed=k) for k, name in enumerate("abcd")]
    found = []
    for k, order in enumerate((modules, modules, modules[::-1])):
        out = folded(write_pool(tmp_path / str(k), backbone, order), to=2)
        found.append({module.name: out.load(module).digest for module in out.modules})
    assert found[0] == found[1] == found[2]
    first, second = (Bank.open(tmp_path / str(k) / "out") for k in (0, 1))
    assert first.digest == second.digest


def test_backbone_shared_module_recipe_and_sources_are_carried_over(
    backbone: Backbone, tmp_path: Path
) -> None:
    modules = entries(tmp_path / "loras", pool())
    with new_bank(tmp_path / "bank") as folder:
        for module in modules:
            copy_files(module_files(module.path), folder / "modules" / module.name)
        make_module(MODEL, "shared", seed=7).save(folder / "shared")
        shutil.copytree(backbone.path, tmp_path / "base")
        entry = BackboneEntry(name="tiny", reference=str(backbone.path), digest=backbone.digest)
        seal(
            folder,
            name="zoo",
            backbone=entry,
            modules=modules,
            recipe={"seed": 3},
            sources={"base": "sha256:0"},
        )
    before = Bank.open(tmp_path / "bank")
    cases: list[dict[str, Any]] = [{"to": 1}, {"nbytes": 30_000, "name": "small"}]
    for settings in cases:
        out = folded(tmp_path / "bank", out=str(settings), **settings)
        assert out.name == settings.get("name", "zoo")
        assert out.backbone.digest == backbone.digest
        assert out.backbone.path == backbone.path
        assert out.recipe == {"seed": 3}
        assert read_manifest(tmp_path / str(settings)).sources == {"base": "sha256:0"}
        assert out.shared is not None
        assert before.shared is not None
        assert out.load(out.shared).digest == before.load(before.shared).digest


def test_a_backbone_beside_the_bank_is_found_from_elsewhere(
    backbone: Backbone, tmp_path: Path
) -> None:
    modules = entries(tmp_path / "loras", pool())
    shutil.copytree(backbone.path, tmp_path / "base")
    with new_bank(tmp_path / "bank") as folder:
        for module in modules:
            copy_files(module_files(module.path), folder / "modules" / module.name)
        entry = BackboneEntry(name="tiny", reference="../base", digest=backbone.digest)
        seal(folder, name="zoo", backbone=entry, modules=modules)
    out = folded(tmp_path / "bank", out="deep/down/out", to=2)
    assert out.backbone.path == tmp_path / "base"


def test_a_budget_is_kept_over_modules_of_all_dtypes(backbone: Backbone, tmp_path: Path) -> None:
    modules = []
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    for seed, (name, dtype) in enumerate(dtypes.items()):
        path = tmp_path / "loras" / name
        make_module(MODEL, name, rank=8, seed=seed).save(path, dtype=dtype)
        modules.append(BankModule(name, path, provenance={"from": "test"}))
    write_bank(tmp_path / "bank", name="zoo", backbone=backbone, modules=modules)
    out = folded(tmp_path / "bank", nbytes=40_000)
    taken = 0
    for module in out.modules:
        assert stored_dtype(module.path) == module.name == module.provenance["dtype"]
        loaded = out.load(module)
        own = (component_bytes(d.shape, module.name) * d.rank for d in loaded.deltas.values())
        taken += sum(own)
        assert 0 < module.provenance["error"] < 1
        assert module.provenance["before"] == {"from": "test"}
        digest = Bank.open(tmp_path / "bank").digest
        assert module.provenance["fold"] == {"bytes": 40_000, "method": "svd", "bank": digest}
        low, high = module.provenance["ranks"]
        assert high - low <= 1
    assert 0.9 * 40_000 <= taken <= 40_000


def test_modules_that_are_used_least_become_one(backbone: Backbone, tmp_path: Path) -> None:
    """What is used most stays as it is, and what is never used counts a hundredth."""
    modules = [make_module(MODEL, name, seed=k) for k, name in enumerate("abc", 3)]
    bank = write_pool(tmp_path, backbone, modules)
    joined, kept = folded(bank, to=2, usage={"a": 3.0, "b": 9.0}).modules
    assert (kept.name, kept.provenance) == ("b", {"from": "test"})
    report = {member["name"]: member for member in joined.provenance["members"]}
    assert (report["a"]["share"], report["c"]["share"]) == (0.25, 0.01)
    assert report["a"]["error"] < 0.1 < 0.9 < report["c"]["error"]


def test_copies_become_one_however_much_they_are_used(bank: Path) -> None:
    usage = {"a": 60.0, "copy": 40.0, "b": 1.0}
    assert [m.name for m in folded(bank, to=2, usage=usage).modules] == ["b", "a.copy"]


def test_usage_of_all_alike_weighs_nothing(bank: Path) -> None:
    """A group's module is the plain mean."""
    names = ("a", "b", "copy")
    plain = folded(bank, to=1)
    used = folded(bank, out="used", to=1, usage=dict.fromkeys(names, 5.0))
    one, other = (found.load(found.modules[0]) for found in (plain, used))
    assert relative_error(other, one, plain.backbone.shapes) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_fewer_modules_fit_into_bytes_together(
    backbone: Backbone, tmp_path: Path, method: FoldMethod
) -> None:
    modules = [make_module(MODEL, name, seed=k) for k, name in enumerate("abc", 3)]
    bank = write_pool(tmp_path, backbone, modules)
    few = folded(bank, to=2, method=method, nbytes=10**9)
    sizes = [stored(few.load(module)) for module in few.modules]
    half = folded(bank, out="half", to=2, method=method, nbytes=sum(sizes) // 2)
    assert [m.name for m in half.modules] == [m.name for m in few.modules]
    assert 0.4 * sum(sizes) < sum(stored(half.load(m)) for m in half.modules) <= sum(sizes) // 2
    report = half.modules[0].provenance["fold"]
    assert (report["to"], report["bytes"]) == (2, sum(sizes) // 2)


def test_bytes_that_allow_it_keep_the_mean_of_modules_whole(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Beyond the rank of one member."""
    modules = [make_module(MODEL, name, seed=k) for k, name in enumerate("ab", 3)]
    bank = write_pool(tmp_path, backbone, modules)
    (whole,) = folded(bank, to=1, nbytes=10**9).modules
    (cut,) = folded(bank, out="cut", to=1).modules
    mean = merge_modules(modules, name="a.b", shapes=backbone.shapes, method="svd", keeps_rank=True)
    shapes = backbone.shapes
    assert relative_error(Module.read(whole.path, name="a.b"), mean, shapes) < 0.005
    assert relative_error(Module.read(cut.path, name="a.b"), mean, shapes) > 0.1


def stored(module: Module) -> int:
    """Bytes of a module's factors in bfloat16."""
    return sum(component_bytes(d.shape, "bfloat16") * d.rank for d in module.deltas.values())


@pytest.mark.parametrize(("one", "other"), [("a" * 40, "b" * 40), ("x", "y")])
def test_names_that_are_too_long_or_taken_are_numbered(
    one: str, other: str, backbone: Backbone, tmp_path: Path
) -> None:
    first = make_module(MODEL, one, seed=1)
    others = [make_module(MODEL, name, seed=k) for k, name in enumerate(("fold-1", "x.y"), 5)]
    bank = write_pool(tmp_path, backbone, [*others, first, replace(first, name=other)])
    assert [m.name for m in folded(bank, to=3).modules] == ["fold-1", "x.y", "fold-2"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": 3}, "3 is out of range: bank 'zoo' has 3 modules, so fold it to 1 to 2"),
        ({"to": 0}, "0 is out of range"),
        ({"nbytes": 100}, "100 bytes are too little for 3 modules: rank 1 takes"),
        ({"nbytes": 10**9}, "fit 1,000,000,000 as they are"),
        ({}, "fold to a number of modules, into a number of bytes, or both"),
        ({"to": 2, "nbytes": 100}, "100 bytes are too little for 2 modules"),
        ({"nbytes": 10**4, "usage": {"a": 1.0}}, "by bytes alone nothing is"),
        ({"to": 2, "usage": {"a": 1.0}, "method": "lego"}, "lego clusters units without weights"),
        ({"to": 2, "usage": {"a": -1.0}}, "the usage of 'a' is -1.0"),
        ({"to": 2, "usage": {"a": 10**400}}, "the usage of 'a' is 10000000000000000000: it is"),
        ({"to": 2, "usage": {"a": 0.0}}, "no module was used"),
        ({"to": 2, "usage": {"c": 1.0}}, "'c', which is no module of bank 'zoo': b, a, copy"),
        ({"to": 2, "name": "a b"}, "'a b' is not allowed"),
        ({"to": 2, "name": "b"}, "'b' is given twice"),
    ],
)
def test_what_cannot_be_folded_leaves_nothing_behind(
    settings: dict[str, Any], words: str, bank: Path
) -> None:
    with pytest.raises(BankError, match=words):
        folded(bank, **settings)
    assert sorted(path.name for path in bank.parent.iterdir()) == ["bank", "loras"]


def test_places_that_are_taken_are_refused(bank: Path) -> None:
    before = Bank.open(bank).digest
    for out in ("bank", "bank/modules/new"):
        with pytest.raises(BankError, match="is the bank that is folded, or lies in it"):
            folded(bank, out=out, to=2, force=True)
    folded(bank, to=2)
    with pytest.raises(BankError, match="exists"):
        folded(bank, to=1)
    assert len(Bank.open(bank.parent / "out").modules) == 2
    assert Bank.open(bank).digest == before


def test_a_bank_of_one_module_or_none(backbone: Backbone, tmp_path: Path) -> None:
    one = write_pool(tmp_path / "one", backbone, pool()[:1])
    with pytest.raises(BankError, match="has one module, which cannot be fewer"):
        folded(one, to=1)
    write_bank(tmp_path / "bank", name="zoo", backbone=backbone, modules=[])
    with pytest.raises(BankError, match="has no modules: there is nothing to fold"):
        folded(tmp_path / "bank", to=1)
    with pytest.raises(BankError, match="has no modules: there is nothing to fold"):
        folded(tmp_path / "bank", nbytes=1000)


def test_a_module_that_does_not_fit_the_backbone_is_named(
    backbone: Backbone, tmp_path: Path
) -> None:
    other = make_module(make_model("gpt2"), "other")
    bank = write_pool(tmp_path, backbone, [*pool(), other])
    with pytest.raises(ModuleError, match="'other'"):
        folded(bank, to=2)
    assert not (tmp_path / "out").exists()
