"""`mergeroute inspect` on tiny recipes, banks, checkpoints and LoRAs: JSON, tables, pictures."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.build import build
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.energy import Spectrum
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.lora import Module
from mergeroute.adapters.recipe_file import read_recipe
from mergeroute.adapters.survey import Survey, Surveyed
from mergeroute.serving.cli import main
from mergeroute.serving.inspect_plots import draw_energy, draw_similarity
from mergeroute.serving.inspect_tables import MOST_COSINES, tables
from mergeroute.serving.inspection import inspect_path

from ..tiny import make_model, make_module, make_rich_module, make_tokenizer


@dataclass(frozen=True)
class Files:
    """What is on disk: a base, a full expert, two LoRAs, recipes over them and a bank."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def describe(self, name: str) -> dict[str, Any]:
        return inspect_path(self / name).document


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("inspected")
    model = make_model(tied=True)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for k, name in enumerate(("alpha", "beta")):
        make_module(model, name, seed=k, rank=3 + k).save(folder / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder / "full")
    write_recipe(folder / "mixed.yaml", "alpha", "beta", "full")
    write_recipe(folder / "loras.yaml", "alpha", "beta", shared="module")
    for name in ("mixed", "loras"):
        build(read_recipe(folder / f"{name}.yaml"), folder / f"{name}-bank")
    return Files(folder)


def write_recipe(path: Path, *experts: str, **others: object) -> None:
    recipe = {
        "name": "zoo",
        "base": "./base",
        "experts": [{"name": name, "path": f"./{name}"} for name in experts],
        "backbone": {"method": "task_arithmetic", "scale": 0.3},
        "modules": {"method": "svd", "rank": 4, "dtype": "int8"},
        **others,
    }
    path.write_text(yaml.safe_dump(recipe))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mergeroute inspect` in this process: status, standard output, standard error."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergeroute", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, " ".join(printed.err.split())

    return run_here


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def weights_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_recipe_tells_of_base_and_experts_before_they_are_merged(files: Files) -> None:
    found = files.describe("mixed.yaml")
    assert (found["kind"], found["name"], found["rank"]) == ("recipe", "zoo", 4)
    assert found["merge"] == {"method": "task_arithmetic", "scale": 0.3}
    assert found["modules_settings"] == {"method": "svd", "rank": 4, "dtype": "int8"}
    assert found["bytes"] == weights_of(files / "base")
    experts = {row["name"]: row for row in found["experts"]}
    assert [row["kind"] for row in experts.values()] == ["LoRA", "LoRA", "full"]
    assert [row["ranks"] for row in experts.values()] == [[3, 3], [4, 4], None]
    assert all(row["bytes"] == weights_of(files / name) for name, row in experts.items())
    assert experts["alpha"]["changed_by_kind"] == {"linear": 20}
    assert experts["full"]["changed_by_kind"] == {"linear": 21, "embedding": 1, "norm": 7}
    assert experts["alpha"]["relative_norm"]["norm"] == 0
    assert experts["full"]["relative_norm"]["norm"] == pytest.approx(0.02, rel=0.3)
    assert experts["beta"]["kept"] == pytest.approx(1)
    assert 0 < experts["full"]["kept"] < experts["alpha"]["kept"] + 1e-9


def test_a_recipe_tells_of_every_layer(files: Files) -> None:
    found = files.describe("mixed.yaml")
    assert [len(found["parameters"]), len(found["layers"])] == [29, 21]
    layers = {row["layer"]: row for row in found["layers"]}
    first = layers["model.layers.0.self_attn.q_proj"]  # the LoRAs leave it as it is
    second = layers["model.layers.1.mlp.down_proj"]
    assert first["energy"].keys() == {"full"}
    assert first["cosine"] == [[None, None, None], [None, None, None], [None, None, 1.0]]
    assert second["energy"].keys() == {"alpha", "beta", "full"}
    energy = second["energy"]["alpha"]
    delta = Module.read(files / "alpha", name="alpha").deltas[second["layer"]]
    squares = torch.linalg.svdvals(delta.dense()).square()
    expected = (squares.cumsum(0) / squares.sum())[:3].tolist()
    assert list(energy["energy_by_rank"].values()) == pytest.approx(expected, rel=1e-4)
    assert list(energy["energy_by_rank"]) == ["1", "2", "3"]
    assert energy["rank_90"] == 1 + sum(share < 0.9 for share in expected)


def test_a_mergekit_recipe_is_read_too(files: Files) -> None:
    path = files / "mergekit.yml"
    models = [{"model": str(files / "full"), "parameters": {"weight": 1.0, "density": 0.5}}]
    path.write_text(
        yaml.safe_dump(
            {
                "merge_method": "ties",
                "base_model": str(files / "base"),
                "models": models,
                "dtype": "float32",
            }
        )
    )
    found = inspect_path(path).document
    assert found["kind"] == "recipe"
    assert found["merge"]["method"] == "ties"
    assert found["similarity"]["cosine"] == [[1.0]]


def test_a_bank_tells_what_its_modules_cost_and_lost(files: Files) -> None:
    found = files.describe("mixed-bank")
    bank = Bank.open(files / "mixed-bank")
    assert found["digest"] == bank.digest
    assert found["shared"] is None
    assert found["merge"]["method"] == "task_arithmetic"
    assert found["modules_settings"] == {"method": "svd", "rank": 4, "dtype": "int8"}
    backbone = weights_of(files / "mixed-bank" / "backbone")
    for row, entry in zip(found["modules"], bank.modules, strict=True):
        assert row["provenance"] == entry.provenance
        assert row["bytes"] == weights_of(entry.path)
        assert row["percent_of_backbone"] == pytest.approx(100 * row["bytes"] / backbone)
        assert row["energy_kept"] == pytest.approx(1 - entry.provenance["error"] ** 2)
    modules = [bank.load(entry) for entry in bank.modules]
    vectors = [
        torch.cat([module.deltas[layer].dense().flatten() for layer in bank.backbone.layers])
        for module in modules
    ]
    expected = torch.stack([v / v.norm() for v in vectors])
    assert torch.tensor(found["similarity"]["cosine"]) == pytest.approx(
        (expected @ expected.T).numpy(), abs=1e-4
    )


def test_a_bank_with_a_shared_module_shows_it(files: Files) -> None:
    found = files.describe("loras-bank")
    assert found["shared"]["name"] == "shared"
    assert found["shared"]["bytes"] == weights_of(files / "loras-bank" / "shared")
    assert found["shared"]["energy_kept"] is None
    assert "shared" in printed(found)


def test_a_bank_that_was_not_built_from_a_recipe_has_no_figures_of_its_build(bank: Bank) -> None:
    found = inspect_path(bank.backbone.path.parent).document
    assert found["merge"] is None
    assert [row["energy_kept"] for row in found["modules"]] == [None, None]
    assert "energy kept" not in printed(found)


def test_a_checkpoint_tells_its_parameters_by_kind(files: Files) -> None:
    found = files.describe("base")
    model = make_model(tied=True)
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert found["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert [kinds[k]["tensors"] for k in ("linear", "embedding", "norm")] == [21, 1, 7]
    assert kinds["linear"]["bytes"] == 4 * kinds["linear"]["parameters"]
    assert {row["dtype"] for row in kinds.values()} == {"float32"}
    assert (found["tied"], found["blocks"], found["shards"]) == (True, 3, 1)
    assert found["bytes"] == weights_of(files / "base")


def test_shards_and_dtypes_are_counted(tmp_path: Path) -> None:
    model = make_model(tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    found = inspect_path(tmp_path).document
    assert found["shards"] == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert {row["kind"]: row["dtype"] for row in found["kinds"]}["head"] == "bfloat16"
    assert found["tied"] is False


def test_a_lora_tells_the_energy_of_every_layer(files: Files) -> None:
    found = files.describe("beta")
    assert found["bytes"] == weights_of(files / "beta")
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    module = Module.read(files / "beta", name="beta")
    for row in found["layers"]:
        delta = module.deltas[row["layer"]]
        assert row["effect"] == pytest.approx(delta.norm())
        squares = torch.linalg.svdvals(delta.dense()).square()[:4]
        shares = (squares.cumsum(0) / squares.sum()).tolist()
        assert list(row["energy_by_rank"].values()) == pytest.approx(shares, rel=1e-4)


def test_a_module_with_embeddings_and_vectors_and_one_of_zeros(tmp_path: Path) -> None:
    make_rich_module(make_model(tied=False), "rich").save(tmp_path / "rich", dtype=torch.int8)
    found = inspect_path(tmp_path / "rich").document
    assert found["outer"] == ("model.embed_tokens",)
    assert found["vectors"] == 7
    Module("zero", {"layer": LowRank(torch.zeros(4, 2), torch.ones(2, 3))}).save(tmp_path / "zero")
    (row,) = inspect_path(tmp_path / "zero").document["layers"]
    assert (row["effect"], row["rank_90"], row["share"]) == (0, 0, 0)


def printed(document: dict[str, Any]) -> str:
    console = Console(width=220, force_terminal=False)
    with console.capture() as captured:
        for table in tables(document):
            console.print(table)
    return captured.get()


def test_tables_hold_the_figures(files: Files) -> None:
    text = printed(files.describe("mixed.yaml"))
    for words in ("task_arithmetic", "29 of 29", "20 of 29", "energy at rank 4", "mean cosine"):
        assert words in text
    assert "model.layers.2.mlp.down_proj" in text
    text = printed(files.describe("mixed-bank"))
    for words in ("% of backbone", "rounding error", "energy kept", "cosine between deltas"):
        assert words in text
    assert "share of energy" in printed(files.describe("alpha"))
    assert "float32" in printed(files.describe("base"))


@pytest.mark.parametrize("count", [MOST_COSINES, MOST_COSINES + 1])
def test_cosines_of_many_experts_are_left_to_the_picture(count: int) -> None:
    names = [f"e{k}" for k in range(count)]
    document = {"kind": "bank", "similarity": {"names": names, "cosine": [[None] * count] * count}}
    assert ("cosine between" in printed(document)) == (count == MOST_COSINES)


@pytest.mark.parametrize("name", ["mixed.yaml", "mixed-bank", "base", "alpha"])
def test_json_is_one_document_and_nothing_else(files: Files, run: Run, name: str) -> None:
    status, out, _ = run(files / name, "--json")
    assert status == 0
    assert json.loads(out, parse_constant=refuse)["kind"] in (
        "recipe",
        "bank",
        "checkpoint",
        "LoRA",
    )


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("mixed.yaml", ["energy.png", "similarity.png"]),
        ("mixed-bank", ["energy.png", "similarity.png"]),
        ("alpha", ["energy.png"]),
    ],
)
def test_pictures_are_pngs_with_something_on_them(
    files: Files, run: Run, tmp_path: Path, name: str, pictures: list[str]
) -> None:
    folder = tmp_path / "new" / "plots"
    status, out, err = run(files / name, "--json", "--plot", folder)
    assert status == 0
    json.loads(out)
    assert sorted(path.name for path in folder.iterdir()) == pictures
    for picture in pictures:
        assert picture in err
        assert (folder / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(folder / picture)
        colours = np.unique((pixels[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
        coloured = (np.ptp(colours.astype(int), axis=1) > 60).sum()
        assert coloured > 20  # lines and cells, not text on white


def make_survey(count: int) -> Survey:
    """Experts with one linear layer in a block and one outside."""
    deltas = torch.randn(count, 12, 8, generator=torch.Generator().manual_seed(0))
    flat = deltas.flatten(1).double()
    names = tuple(f"expert-{k}" for k in range(count))
    spectra = {n: s for n, d in zip(names, deltas, strict=True) if (s := Spectrum.of(d))}
    layers = ("model.layers.3.up.weight", "projection.weight")
    inner = flat @ flat.T
    return Survey(
        names, tuple(Surveyed(n, Kind.LINEAR, (12, 8), inner, 1.0, spectra) for n in layers)
    )


@pytest.mark.parametrize("count", [1, 8, 30])
def test_every_expert_has_a_panel_with_labelled_axes(count: int) -> None:
    survey = make_survey(count)
    figure = draw_energy(survey)
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in shown] == list(survey.names)
    assert all(len(axes.lines) == 2 + 2 for axes in shown)  # two layers, 90 % and 99 %
    assert "rank" in figure.get_supxlabel()
    assert "energy" in figure.get_supylabel()
    line = shown[0].lines[0]
    assert line.get_xdata()[-1] == 8
    assert line.get_ydata()[-1] == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 8, 30])
def test_the_heat_map_names_every_expert_and_masks_the_diagonal(count: int) -> None:
    survey = make_survey(count)
    axes = draw_similarity(survey).axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(survey.names)
    assert axes.get_xlabel() == axes.get_ylabel() == "expert"
    shown = axes.images[0].get_array()
    assert shown.mask.diagonal().all()
    assert shown[0, 1] == pytest.approx(float(survey.cosine()[0, 1]))
    low, high = axes.images[0].get_clim()
    assert low == -high
    assert bool(axes.texts) == (count < 30)


def test_what_cannot_be_read_is_one_message_and_status_1(
    files: Files, run: Run, tmp_path: Path
) -> None:
    write_recipe(files / "gone.yaml", "alpha", "missing")
    shutil.copytree(files / "base", files / "twin")
    write_recipe(files / "same.yaml", "twin")
    write_recipe(files / "typo.yaml", "alpha", modules={"rnak": 4})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "model.safetensors"):
        content = (files / "base" / name).read_bytes()
        (tmp_path / "torn" / name).write_bytes(content[: -100 if name[0] == "m" else None])
    cases = [
        (files / "gone.yaml", "expert 'missing'"),
        (files / "same.yaml", "equals the base"),
        (files / "typo.yaml", "modules.rnak is unknown"),
        (tmp_path / "nowhere", "there is no"),
        (tmp_path / "notes.txt", "neither a folder nor a recipe"),
        (tmp_path / "torn", "truncated or damaged"),
        (tmp_path, "holds none of"),
    ]
    for path, words in cases:
        status, out, err = run(path, "--json")
        assert (status, out) == (1, ""), path
        assert err.count("error: ") == 1
        assert words in err, err


def test_plots_that_cannot_be_made_are_refused(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    status, out, err = run(files / "alpha", "--plot", tmp_path / "file")
    assert (status, out) == (1, "")
    assert "cannot be made" in err
    status, out, err = run(files / "base", "--plot", tmp_path / "plots")
    assert (status, out) == (1, "")
    assert "this checkpoint has none" in err
