"""What the plugin changes in vLLM, without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.launch import PluginOptions
from mergeroute.runtime.vllm.plugin import tell_compiler, wrapper_name

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]


def test_compiled_graphs_are_not_taken_for_those_of_other_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    def key(options: PluginOptions | None) -> dict[str, Any]:
        monkeypatch.setattr(envs, "environment_variables", dict(before))
        if options:
            tell_compiler(options)
        return dict(envs.compile_factors())

    before = envs.environment_variables
    options = PluginOptions(tmp_path, slots=8, rank=16)
    others = [
        None,
        replace(options, slots=9),
        replace(options, rank=32),
        replace(options, mode="materialise"),
    ]
    found = key(options)
    assert found == key(replace(options, modules=tmp_path / "elsewhere"))
    assert all(found != key(other) for other in others)


def test_another_platform_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    assert wrapper_name() == "wrapper_cpu.BlendWrapperCPU"
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.setattr(type(current_platform), "device_name", "xpu")
    with pytest.raises(EngineError, match=r"not served on 'xpu'.*MODE=materialise"):
        wrapper_name()
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda _: True)
    assert wrapper_name() == "wrapper_cuda.BlendWrapperCUDA"
