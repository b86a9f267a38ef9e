"""The files under deploy/ say what this version reads, and agree with each other."""

from __future__ import annotations

import dataclasses
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from mergeroute.runtime.vllm.launch import PluginOptions
from mergeroute.runtime.vllm.options import flag_arguments
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SETTINGS = [DEPLOY / "container.yaml", DEPLOY / "kubernetes" / "serve.yaml"]
EXAMPLES = sorted((DEPLOY / "vllm").glob("*.yaml"))


def objects(kind: str) -> list[dict[str, Any]]:
    files = [file for file in MANIFESTS if file.name != "serve.yaml"]
    found = [one for file in files for one in yaml.safe_load_all(file.read_text())]
    return [one for one in found if one["kind"] == kind]


def container(kind: str) -> dict[str, Any]:
    (workload,) = objects(kind)
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def environment() -> dict[str, str]:
    return {one["name"]: one["value"] for one in container("StatefulSet")["env"] if "value" in one}


def flags() -> dict[str, str]:
    parts = (argument.partition("=") for argument in container("StatefulSet")["args"])
    return {name: value for name, _, value in parts}


@pytest.mark.parametrize("file", [*SETTINGS, *EXAMPLES], ids=lambda file: file.stem)
def test_settings_are_read(file: Path) -> None:
    settings = read_settings(file, {})
    assert isinstance(settings, ServeSettings)
    assert settings.engine.servers is None or file not in SETTINGS[:1]


def test_every_manifest_is_in_the_kustomization_and_every_claim_is_made() -> None:
    (kustomization,) = objects("Kustomization")
    named = {*kustomization["resources"], "kustomization.yaml", "serve.yaml"}
    assert named == {file.name for file in MANIFESTS}
    claims = {one["metadata"]["name"] for one in objects("PersistentVolumeClaim")}
    for kind in ("StatefulSet", "Deployment"):
        (workload,) = objects(kind)
        template = workload["spec"]["template"]
        assert workload["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        mounts = {one["name"] for one in container(kind)["volumeMounts"]}
        assert mounts == volumes.keys()
        used = [
            v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v
        ]
        assert {one["claimName"] for one in used} <= claims


def test_gateway_and_servers_agree() -> None:
    settings = read_settings(DEPLOY / "kubernetes" / "serve.yaml", {})
    engine, (servers,) = settings.engine, objects("StatefulSet")
    count, service = servers["spec"]["replicas"], servers["spec"]["serviceName"]
    assert engine.urls == tuple(f"http://vllm-{k}.{service}:8000" for k in range(count))
    plugin = PluginOptions.read(environment())
    assert plugin is not None
    assert (plugin.slots, plugin.rank) == (engine.module_slots, engine.module_rank)
    assert str(plugin.modules) == engine.modules_folder
    asked = dict(zip(*[iter(plugin.arguments(settings.max_concurrency)[1:])] * 2, strict=True))
    assert asked.items() <= flags().items()
    assert flags()["--max-model-len"] == str(settings.max_length)
    assert container("StatefulSet")["command"][:2] == ["vllm", "serve"]


def test_the_gateway_alone_writes_modules_and_reaches_the_servers() -> None:
    mounts = {m["name"]: m for m in container("StatefulSet")["volumeMounts"]}
    assert mounts["modules"]["readOnly"]
    (gateway,) = objects("Deployment")
    assert gateway["spec"]["replicas"] == 1
    assert gateway["spec"]["strategy"]["type"] == "Recreate"
    (policy,) = objects("NetworkPolicy")
    (rule,) = policy["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "gateway"}}}]


def test_the_servers_image_is_a_tested_vllm_and_this_checkout() -> None:
    lines = (DEPLOY / "kubernetes" / "vllm.Dockerfile").read_text().splitlines()
    (image,) = (line.removeprefix("FROM ") for line in lines if line.startswith("FROM "))
    wanted = [Requirement(text) for text in requires("mergeroute") or ()]
    tested = next(one.specifier for one in wanted if one.name == "vllm")
    assert image.rpartition(":")[2].removeprefix("v") in tested
    assert "COPY . /source" in lines
    assert any("pip install" in line and "/source" in line for line in lines)
    told = [*DEPLOY.rglob("*"), *(DEPLOY.parent / "docs").glob("distributed.md")]
    for file in (file for file in told if file.is_file()):
        assert "pip install mergeroute" not in file.read_text(), file  # whosever that may be


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
def test_vllm_knows_every_flag() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = container("StatefulSet")["args"]
    assert parser.parse_args(arguments).max_loras == 64
    for file in EXAMPLES:
        options = read_settings(file, {}).engine.options
        told = parser.parse_args(list(flag_arguments(options)))
        for name, value in options.items():
            assert getattr(told, name) == value
    ours = PluginOptions(Path("/m"), slots=4, rank=8)
    for mode in ("virtual", "materialise"):
        parser.parse_args(dataclasses.replace(ours, mode=mode).arguments(8))
