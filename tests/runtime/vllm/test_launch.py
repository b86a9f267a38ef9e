from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mergeroute.adapters.errors import EngineError, ModuleError
from mergeroute.runtime.vllm.launch import PluginOptions, padded_rank


def test_what_a_server_is_started_with_is_what_its_processes_read(tmp_path: Path) -> None:
    for mode in ("virtual", "materialise", "auto"):
        options = PluginOptions(tmp_path, slots=5, rank=32, mode=mode)
        assert PluginOptions.read(options.environment) == options


def test_without_a_folder_vllm_is_left_alone() -> None:
    assert PluginOptions.read({}) is None
    assert PluginOptions.read({"MERGEROUTE_VLLM_MODULES": ""}) is None


def test_virtual_blends_open_no_route(tmp_path: Path) -> None:
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in PluginOptions(tmp_path).environment


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("SLOTS", "0", "at least 1"),
        ("SLOTS", "many", "whole number"),
        ("RANK", "24", "one of 1, 8, 16"),
        ("MODE", "fast", "one of virtual, materialise, auto"),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, value: str, rule: str) -> None:
    with pytest.raises(EngineError, match=f"MERGEROUTE_VLLM_{name} is .*{rule}"):
        PluginOptions.read({"MERGEROUTE_VLLM_MODULES": "/m", f"MERGEROUTE_VLLM_{name}": value})


def test_every_request_of_a_step_may_have_its_own_blend(tmp_path: Path) -> None:
    flags = PluginOptions(tmp_path, slots=3, rank=8).arguments(64)
    assert flags[flags.index("--max-loras") + 1] == "64"
    assert flags[flags.index("--max-lora-rank") + 1] == "8"


def test_ranks_of_materialised_blends_add_up(tmp_path: Path) -> None:
    options = PluginOptions(tmp_path, slots=3, rank=16, mode="materialise")
    flags = options.arguments(64, targets=["q_proj"])
    assert flags[flags.index("--max-lora-rank") + 1] == "64"
    assert flags[-2:] == ["--lora-target-modules", "q_proj"]


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (2, 8), (9, 16), (257, 320), (512, 512)])
def test_ranks_are_padded_to_what_vllm_takes(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded


def test_a_rank_over_all_is_refused() -> None:
    with pytest.raises(ModuleError, match="rank 513 is over 512"):
        padded_rank(513)


def test_the_entry_point_costs_nothing_where_it_is_not_asked_for() -> None:
    code = (
        "import sys; from mergeroute.runtime.vllm.plugin import register; register(); "
        "print(sorted({'vllm', 'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
