"""`mergeroute build` and `mergeroute export`: from a recipe's file to answers of a server."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import (
    BankError,
    DataError,
    MergerouteError,
    ModuleError,
    RecipeError,
    UnsupportedModelError,
)
from mergeroute.adapters.experts import Base, open_expert
from mergeroute.adapters.lora import Module
from mergeroute.adapters.module_files import INT8_FILE
from mergeroute.adapters.recipe import Recipe
from mergeroute.adapters.recipe_file import read_recipe
from mergeroute.routers.base import Query
from mergeroute.routers.settings import LearnedSettings
from mergeroute.routers.store import read_settings
from mergeroute.runtime.calibration import input_moments
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.rendering import Rendered
from mergeroute.serving.building import build_bank, check_router, summary
from mergeroute.serving.cli import app
from mergeroute.serving.exporting import export_module
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service

from ..experts import EVERYTHING, Zoo, blended, make_zoo, weights_of
from ..tiny import make_model, make_prompt
from .conftest import chat_ids, running

WORDS = {"a": "shout the word", "b": "0 1 2 3 4", "c": "shout the word", "d": "0 1 2 3 4"}
SUM = {"method": "task_arithmetic", "scale": 0.4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"), make_model())


def write_examples(path: Path, names: str, *, count: int = 12) -> str:
    lines = [
        {"task": name, "prompt": f"{WORDS[name]} {11 + 7 * k}", "answer": f"{k}"}
        for name in names
        for k in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of prompts: ab.jsonl and cd.jsonl by task, none.jsonl of no task."""
    folder = tmp_path_factory.mktemp("data")
    for names in ("ab", "cd", "ac"):
        write_examples(folder / f"{names}.jsonl", names)
    lines = [{"prompt": f"{'~' * k} §§§ {'ß' * 12}"} for k in range(1, 31)]
    (folder / "none.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def built(recipe: Recipe, folder: Path, **keys: Any) -> Bank:
    return build_bank(recipe, folder, console=Console(quiet=True), device="cpu", **keys)


def fresh(bank: Bank) -> Any:
    """The backbone as a plain model."""
    return load_model(bank.backbone.path, device=CPU, dtype=torch.float32)


def router(data: Path, names: str = "cd", **keys: Any) -> dict[str, Any]:
    return {"data": str(data / f"{names}.jsonl"), "signal": {"layer": 1}, **keys}


@pytest.fixture(scope="module")
def routed(zoo: Zoo, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    """One recipe with a router, its merged change folded in and beside the base."""
    folder = tmp_path_factory.mktemp("routed")
    return {
        shared: built(
            zoo.recipe(
                "cd",
                name=shared,
                backbone=SUM,
                shared=shared,
                router=router(data),
                modules={"rank": 4, "dtype": "float32"},
            ),
            folder / shared,
        )
        for shared in ("folded", "module")
    }


# Served.


@pytest.fixture(scope="module")
def client(routed: dict[str, Bank]) -> Iterator[openai.OpenAI]:
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=4))
    service = Service(host_banks(list(routed.values()), placement))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def ask(client: openai.OpenAI, prompt: str, model: str, **body: Any) -> tuple[str, dict[str, str]]:
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=10,
        extra_body=body,
    )
    return raw.parse().choices[0].message.content or "", dict(raw.headers)


def greedy(bank: Bank, blend: Blend, prompt: str, count: int = 10) -> str:
    """What `generate` of the merged model answers."""
    model = fresh(bank)
    with torch.no_grad():
        for name, weight in blended(bank, blend).items():
            model.get_parameter(name).copy_(weight)
        ids = torch.tensor([chat_ids(bank.backbone, prompt)])
        out = model.generate(
            ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids)
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(bank.backbone.path)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("shared", ["folded", "module"])
@pytest.mark.parametrize(("name", "words"), [("c", "shout the word 61"), ("d", "0 1 2 3 4 61")])
def test_the_router_of_a_built_bank_picks_the_module(
    name: str, words: str, shared: str, client: openai.OpenAI, routed: dict[str, Bank]
) -> None:
    text, headers = ask(client, words, shared)
    assert headers["x-mergeroute-router"] == "prototype"
    assert headers["x-mergeroute-blend"] == f"{name}=1"
    assert headers["x-mergeroute-bank"] == routed[shared].digest
    assert text == greedy(routed[shared], Blend({name: 1.0}), words)


@pytest.mark.parametrize("blend", [{}, {"c": 1.0}, {"d": 0.5, "c": -0.25}])
def test_a_shared_module_answers_as_the_folded_change_does(
    blend: dict[str, float], client: openai.OpenAI, routed: dict[str, Bank]
) -> None:
    prompt = "shout the word 5"
    answers = {shared: ask(client, prompt, shared, blend=blend)[0] for shared in routed}
    assert answers["module"] == answers["folded"]
    assert answers["module"] == greedy(routed["module"], Blend(blend), prompt)
    for name in "cd":
        pinned = [ask(client, prompt, f"{shared}:{name}")[0] for shared in routed]
        assert pinned[0] == pinned[1] == greedy(routed["folded"], Blend({name: 1.0}), prompt)


def test_everything_that_is_exclusive_is_served(zoo: Zoo, tmp_path: Path) -> None:
    keys = {**EVERYTHING, "backbone": {"method": "ties"}}
    bank = built(zoo.recipe("ac", **keys), tmp_path / "bank")
    service = Service(host_banks([bank], Placement(dtype="float32")))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        for name in "ac":
            prompt = f"{WORDS[name]} 3"
            text, _ = ask(opened, prompt, f"zoo:{name}")
            assert text == greedy(bank, Blend({name: 1.0}), prompt)


# Routers.


def test_prompts_that_no_module_serves_are_learned_and_reported(
    zoo: Zoo, data: Path, tmp_path: Path
) -> None:
    output = io.StringIO()
    settings = router(data, "ab", none=str(data / "none.jsonl"))
    recipe = zoo.recipe("ab", backbone=SUM, router=settings)
    console = Console(file=output, width=200)
    bank = build_bank(recipe, tmp_path / "bank", console=console, device="cpu")
    assert "fitted on 24 prompts of modules and 30 of none" in output.getvalue()
    assert "none kept on the backbone 100.0 %" in output.getvalue()
    assert bank.router_path is not None
    said = read_settings(bank.router_path)
    assert isinstance(said, LearnedSettings)
    assert (said.scorer, said.modules) == ("prototype", ("a", "b"))
    assert said.backbone == bank.backbone.digest
    state = load_file(bank.router_path / "scorer.safetensors")
    assert (state["owners"] == -1).any()


@pytest.mark.parametrize("scorer", ["mlp", "retriever"])
def test_other_scorers_are_fitted_too(scorer: str, zoo: Zoo, data: Path, tmp_path: Path) -> None:
    settings = router(data, "cd", scorer=scorer, policy="softmax | top_k(1) | quantise")
    bank = built(zoo.recipe("cd", backbone=SUM, router=settings), tmp_path / "bank")
    (hosted,) = host_banks([bank], Placement(device="cpu", dtype="float32"))
    assert hosted.router is not None
    try:
        for name in "cd":
            ids, text = chat_ids(bank.backbone, f"{WORDS[name]} 77"), f"{WORDS[name]} 77"
            decision = hosted.router.route(Query.of(ids, text))
            assert decision.blend == Blend({name: 1.0})
            assert decision.router == scorer
    finally:
        hosted.engine.stop()


def test_a_router_of_tokens_is_written(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"scorer": "arrow", "settings": {"top_k": 1}}
    bank = built(zoo.recipe("ab", backbone=SUM, router=settings), tmp_path / "bank")
    assert bank.router_path is not None
    said = json.loads((bank.router_path / "router.json").read_text())
    assert said == {"scorer": "arrow", "settings": {"top_k": 1}}


def test_a_fixed_router_is_written(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"scorer": "fixed", "blend": "a=0.75,b=0.25"}
    bank = built(zoo.recipe("ab", backbone=SUM, router=settings), tmp_path / "bank")
    assert bank.router_path is not None
    assert json.loads((bank.router_path / "router.json").read_text())["blend"] == "a=0.75,b=0.25"


@pytest.mark.parametrize(
    ("lines", "settings", "error", "texts"),
    [
        ([], {}, DataError, ("holds no examples",)),
        (["{"], {}, DataError, ("line 1",)),
        ([{"prompt": "x"}], {}, DataError, ("line 1", "task")),
        ([{"prompt": "x", "task": "a"}], {}, DataError, ("own.jsonl holds no prompt", "'b'")),
        ([{"prompt": " ", "task": t} for t in "ab"], {}, DataError, ("line 1", "blank")),
        (
            [{"prompt": "x", "task": t} for t in "abz"],
            {},
            DataError,
            ("line 3", "'z' is no module (a, b)", "none"),
        ),
        (None, {"policy": "softmax(0)"}, RecipeError, ("router.policy", "softmax(0)")),
        (None, {"policy": "guess"}, RecipeError, ("router.policy", "guess")),
        (None, {"signal": {"layer": 9}}, RecipeError, ("router.signal.layer is 9", "3 layers")),
        (None, {"signal": {"layer": [1, 9]}}, RecipeError, ("layer is 9", "3 layers")),
        (None, {"none": "/nowhere.jsonl"}, DataError, ("nowhere.jsonl",)),
        (None, {"scorer": "fixed", "blend": "x=1"}, RecipeError, ("router.blend", "'x'")),
        (None, {"scorer": "fixed", "blend": "a="}, RecipeError, ("router.blend",)),
        (None, {"scorer": "arrow", "settings": {"top": 1}}, RecipeError, ("settings", "'top'")),
    ],
)
def test_a_router_that_cannot_be_fitted_is_refused_before_anything_is_built(
    lines: Sequence[Any] | None,
    settings: dict[str, Any],
    error: type[MergerouteError],
    texts: tuple[str, ...],
    zoo: Zoo,
    data: Path,
    tmp_path: Path,
) -> None:
    path = data / "ab.jsonl"
    if lines is not None:
        path = tmp_path / "own.jsonl"
        rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(rows))
    examples = {} if "scorer" in settings else {"data": str(path)}
    recipe = zoo.recipe("ab", router={**examples, **settings})
    with pytest.raises(error) as caught:
        check_router(recipe)
    for text in texts:
        assert text in str(caught.value)
    unreadable = recipe.model_copy(update={"experts": (*recipe.experts[:1],)})
    with pytest.raises(MergerouteError):
        built(unreadable, tmp_path / "deep" / "bank")
    assert not (tmp_path / "deep").exists()


def test_a_router_over_no_modules_is_refused(zoo: Zoo, data: Path) -> None:
    recipe = zoo.recipe("ab", router=router(data, "ab"), modules={"method": "none"})
    with pytest.raises(RecipeError, match="chooses among modules"):
        check_router(recipe)


def test_a_base_without_tokenizer_is_refused_before_anything_is_built(
    data: Path, tmp_path: Path
) -> None:
    bare = make_zoo(tmp_path / "zoo", make_model())
    for path in (bare.folder / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        check_router(bare.recipe("ab", router=router(data, "ab")))


# Calibrated.


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plus_plus"])
@pytest.mark.parametrize("names", ["ab", "cd", "ac"])
def test_methods_that_look_at_data_are_built(
    names: str, method: str, zoo: Zoo, data: Path, tmp_path: Path
) -> None:
    recipe = zoo.recipe(
        names,
        backbone={"method": method},
        calibration=str(data / f"{names}.jsonl"),
        modules={"rank": 4096, "dtype": "float32"},
        kinds=EVERYTHING["kinds"],
    )
    bank = built(recipe, tmp_path / "bank")
    for name in names:
        found = blended(bank, Blend({name: 1.0}))
        for parameter, weight in zoo.experts[name].items():
            torch.testing.assert_close(found[parameter], weight, atol=1e-3, rtol=1e-3)
    again = built(recipe, tmp_path / "again")
    assert again.digest == bank.digest


def test_fitting_outputs_loses_less_of_them_on_the_calibration_prompts(
    zoo: Zoo, data: Path, tmp_path: Path
) -> None:
    banks = {}
    for fit in ("weights", "outputs"):
        recipe = zoo.recipe(
            "ab",
            backbone=SUM,
            calibration=str(data / "ab.jsonl"),
            modules={"rank": 3, "fit": fit, "dtype": "float32"},
        )
        banks[fit] = built(recipe, tmp_path / fit)
    tokenized = [
        Rendered(ids, len(ids))
        for k in range(12)
        for ids in [chat_ids(banks["weights"].backbone, f"{WORDS['a']} {k}")]
    ]
    expert = load_model(zoo.folder / "a", device=CPU, dtype=torch.float32)
    moments = input_moments(expert, tokenized)
    lost = {fit: output_error(bank, zoo, moments) for fit, bank in banks.items()}
    assert lost["outputs"] < 0.9 * lost["weights"]
    errors = {fit: bank.modules[0].provenance["error"] for fit, bank in banks.items()}
    assert errors["weights"] < errors["outputs"]


def output_error(bank: Bank, zoo: Zoo, moments: Any) -> float:
    """Squared change of all layers' outputs that module a loses, on inputs of given moments."""
    found = blended(bank, Blend({"a": 1.0}))
    total = 0.0
    for layer, moment in moments.items():
        missing = (zoo.experts["a"][f"{layer}.weight"] - found[f"{layer}.weight"]).double()
        total += float(((missing @ moment.gram.double()) * missing).sum())
    return total


def test_an_expert_without_calibration_prompts_is_named(
    zoo: Zoo, data: Path, tmp_path: Path
) -> None:
    recipe = zoo.recipe("ac", backbone={"method": "regmean"}, calibration=str(data / "ab.jsonl"))
    with pytest.raises(RecipeError, match=r"ab\.jsonl holds no prompt of expert 'c'"):
        built(recipe, tmp_path / "bank")
    assert not list(tmp_path.iterdir())


# The command line.


def test_the_commands_build_and_export(zoo: Zoo, tmp_path: Path) -> None:
    document = {
        "name": "small",
        "base": str(zoo.folder / "base"),
        "experts": [{"name": n, "path": str(zoo.folder / n)} for n in "ac"],
        "modules": {"rank": 4, "dtype": "int8"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    runner = CliRunner()
    out = tmp_path / "bank"
    result = runner.invoke(app, ["build", str(path), "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "bank small" in result.stdout
    bank = Bank.open(out)
    assert bank.recipe == read_recipe(path).model_dump(mode="json", exclude_none=True)
    with pytest.raises(BankError, match="exists"):
        runner.invoke(app, ["build", str(path), "--out", str(out)], catch_exceptions=False)
    forced = runner.invoke(app, ["build", str(path), "--out", str(out), "--force"])
    assert forced.exit_code == 0
    exported = tmp_path / "exported"
    arguments = ["export", str(out), "--module", "a", "--out", str(exported)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (exported / "adapter_model.safetensors").is_file()


def test_the_summary_has_a_row_per_module(routed: dict[str, Bank]) -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(summary(routed["folded"]))
    for text in ("bank folded", "module", "ranks", "error", " c ", " d "):
        assert text in output.getvalue()


# Export.


def peft_logits(bank: Bank, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(bank.backbone.path, dtype="float32")
    adapted = peft.PeftModel.from_pretrained(model.eval(), folder)
    with torch.no_grad():
        logits: torch.Tensor = adapted(ids).logits
    return logits


def merged_logits(bank: Bank, blend: Blend, ids: torch.Tensor) -> torch.Tensor:
    model = fresh(bank)
    with torch.no_grad():
        for name, weight in blended(bank, blend).items():
            model.get_parameter(name).copy_(weight)
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("ab", {"modules": {"rank": 5, "dtype": "int8"}}),
        ("cd", {"modules": {"rank": 5, "dtype": "int8"}, "shared": "module"}),
        ("cd", {"modules": {"rank": 2, "dtype": "float32"}, "shared": "module"}),
    ],
)
def test_an_exported_module_is_read_by_peft_whatever_the_bank_stores(
    names: str, keys: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    bank = built(zoo.recipe(names, backbone=SUM, **keys), tmp_path / "bank")
    ids = torch.tensor([list(make_prompt(15, seed=2))])
    for entry in bank.modules:
        assert (entry.path / INT8_FILE).is_file() == (keys["modules"]["dtype"] == "int8")
        export_module(tmp_path / "bank", entry.name, tmp_path / entry.name, dtype="float32")
        found = peft_logits(bank, tmp_path / entry.name, ids)
        wanted = merged_logits(bank, Blend({entry.name: 1.0}), ids)
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
        assert (wanted - merged_logits(bank, Blend(), ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    "keys",
    [
        {"backbone": {"method": "none"}},
        {"backbone": {"method": "none"}, "modules": {"method": "lora"}},
        {"backbone": SUM, "shared": "module", "modules": {"rank": 2}},
    ],
)
def test_a_module_of_a_kept_base_stands_on_the_base_and_on_the_bank(
    keys: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    bank = built(zoo.recipe("cd", **keys), tmp_path / "bank")
    base, backbone = Base.open(zoo.folder / "base"), Base.open(bank.backbone.path)
    export_module(tmp_path / "bank", "c", tmp_path / "c")
    stated = Module.read(tmp_path / "c", name="c").backbones
    assert stated == (bank.backbone.weights_digest, base.weights_digest)
    for each in (base, backbone):
        assert open_expert("c", tmp_path / "c", each).name == "c"


def test_a_module_of_a_merged_backbone_does_not_stand_on_the_base(zoo: Zoo, tmp_path: Path) -> None:
    bank = built(zoo.recipe("cd", backbone=SUM, modules={"rank": 2}), tmp_path / "bank")
    base, backbone = Base.open(zoo.folder / "base"), Base.open(bank.backbone.path)
    export_module(tmp_path / "bank", "c", tmp_path / "c")
    for folder in (tmp_path / "c", bank.modules[0].path):
        assert open_expert("c", folder, backbone).name == "c"
        with pytest.raises(ModuleError, match=f"made for weights {backbone.weights_digest}, those"):
            open_expert("c", folder, base)


def test_an_export_of_loras_as_they_came_says_what_they_stand_on(zoo: Zoo, tmp_path: Path) -> None:
    backbone = Backbone.open(zoo.folder / "base")
    modules = [BankModule("c", zoo.folder / "c")]
    write_bank(tmp_path / "bank", name="bank", backbone=backbone, modules=modules)
    export_module(tmp_path / "bank", "c", tmp_path / "c")
    assert Module.read(tmp_path / "c", name="c").backbones == (backbone.weights_digest,)


def test_what_cannot_be_exported_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    recipe = zoo.recipe("ab", backbone=SUM, kinds={"norm": "exact"}, modules={"rank": 2})
    bank = built(recipe, tmp_path / "bank")
    path = bank.backbone.path.parent
    out = tmp_path / "deep" / "out"
    with pytest.raises(BankError, match=r"no module 'x'; its modules: a, b"):
        export_module(path, "x", out)
    with pytest.raises(ModuleError, match=r"dtype 'int8' is unknown: float32"):
        export_module(path, "a", out, dtype="int8")
    with pytest.raises(ModuleError, match=r"changes 'model\..*norm.*cannot hold"):
        export_module(path, "a", out)
    with pytest.raises(BankError, match="exists: choose another folder"):
        export_module(path, "a", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bank"]


def test_an_export_that_cannot_be_written_leaves_nothing(
    routed: dict[str, Bank], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match="cannot be written"):
        export_module(routed["folded"].backbone.path.parent, "c", tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_built_bank_knows_its_sizes(zoo: Zoo, routed: dict[str, Bank]) -> None:
    base = Base.open(zoo.folder / "base")
    for bank in routed.values():
        for entry in bank.modules:
            assert 0 < entry.provenance["bytes"] < base.checkpoint.nbytes
            assert math.isfinite(entry.provenance["error"])
    assert weights_of(fresh(routed["module"])).keys() == set(zoo.base)
