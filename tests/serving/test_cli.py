"""The command line as users run it: real processes, exit statuses and messages."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank
from mergeroute.serving.cli import main

from ..tiny import make_model, make_module
from .process import MERGEROUTE, serving


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(MERGEROUTE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def bank_path(bank: Bank) -> Path:
    return bank.backbone.path.parent


def test_serve_answers_until_it_is_interrupted(bank_path: Path) -> None:
    server = serving("serve", bank_path, "--dtype", "float32", "--log-format", "json")
    with server as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": "shout the word 7"}],
                max_tokens=3,
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
    assert server.process.returncode == 0
    text = "\n".join(server.lines)
    assert "module zoo:upper: 20 of 21 layers, rank 4" in text
    assert "shout the word" not in text
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert any(entry.get("route") == "/v1/chat/completions" for entry in logged)


def test_serve_loads_modules_from_under_its_roots_alone(bank_path: Path, tmp_path: Path) -> None:
    for folder in ("roots/one", "elsewhere/two"):
        make_module(make_model(), "m", seed=9).save(tmp_path / folder)
    roots = ("--module-root", tmp_path / "roots")
    with serving("serve", bank_path, "--dtype", "float32", *roots) as url:
        load = f"{url}/v1/load_lora_adapter"
        inside = httpx.post(load, json={"lora_name": "one", "lora_path": "one"})
        assert inside.status_code == 200, inside.text
        outside = {"lora_name": "two", "lora_path": str(tmp_path / "elsewhere" / "two")}
        assert httpx.post(load, json=outside).json()["error"]["code"] == "adapter_path_forbidden"
    refused = run("serve", bank_path, "--module-root", tmp_path / "gone")
    assert refused.returncode == 1
    assert "is no folder" in refused.stderr


def test_serve_takes_a_backbone_and_modules(checkpoint: Backbone, tmp_path: Path) -> None:
    make_module(make_model(), "m").save(tmp_path / "m")
    arguments = ("--backbone", checkpoint.path, "--module", f"mine={tmp_path / 'm'}")
    with serving("serve", *arguments, "--name", "ours", "--dtype", "float32") as url:
        ids = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        headers = httpx.post(f"{url}/v1/chat/completions", json=body).headers
    assert ids == ["auto", "tiny", "ours", "mine"]
    assert headers["x-mergeroute-router"] == "none"
    assert headers["x-mergeroute-blend"] == "none"


def test_serve_reads_a_config_whose_paths_are_relative_to_it(
    bank_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "banks").symlink_to(bank_path.parent)
    config = tmp_path / "serve.yaml"
    config.write_text("banks: [banks/zoo]\ndtype: float32\nmax_length: 100\n")
    with serving("serve", "--config", config) as url:
        models = httpx.get(f"{url}/v1/models").json()["data"]
    assert {model["max_model_len"] for model in models} == {100}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The commands run in this process set handlers up that write to a captured stream."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def run_here(arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the command, run in this process to save its start."""
    monkeypatch.setattr(sys, "argv", ["mergeroute", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_route_shows_the_decision(
    bank_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("route", bank_path, "0 1 2 3 4 9", "--dtype", "float32")
    assert run_here((*arguments, "--json"), monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["blend"] == {"digit": 1.0}
    assert run_here(arguments, monkeypatch) == 0
    assert "digit=1" in capsys.readouterr().out


def test_inspect_tells_banks_checkpoints_and_loras_apart(
    bank_path: Path,
    bank: Bank,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    described = {}
    for path in (bank_path, bank.backbone.path, bank.modules[0].path):
        assert run_here(("inspect", path, "--json"), monkeypatch) == 0
        described[path] = json.loads(capsys.readouterr().out)
    assert described[bank_path]["kind"] == "bank"
    assert described[bank_path]["digest"] == bank.digest
    assert [m["name"] for m in described[bank_path]["modules"]] == ["upper", "digit"]
    assert described[bank.backbone.path]["kind"] == "checkpoint"
    assert described[bank.modules[0].path]["kind"] == "LoRA"
    assert len(described[bank.modules[0].path]["layers"]) == 20
    assert run_here(("inspect", bank_path), monkeypatch) == 0
    assert "upper" in capsys.readouterr().out


def test_a_fault_of_the_input_is_one_message_and_status_1(
    bank_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("bank: x\n")
    port_in_use = socket.create_server(("127.0.0.1", 0))
    port = port_in_use.getsockname()[1]
    free = ("--port", 0)
    cases: list[tuple[Sequence[object], str]] = [
        (("serve", tmp_path / "nothing", *free), "is no bank"),
        (("serve", "--config", config), "did you mean banks?"),
        (("serve", "--backbone", tmp_path, *free), "config.json"),
        (("serve", bank_path, "--port", port), "choose another with --port"),
        (("serve", bank_path, "--device", "tpu", *free), "device 'tpu'"),
        (("serve", bank_path, "--dtype", "int3", *free), "dtype 'int3'"),
        (("serve", bank_path, "--max-length", "99999", *free), "the backbone allows 2 to 256"),
        (("inspect", tmp_path), "holds none of"),
    ]
    for arguments, words in cases:
        assert run_here(arguments, monkeypatch) == 1, arguments
        printed = capsys.readouterr()
        assert words in printed.err, (arguments, printed.err)
        assert "Traceback" not in printed.err
        assert printed.out == ""
    port_in_use.close()


def test_a_fault_is_status_1_in_a_real_process_too(tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--nonsense"),
        ("serve",),
        ("serve", "--module", "m=x"),
        ("serve", "x", "--port", "99999"),
        ("serve", "x", "--module", "m=a", "--module", "m=b"),
        ("serve", "x", "--module", "m"),
        ("route",),
        ("serve", "--engine", "x"),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(arguments, monkeypatch) == 2


def test_version_and_help() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").stdout)
    assert "serve" in run("--help").stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mergeroute.serving.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
