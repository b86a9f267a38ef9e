"""`mergeroute export`: a bank's module as a plain PEFT folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..adapters.bank import Bank
from ..adapters.checkpoint import MODEL_DTYPES
from ..adapters.delta import concat
from ..adapters.errors import BankError, ModuleError
from ..adapters.lora import Module
from ..adapters.staging import staged


def export_module(bank_path: Path, name: str, out: Path, *, dtype: str = "bfloat16") -> None:
    """Write a module of a bank as a PEFT LoRA folder, which appears whole or not at all. It stands
    on the backbone alone, whose digest it records: a shared module is part of it.

    dtype: of the factors.

    Raises:
        BankError: the bank has no such module, or `out` exists or cannot be written.
        ModuleError: the module changes norms or biases, which a LoRA folder cannot hold, or the
            dtype is unknown.
    """
    bank = Bank.open(bank_path)
    found = {module.name: module for module in bank.modules}.get(name)
    if found is None:
        known = ", ".join(module.name for module in bank.modules) or "none"
        raise BankError(f"bank {bank.name!r} has no module {name!r}; its modules: {known}")
    if out.exists():
        raise BankError(f"{out} exists: choose another folder")
    if dtype not in MODEL_DTYPES:
        raise ModuleError(f"dtype {dtype!r} is unknown: {', '.join(MODEL_DTYPES)}")
    module = bank.load(found)
    if bank.shared is not None:
        module = _with_shared(module, bank.load(bank.shared))
    if module.vectors:
        raise ModuleError(
            f"module {name!r} changes {min(module.vectors)!r}, which a PEFT LoRA folder cannot "
            "hold: build the bank with kinds: {norm: shared, bias: shared}"
        )
    if not module.backbones and bank.recipe is None:  # the backbone is what the module came with
        module = replace(module, backbones=(bank.backbone.weights_digest,))
    with staged(out) as folder:
        module.save(folder, base=str(bank.backbone.path), dtype=MODEL_DTYPES[dtype])


def _with_shared(module: Module, shared: Module) -> Module:
    """A module that needs no other beside it: the exact sum with the always-on one."""
    deltas = {
        layer: concat([m.deltas[layer] for m in (shared, module) if layer in m.deltas])
        for layer in {**shared.deltas, **module.deltas}
    }
    return replace(module, deltas=deltas)
