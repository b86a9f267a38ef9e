"""`mergeroute export`: a bank's module as a plain PEFT folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..adapters.bank import Bank
from ..adapters.errors import BankError, ModuleError
from ..adapters.merge import DTYPES


def export_module(bank_path: Path, name: str, out: Path, *, dtype: str = "bfloat16") -> None:
    """Write a module of a bank as a PEFT LoRA folder, which appears whole or not at all.

    dtype: of the factors.

    Raises:
        BankError: the bank has no such module, or `out` exists.
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
    if dtype not in DTYPES:
        raise ModuleError(f"dtype {dtype!r} is unknown: {', '.join(DTYPES)}")
    module = bank.load(found)
    if module.vectors:
        raise ModuleError(
            f"module {name!r} changes {min(module.vectors)!r}, which a PEFT LoRA folder cannot "
            "hold: build the bank with kinds: {norm: shared, bias: shared}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        module.save(staging, base=str(bank.backbone.path), dtype=DTYPES[dtype])
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
