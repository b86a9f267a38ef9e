"""Where and when a figure was measured."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from pathlib import Path

import peft
import torch
import transformers


def describe_machine() -> dict[str, str | int]:
    """Where and when this was measured."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        **{library.__name__: library.__version__ for library in (torch, transformers, peft)},
        "date": date.today().isoformat(),
    }
