"""`mergeroute serve --engine vllm`, with a program in vLLM's place: from its start to its end."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from unittest.mock import ANY

import httpx
import psutil
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.doctor import examine
from mergeroute.serving.settings_file import read_settings

from ...runtime.vllm.fleet import fake_command, wait_for
from ..process import serving


def settings(tmp_path: Path, bank: Bank, **options: object) -> Path:
    path = tmp_path / "serve.yaml"
    engine = {"kind": "vllm", "replicas": 2, "command": fake_command(tmp_path), "options": options}
    folder = bank.modules[0].path.parents[1]
    values = {"banks": [str(folder)], "dtype": "float32", "engine": engine, "state": "none"}
    path.write_text(json.dumps(values))
    return path


def family(server: serving) -> list[psutil.Process]:
    return list(psutil.Process(server.process.pid).children(recursive=True))


def test_told_to_stop_it_drains_and_leaves_nothing(tmp_path: Path, bank: Bank) -> None:
    server = serving("serve", "--config", settings(tmp_path, bank), "--vllm-option", "token_s=0.05")
    lines: list[str] = []
    begun = threading.Event()

    def follow(url: str) -> None:
        body = {"model": "upper", "prompt": "x", "max_tokens": 30, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                begun.set()
                lines.append(line)

    with server as url:
        started = family(server)
        assert len(started) == 4  # a keeper and a server, twice
        assert httpx.get(url + "/ready").status_code == 200
        asking = threading.Thread(target=follow, args=(url,))
        asking.start()
        assert begun.wait(20)
        server.process.send_signal(signal.SIGTERM)
        asking.join()
        assert list(filter(None, lines))[-1] == "data: [DONE]"
        assert server.process.wait(20) == 0
    wait_for(lambda: not any(process.is_running() for process in started))
    assert any("2 vLLM servers" in line for line in server.lines)


def test_killed_it_leaves_nothing(tmp_path: Path, bank: Bank) -> None:
    server = serving("serve", "--config", settings(tmp_path, bank))
    with server:
        started = family(server)
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not any(process.is_running() for process in started))


def findings(config: Path, **said: object) -> list[tuple[str, str]]:
    found = examine(read_settings(config, said))
    return [(one.level, one.text) for one in found if one.subject in ("engine", "load")]


def test_the_doctor_tries_what_it_can(tmp_path: Path, bank: Bank) -> None:
    config = settings(tmp_path, bank)
    (_, told), (level, text) = findings(config, port=0)
    assert str(tmp_path / "vllm") in told
    assert (level, "modules fit, routers run" in text) == ("ok", True)
    engine = {"kind": "vllm", "command": "no-such-vllm"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "engine": engine}))
    assert findings(config, port=0) == [("error", ANY)]
    assert "vLLM is not installed here" in findings(config, port=0)[0][1]
    assert "make vllm" in findings(config, port=0)[0][1]


@pytest.mark.parametrize("is_there", [False, True])
def test_the_doctor_looks_at_servers_of_others(tmp_path: Path, bank: Bank, is_there: bool) -> None:
    if is_there:
        (tmp_path / "modules").mkdir()
    engine = {"kind": "vllm", "urls": ["http://127.0.0.1:9"], "modules_folder": "modules"}
    config = tmp_path / "serve.yaml"
    folder = bank.modules[0].path.parents[1]
    config.write_text(json.dumps({"banks": [str(folder)], "engine": engine}))
    (level, text), (other, told), (note, _) = findings(config, port=0)
    assert (level, note) == ("error", "note")
    assert "http://127.0.0.1:9 cannot be reached, or is not well: start it" in text
    assert (other, "MERGEROUTE_VLLM_MODULES" in told) == (
        ("ok", False) if is_there else ("error", True)
    )
