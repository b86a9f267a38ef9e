"""What a server that cannot serve blends says before it ends, and the way that needs no seams."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import EngineError
from mergeroute.adapters.lora import Module
from mergeroute.runtime.vllm.blends import lora_name
from mergeroute.runtime.vllm.launch import PluginOptions
from tests.runtime.vllm.server import BASE, VllmServer, running
from tests.tiny import make_prompt, reference_tokens

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]

BREAKER = """
def register():
    from mergeroute.runtime.vllm.wrapper_cpu import BlendWrapperCPU

    right = BlendWrapperCPU.set_weights
    BlendWrapperCPU.set_weights = lambda self, rows, places: right(self, rows * 1.01, places)
"""


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """An installed distribution that holds nothing but metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text(entry_points)


def why_it_ended(backbone: Path, options: PluginOptions, folder: Path, *more: str) -> str:
    """What a server wrote that does not start; folder: is looked into before what is installed."""
    log = folder / "vllm.log"
    with (
        pytest.raises(AssertionError, match="vLLM ended"),
        running(backbone, options, log, *more, variables={"PYTHONPATH": str(folder)}),
    ):
        pass
    return log.read_text()


def test_a_vllm_that_was_not_tested_does_not_start(
    backbone: Path, options: PluginOptions, tmp_path: Path
) -> None:
    distribution(tmp_path, "vllm", "9.9+cpu")
    said = why_it_ended(backbone, options, tmp_path)
    assert "mergeroute: vLLM 9.9+cpu was not tested for blends" in said
    assert "MERGEROUTE_VLLM_MODE=materialise" in said


def test_blends_that_come_out_wrong_do_not_start(
    backbone: Path, options: PluginOptions, tmp_path: Path
) -> None:
    (tmp_path / "breaker.py").write_text(BREAKER)
    distribution(tmp_path, "breaker", "1.0", "[vllm.general_plugins]\nbreaker = breaker:register\n")
    said = why_it_ended(backbone, options, tmp_path)
    assert "differ by 0.01 from plain products" in said


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"fully_sharded_loras": True}, "--fully-sharded-loras"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"_api_process_count": 2}, "--api-server-count"),
        ({"max_lora_rank": 16}, "--max-lora-rank 16, which is not 8"),
    ],
)
def test_what_blends_are_not_served_with_is_refused_by_name(
    options: PluginOptions, changes: dict[str, Any], flag: str
) -> None:
    from mergeroute.runtime.vllm.manager import check_settings

    usual = {
        "fully_sharded_loras": False,
        "enable_tower_connector_lora": False,
        "max_lora_rank": 8,
        "enable_sleep_mode": False,
        "_api_process_count": 1,
    }
    settings = SimpleNamespace(**{**usual, **changes})
    config = SimpleNamespace(lora_config=settings, parallel_config=settings, model_config=settings)
    with pytest.raises(EngineError, match=flag):
        check_settings(config, options)


@pytest.fixture(scope="module")
def materialising(
    backbone: Path, options: PluginOptions, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    flags = ("--lora-target-modules", *targets)
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with running(backbone, replace(options, mode="materialise"), log, *flags) as found:
        yield found


def test_materialised_blends_are_the_merged_models_too(
    materialising: VllmServer, model: Any, modules: dict[str, Module]
) -> None:
    blends = [
        Blend(),
        Blend({"m0": 0.5, "m2": -1.0}),
        Blend({"m1": 1.0}),
        Blend(),
        Blend({"m0": 0.25, "m1": 0.25, "m2": 0.25}),
    ]
    asked = [(blend, make_prompt(6 + k, seed=k)) for k, blend in enumerate(blends)]

    def tokens(blend: Blend, prompt: tuple[int, ...]) -> list[int]:
        digests = {name: modules[name].digest for name in blend}
        name = lora_name(blend.renamed(digests)) if blend else BASE
        return materialising.tokens(name, prompt, 12)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(tokens, *zip(*asked, strict=True)))
    assert found == [reference_tokens(model, modules, blend, p, 12) for blend, p in asked]
    missing = lora_name(Blend({"0" * 64: 1.0}))
    assert materialising.post("/v1/completions", {"model": missing, "prompt": "a"})[0] == 404
