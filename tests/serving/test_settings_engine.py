"""The engine's settings: a name, keys, and what the command line adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.adapters.errors import EngineError, MergerouteError
from mergeroute.runtime.vllm.options import VllmOptions, flag_arguments
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_engine import EngineSettings, merged
from mergeroute.serving.settings_file import read_settings


def read(tmp_path: Path, text: str, **said: object) -> ServeSettings:
    path = tmp_path / "serve.yaml"
    path.write_text(f"banks: [bank]\n{text}")
    return read_settings(path, said)


def test_a_name_is_enough(tmp_path: Path) -> None:
    assert read(tmp_path, "").engine.servers is None
    assert read(tmp_path, "engine: torch").engine.servers is None
    servers = read(tmp_path, "engine: vllm").engine.servers
    assert servers == VllmOptions()
    assert read(tmp_path, "engine: {kind: vllm}").placement.servers == servers


def test_keys_reach_the_servers_and_paths_are_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEROUTE_VLLM_API_KEY", "secret")
    engine = read(
        tmp_path,
        "engine: {kind: vllm, urls: ['http://a:8000', 'http://b:8000'], modules_folder: m}",
    ).engine
    servers = engine.servers
    assert servers is not None
    assert servers.urls == ("http://a:8000", "http://b:8000")
    assert servers.modules_folder == tmp_path / "m"
    assert servers.api_key == "secret"
    assert "secret" not in f"{engine!r} {servers!r}"


def test_the_command_line_adds_and_goes_before(tmp_path: Path) -> None:
    file = "engine: {kind: vllm, replicas: 2, options: {seed: 1, enforce_eager: true}}"
    said = {"options": {"seed": 2}}
    for kind in ({}, {"kind": "vllm"}):
        engine = read(tmp_path, file, engine={**kind, **said}).engine
        assert (engine.replicas, engine.options) == (2, {"seed": 2, "enforce_eager": True})
    assert read(tmp_path, file, engine={"kind": "torch"}).engine == EngineSettings()
    assert read(tmp_path, "", engine={"kind": "vllm"}).engine.kind == "vllm"
    assert merged("vllm", {"replicas": 3}) == {"kind": "vllm", "replicas": 3}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("engine: jax", "engine.kind is 'jax': it must be 'torch' or 'vllm'"),
        ("engine: {replicas: 2}", "engine.replicas is for the engine vllm: add kind: vllm"),
        ("engine: {kind: vllm, urls: ['a:8000']}", "'a:8000' is no URL: write http://host:port"),
        ("engine: {kind: vllm, urls: ['http://a']}", "go together: state both"),
        (
            "engine: {kind: vllm, urls: ['http://a', 'http://a'], modules_folder: m}",
            "named twice",
        ),
        (
            "engine: {kind: vllm, urls: ['http://a'], modules_folder: m, replicas: 2}",
            "engine.replicas is for servers that are started here",
        ),
        ("engine: {kind: vllm, replica: 2}", "engine.replica is no setting: did you mean replicas"),
        ("engine: vllm\nmodule_memory: 1GB", "state engine.module_slots instead"),
        ("engine: vllm\ntool_parser: hermes", "tool_call_parser"),
    ],
)
def test_what_does_not_go_is_told(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(MergerouteError) as told:
        read(tmp_path, text)
    assert match in str(told.value)


def test_devices_are_one_per_replica(tmp_path: Path) -> None:
    settings = read(tmp_path, "engine: {kind: vllm, replicas: 2, devices: ['0']}")
    with pytest.raises(EngineError, match=r"names 1 and engine.replicas is 2: name one per"):
        _ = settings.engine.servers


def test_flags_are_written_as_vllm_reads_them() -> None:
    flags = {
        "tensor_parallel_size": 2,
        "--enforce-eager": True,
        "enable_prefix_caching": False,
        "seed": None,
        "cors_allowed": ["a", "b"],
        "structured_outputs_config": {"backend": "xgrammar"},
    }
    assert list(flag_arguments(flags)) == [
        "--tensor-parallel-size=2",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--cors-allowed",
        "a",
        "b",
        "--structured-outputs-config",
        '{"backend": "xgrammar"}',
    ]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("host", "listens on a socket"),
        ("--max-model-len", "use the setting max_length"),
        ("lora_modules", "modules belong to banks"),
        ("api_server_count", "use replicas"),
        ("x y", "which is no option"),
        ("config", "write its options here"),
    ],
)
def test_flags_that_are_ours_are_refused(name: str, match: str) -> None:
    with pytest.raises(EngineError, match=match):
        list(flag_arguments({name: "x"}))
