"""A vLLM server of our own for tests: started once, tiny, on a free port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeroute.runtime.vllm.launch import PluginOptions

STARTS_WITHIN_S = 280  # under what ends a test that hangs
BASE = "base"


@dataclass(frozen=True)
class VllmServer:
    """A running server. log: what its processes wrote."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of an answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {}

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    def tokens(self, model: str, prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
        """Greedy tokens of a completion."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **settings,
        }
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found


def command(model: Path, options: PluginOptions, port: int, *more: str) -> list[str]:
    """`vllm serve` of the environment that runs the tests."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--served-model-name", BASE, "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"),
        *("--max-model-len", "256", "--max-num-batched-tokens", "512"),
        *options.arguments(32),
        *more,
    ]


def environment(options: PluginOptions) -> dict[str, str]:
    """One thread, one gigabyte of keys and values, nobody called home."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **quiet, **cpu, **options.environment}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def running(
    model: Path,
    options: PluginOptions,
    log: Path,
    *more: str,
    variables: Mapping[str, str] | None = None,
) -> Iterator[VllmServer]:
    """A server that answers until the block ends."""
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(model, options, port, *more),
            env={**environment(options), **(variables or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = VllmServer(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _wait(server: VllmServer) -> None:
    end = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AssertionError(f"vLLM ended:\n{server.log.read_text()[-6000:]}")
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not start in time:\n{server.log.read_text()[-6000:]}")
