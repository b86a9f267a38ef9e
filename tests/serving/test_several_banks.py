"""Several banks in one server: what they cost together, and that each answers as it does alone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mergeroute.adapters.backbone import Backbone, checkpoint_files
from mergeroute.adapters.bank import Bank, BankModule, copy_files, new_bank, seal
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.adapters.manifest import BackboneEntry
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.hosted import HostedBank
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.schemas.completions import CompletionRequest
from mergeroute.serving.service import Service

from ..tiny import make_model, make_module, make_tokenizer, reference_tokens

PLACEMENT = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
PROMPT = tuple(range(60, 90))
LENGTH = 12


def model(seed: int = 0) -> torch.nn.Module:
    """Wide, so that the backbone outweighs its modules, as real ones do."""
    found: torch.nn.Module = make_model(seed=seed, hidden_size=256, intermediate_size=512)
    return found


def checkpoint(folder: Path, seed: int = 0) -> Backbone:
    model(seed).save_pretrained(folder)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)
    return Backbone.open(folder)


def modules_of(bank: str, *, is_shared: bool) -> dict[str, Module]:
    """By what the bank calls them; `shared` is always on."""
    seed = sum(map(ord, bank))
    names = ["a", "b", *(["shared"] if is_shared else [])]
    return {
        name: make_module(model(), name, seed=seed + number, scale=0.1)
        for number, name in enumerate(names)
    }


def write(folder: Path, name: str, backbone: Backbone, *, is_shared: bool = False) -> Bank:
    """A bank of modules a and b, without a router."""
    for module_name, module in modules_of(name, is_shared=is_shared).items():
        module.save(folder / "loras" / name / module_name)
    with new_bank(folder / name) as made:
        copy_files(checkpoint_files(backbone.path), made / "backbone")
        for module_name in ("a", "b"):
            source = folder / "loras" / name / module_name
            copy_files(list(source.iterdir()), made / "modules" / module_name)
        if is_shared:
            copy_files(list((folder / "loras" / name / "shared").iterdir()), made / "shared")
        entry = BackboneEntry(name=backbone.name, folder="backbone", digest=backbone.digest)
        listed = [BankModule(n, made / "modules" / n) for n in ("a", "b")]
        seal(made, name=name, backbone=entry, modules=listed)
    return Bank.open(folder / name)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    folder = tmp_path_factory.mktemp("several")
    base, other = checkpoint(folder / "wide"), checkpoint(folder / "other", seed=5)
    return {
        "one": write(folder, "one", base),
        "two": write(folder, "two", base),
        "always": write(folder, "always", base, is_shared=True),
        "elsewhere": write(folder, "elsewhere", other),
    }


def tensor_bytes() -> int:
    """Of every tensor there is, each piece of memory once."""
    gc.collect()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for found in gc.get_objects()
        if issubclass(type(found), torch.Tensor)
        for storage in (found.untyped_storage(),)
    }
    return sum(storages.values())


def memory_of(banks: Sequence[Bank]) -> tuple[int, int]:
    """Bytes of tensors that serving banks takes, after an answer of each; of these, of modules."""
    before = tensor_bytes()
    hosted = host_banks(banks, PLACEMENT)
    try:
        asyncio.run(answers(Service(hosted), [f"{bank.name}:a" for bank in banks]))
        kept = {id(h.residency): h.residency.stats().bytes for h in hosted}
        return tensor_bytes() - before, sum(kept.values())
    finally:
        stop(hosted)


def stop(hosted: Sequence[HostedBank]) -> None:
    for residency in {id(h.residency): h.residency for h in hosted}.values():
        residency.stop()


async def answers(service: Service, targets: Sequence[str]) -> list[list[int]]:
    """Greedy tokens of each target, all at once."""

    async def ask(target: str) -> list[int]:
        asked = {"model": target, "prompt": list(PROMPT), "max_tokens": LENGTH, "temperature": 0}
        (choice,) = await service.start(CompletionRequest.model_validate(asked))
        found = [event.token_id async for event in choice.generation]
        return [token for token in found if token is not None]

    return await asyncio.gather(*map(ask, targets))


@pytest.fixture(scope="module")
def one(banks: dict[str, Bank]) -> tuple[int, int]:
    """What one bank takes, and its modules of that."""
    memory_of([banks["one"]])  # what torch keeps from its first use on
    return memory_of([banks["one"]])


@pytest.mark.parametrize("second", ["two", "always"])
def test_a_second_bank_on_one_backbone_costs_its_modules(
    banks: dict[str, Bank], one: tuple[int, int], second: str
) -> None:
    alone, modules = one
    together, all_modules = memory_of([banks["one"], banks[second]])
    base = banks["one"].backbone
    assert alone > sum(weights.numel() * weights.element_size() for weights in model().parameters())
    assert banks[second].backbone.digest == base.digest
    assert together <= 1.1 * alone + (all_modules - modules)
    assert together - alone < 0.5 * alone  # a second copy would be one more of everything


def test_banks_on_different_backbones_have_an_engine_each(banks: dict[str, Bank]) -> None:
    hosted = host_banks([banks["one"], banks["two"], banks["elsewhere"]], PLACEMENT)
    try:
        assert hosted[0].engine is hosted[1].engine
        assert hosted[2].engine is not hosted[0].engine
        served = asyncio.run(answers(Service(hosted), ["one:a", "elsewhere:a"]))
        mine = modules_of("elsewhere", is_shared=False)
        assert served[1] == reference_tokens(model(5), mine, Blend({"a": 1}), PROMPT, LENGTH)
    finally:
        stop(hosted)


def test_banks_in_one_batch_answer_as_if_they_were_alone(banks: dict[str, Bank]) -> None:
    hosted = host_banks([banks["one"], banks["two"], banks["always"]], PLACEMENT)
    wanted = {
        f"{bank}:{name}": Blend({name: 1.0, **({"shared": 1.0} if bank == "always" else {})})
        for bank in ("one", "two", "always")
        for name in ("a", "b")
    }
    try:
        served = asyncio.run(answers(Service(hosted), list(wanted)))
        stats = hosted[0].engine.stats()
        assert stats.rows > 2 * stats.steps  # they ran together
    finally:
        stop(hosted)
    for (target, blend), tokens in zip(wanted.items(), served, strict=True):
        bank = target.partition(":")[0]
        modules = modules_of(bank, is_shared=bank == "always")
        assert tokens == reference_tokens(model(), modules, blend, PROMPT, LENGTH), target
