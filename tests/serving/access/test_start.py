"""How a server starts: with keys, without, and where others reach it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.key_file import KeyFileError
from mergeroute.serving.access.limits import DEFAULT_LIMITS
from mergeroute.serving.errors import SettingsError
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings

from ..process import serving
from .conftest import make_key


def folder_of(bank: Bank) -> Path:
    """Where a bank with a router lies."""
    assert bank.router_path is not None
    return bank.router_path.parent


def test_a_server_that_others_reach_says_that_it_is_open_and_lets_nobody_administer(
    bank: Bank, tmp_path: Path
) -> None:
    server = serving("serve", folder_of(bank), "--host", "0.0.0.0", "--module-root", tmp_path)
    with server as url:
        local = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{local}/v1/models", trust_env=False).status_code == 200
        body = {"lora_name": "digit"}
        refused = httpx.post(f"{local}/v1/unload_lora_adapter", json=body, trust_env=False)
        assert refused.status_code == 403
    assert any("anybody who reaches 0.0.0.0 may use the models" in line for line in server.lines)


def test_a_server_with_keys_logs_none_of_them(bank: Bank, tmp_path: Path) -> None:
    token = make_key(tmp_path / "keys.yaml", "a")
    file = tmp_path / "serve.yaml"
    file.write_text(f"banks: [{folder_of(bank)}]\napi_keys: keys.yaml\n")
    server = serving("serve", "--config", file)
    with server as url:
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        sent = {"Authorization": f"Bearer {token}"}
        asked = f"{url}/v1/models?api_key={token}"
        assert httpx.get(asked, headers=sent, trust_env=False).status_code == 200
    assert any("/v1/models" in line for line in server.lines)
    assert not any(token in line for line in server.lines)


def test_settings_say_who_is_let_in_and_how_much(tmp_path: Path) -> None:
    make_key(tmp_path / "keys.yaml", "a")
    file = tmp_path / "serve.yaml"
    file.write_text(
        "banks: [zoo]\napi_keys: keys.yaml\ncors_origins: ['https://a.example']\n"
        "limits: {prompts: 2, module_rank: 64}\n"
    )
    settings = read_settings(file, {})
    policy = settings.policy(is_exposed=True)
    assert policy.keys is not None
    assert [key.name for key in policy.keys.keys] == ["a"]
    assert policy.cors_origins == ("https://a.example",)
    assert settings.service_options.limits.prompts == 2
    assert ServeSettings(banks=("zoo",)).service_options.limits == DEFAULT_LIMITS
    with pytest.raises(KeyFileError, match="cannot be read"):
        ServeSettings(banks=("zoo",), api_keys="gone.yaml").policy(is_exposed=False)
    file.write_text("banks: [zoo]\nlimits: {prompts: 0}\n")
    with pytest.raises(SettingsError, match="prompts"):
        read_settings(file, {})
