"""What a bank is measured against: the experts it was built from, and static merges of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import yaml
from pydantic import ValidationError

from ..adapters.backbone import Backbone
from ..adapters.bank import Bank, BankModule
from ..adapters.errors import BankError, RecipeError
from ..adapters.experts import Base, Expert, LoraExpert, open_expert, source_digest
from ..adapters.merging.methods import find_method
from ..adapters.recipe import Recipe
from ..adapters.smoe.recipe import MoeRecipe

_KEPT = ("base", "experts", "kinds", "calibration", "seed", "dtype")


@dataclass(frozen=True)
class GivenExperts:
    """Experts that one engine can answer for: LoRAs on their base, or one full checkpoint.

    names: of the experts. is_pinned: each is a module of the bank; else the bank is the expert.
    """

    bank: Bank
    names: tuple[str, ...]
    is_pinned: bool


def recorded_recipe(bank: Bank) -> Recipe | None:
    """What a bank was built from, as the recipe of a plain model; None when it does not say.

    Raises:
        BankError: the record is damaged, or of a newer version.
    """
    if bank.recipe is None:
        return None
    kept = {key: bank.recipe[key] for key in _KEPT if key in bank.recipe}
    try:
        return Recipe.model_validate(
            {**kept, "name": "static-merge", "modules": {"method": "none"}}
        )
    except ValidationError as error:
        raise _damaged(bank, error) from error


def _damaged(bank: Bank, error: ValidationError) -> BankError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return BankError(
        f"the recipe that bank {bank.name!r} records is damaged at {where!r}: {first['msg']}"
    )


def recorded_moe(bank: Bank) -> MoeRecipe | None:
    """What a bank with merged experts of one sparse model was built from; None of other banks.

    Raises:
        BankError: the record is damaged, or of a newer version.
    """
    if not isinstance((bank.recipe or {}).get("experts"), dict):
        return None
    try:
        return MoeRecipe.model_validate(bank.recipe)
    except ValidationError as error:
        raise _damaged(bank, error) from error


def original_model(recipe: MoeRecipe, *, sources: Mapping[str, str]) -> Bank:
    """The sparse model that a bank's experts were merged of, as a bank of its own.

    Raises:
        BackboneError: it is missing or damaged.
        BankError: it is no longer what the bank was built from.
    """
    model = Backbone.open(recipe.base, name="the original")
    if model.digest != sources.get("base", model.digest):
        raise BankError(
            f"the base at {recipe.base} has digest {model.digest}, the bank was built from "
            f"{sources['base']}: put the same files there, or build the bank again"
        )
    return Bank.adhoc("original", model, [])


def open_experts(
    recipe: Recipe, asked: Sequence[str], *, sources: Mapping[str, str]
) -> list[Expert]:
    """The experts of a recipe that are asked for, checked against the base.

    sources: digests of what the bank was built from, by name; what it does not know is not checked.

    Raises:
        BackboneError, ModuleError: one is missing, damaged or of another base.
        BankError: one is no longer what the bank was built from.
    """
    wanted = [entry for entry in recipe.experts if entry.name in asked]
    if not wanted:
        return []
    base = Base.open(recipe.base)
    experts = [open_expert(entry.name, entry.path, base) for entry in wanted]
    found = {expert.name: source_digest(expert) for expert in experts if expert.name in sources}
    if "base" in sources and any(isinstance(expert, LoraExpert) for expert in experts):
        found["base"] = source_digest(base)
    check_sources(recipe, found, recorded=sources)
    return experts


def check_sources(recipe: Recipe, found: Mapping[str, str], *, recorded: Mapping[str, str]) -> None:
    """Refuse a base or experts that were replaced or edited since the bank was built.

    found: digests by name, as they are now; names that are not `recorded` are not checked.

    Raises:
        BankError: it names the source, and where it is.
    """
    paths = {entry.name: entry.path for entry in recipe.experts} | {"base": recipe.base}
    for name, digest in found.items():
        if digest != recorded.get(name, digest):
            what = "the base" if name == "base" else f"expert {name!r}"
            raise BankError(
                f"{what} at {paths[name]} has digest {digest}, the bank was built from "
                f"{recorded[name]}: put the same files there, or build the bank again"
            )


def given_experts(recipe: Recipe, experts: Sequence[Expert]) -> Iterator[GivenExperts]:
    """The experts as they were given to the build, as banks to be hosted one after the other."""
    loras = [expert for expert in experts if isinstance(expert, LoraExpert)]
    if loras:
        names = tuple(expert.name for expert in loras)
        base = Backbone.open(recipe.base, name="the base")  # no module can be called that
        modules = [BankModule(expert.name, expert.path) for expert in loras]
        free = next(name for k in count() if (name := f"experts{k}") not in names)
        yield GivenExperts(Bank.adhoc(free, base, modules), names, is_pinned=True)
    for expert in experts:
        if not isinstance(expert, LoraExpert):
            model = Backbone.open(expert.path, name="the expert")
            bank = Bank.adhoc(expert.name, model, [])
            yield GivenExperts(bank, (expert.name,), is_pinned=False)


def static_recipe(recipe: Recipe, text: str) -> Recipe:
    """A recipe of a plain model with another method.

    recipe: as `recorded_recipe` gives it. text: a method, or `METHOD:PARAMETER=VALUE,...`.

    Raises:
        RecipeError: no such method or parameter, or a value out of range.
    """
    method, _, stated = text.partition(":")
    document = recipe.model_dump(mode="json", exclude_unset=True)
    document["backbone"] = {"method": method, **_parameters(text, stated)}
    if find_method(method).needs is None:
        document["calibration"] = None
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"--compare {text}: {message}") from error


def _parameters(text: str, stated: str) -> dict[str, object]:
    parameters: dict[str, object] = {}
    for part in filter(None, stated.split(",")):
        name, equals, value = part.partition("=")
        if not (equals and name and value):
            raise RecipeError(
                f"--compare {text}: {part!r} is no parameter: write METHOD:NAME=VALUE,NAME=VALUE"
            )
        try:
            parameters[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"--compare {text}: {value!r} is no value: {error}") from error
    return parameters
