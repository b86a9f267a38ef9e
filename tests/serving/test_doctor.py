"""What `mergeroute doctor` says of what is sound, and of everything that is not."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.key_file import add_key
from mergeroute.serving.access.keys import Key, new_token, token_hash
from mergeroute.serving.cli import DEMO_BANK, main
from mergeroute.serving.doctor import examine
from mergeroute.serving.doctor_machine import check_host, check_installation
from mergeroute.serving.findings import Finding
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.settings import ServeSettings

from ..tiny import make_model, make_module, make_rich_module


@pytest.fixture(scope="module")
def bank_path(bank: Bank) -> Path:
    return bank.backbone.path.parent


def settings(**values: object) -> ServeSettings:
    plain = {"port": 0, "dtype": "float32", "module_roots": ["/"], "state": "none"}
    return ServeSettings.model_validate(plain | values)


def told(findings: Sequence[Finding], subject: str) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in findings if f.subject.partition(" ")[0] == subject]


def levels(findings: Sequence[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def fast(**values: object) -> list[Finding]:
    return list(examine(settings(**values), loads=False))


def test_the_installation_is_in_order_here() -> None:
    findings = list(check_installation())
    assert {f.level for f in findings} <= {"ok", "note"}, findings
    assert {"python", "packages", "extra text"} <= {f.subject for f in findings}
    assert "extra dev" not in {f.subject for f in findings}


def test_a_sound_bank_is_loaded_and_has_no_errors(bank_path: Path) -> None:
    findings = list(examine(settings(banks=[str(bank_path)])))
    assert "error" not in levels(findings), findings
    ((level, text),) = told(findings, "load")
    assert level == "ok"
    assert "attention gives the model's own logits" in text
    assert ("ok", "20 of 21 layers, rank 4") in [
        (level, text.split(", 0.")[0]) for level, text in told(findings, "module")
    ]
    assert told(findings, "router") == [
        ("ok", "was fitted on this backbone, and names its modules alone")
    ]


def test_variants_of_declared_experiments_are_asked_for(bank_path: Path) -> None:
    def declared(name: str, target: str) -> dict[str, object]:
        variants = [
            {"name": "old", "target": "tiny", "weight": 0.5, "control": True},
            {"name": "new", "target": target, "weight": 0.5},
        ]
        return {"name": name, "variants": variants}

    documents = [declared("sound", "upper"), declared("gone", "uper")]
    findings = list(examine(settings(banks=[str(bank_path)], experiments=documents)))
    sound, gone = told(findings, "experiments")
    assert sound == ("ok", "sound: all variants can answer")
    assert gone[0] == "warning"
    assert gone[1].startswith("gone: the variant 'new' cannot answer: ")
    assert "'uper'" in gone[1]


def run(arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mergeroute", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_prints_json_and_fails_after_an_error(
    bank_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = ("--port", 0)
    assert run(("doctor", bank_path, "--fast", "--json", *port), monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert {"level", "subject", "text"} == set(document["findings"][0])
    assert run(("doctor", tmp_path, "--fast", *port), monkeypatch) == 1
    printed = capsys.readouterr().out
    assert f"error    banks: {tmp_path} is no bank" in printed
    assert printed.splitlines()[-1] == "1 error, 0 warnings"
    config = tmp_path / "serve.yaml"
    config.write_text("bank: x")
    assert run(("doctor", "--config", config, "--json"), monkeypatch) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert any("did you mean banks?" in finding["text"] for finding in found)
    assert any(finding["subject"] == "python" for finding in found)
    assert run(("doctor", "x", "--port", 99999), monkeypatch) == 2


def test_a_damaged_bank_is_told_by_its_file(bank_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "zoo"
    shutil.copytree(bank_path, broken)
    weights = broken / "modules" / "upper" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    ((level, text),) = told(fast(banks=[str(broken)]), "banks")
    assert level == "error"
    assert "upper/adapter_model.safetensors" in text


def test_complaint_10_what_cannot_be_served_is_told_before_serving(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    """A DoRA module, one of another base and one that is there; the others are still looked at."""
    modules = {}
    for name in ("good", "dora", "foreign"):
        model = make_model(hidden_size=16) if name == "foreign" else make_model()
        make_module(model, name).save(tmp_path / name)
        modules[name] = str(tmp_path / name)
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    findings = list(examine(settings(backbone=str(checkpoint.path), modules=modules)))
    said = {f.subject.rpartition(":")[2]: f for f in findings if ":" in f.subject}
    assert {name: finding.level for name, finding in said.items()} == {
        "good": "ok",
        "dora": "error",
        "foreign": "error",
    }
    assert "DoRA" in said["dora"].text
    assert "another base" in said["foreign"].text
    ((level, text),) = told(findings, "load")
    assert level == "note"
    assert "put right first" in text


def test_what_vllm_would_refuse_is_noted(checkpoint: Backbone, tmp_path: Path) -> None:
    make_rich_module(make_model(), "rich").save(tmp_path / "rich")
    modules = {"rich": str(tmp_path / "rich")}
    findings = fast(backbone=str(checkpoint.path), modules=modules)
    assert any(
        "vLLM would refuse it (rich changes emb" in text for _, text in told(findings, "bank")
    )
    assert any("as vLLM and others read them" in f.text for f in fast(banks=[str(DEMO_BANK)]))


def test_memory_that_is_not_there_is_an_error(bank_path: Path) -> None:
    findings = list(examine(settings(banks=[str(bank_path)], max_concurrency=10**9)))
    ((level, text),) = told(findings, "memory")
    assert level == "error"
    assert "lower max_concurrency" in text
    assert told(findings, "load")[0][0] == "note"


def test_the_memory_is_about_what_the_engine_takes(bank_path: Path) -> None:
    """16 slots of 256 tokens, 3 layers, 2 heads of 8, keys and values in float32."""
    ((_, text),) = told(fast(banks=[str(bank_path)]), "memory")
    cache_bytes = 2 * 16 * 256 * 3 * 2 * 8 * 4
    assert f"{cache_bytes / 1e6:.1f} MB keys and values" in text


def test_a_budget_that_no_module_fits_is_an_error(bank_path: Path) -> None:
    findings = fast(banks=[str(bank_path)], module_memory=100)
    assert ("error", True) in [(lv, "module_memory" in t) for lv, t in told(findings, "module")]


@pytest.mark.parametrize("field", ["pinned_modules", "prefetch_modules"])
def test_a_name_that_no_bank_has_is_an_error(bank_path: Path, field: str) -> None:
    findings = fast(banks=[str(bank_path)], module_memory=10**9, **{field: ["nope"]})
    ((level, text),) = told(findings, "modules")
    assert level == "error"
    assert "'nope'" in text
    known = fast(banks=[str(bank_path)], module_memory=10**9, **{field: ["upper", "zoo:upper"]})
    assert told(known, "modules") == []


def test_a_router_of_another_backbone_is_an_error(bank_path: Path, tmp_path: Path) -> None:
    from mergeroute.serving.doctor_bank import check_bank

    opened = Bank.open(bank_path)
    shutil.copytree(bank_path / "router", tmp_path / "router")
    file = tmp_path / "router" / "router.json"
    text = file.read_text().replace(opened.backbone.digest, "sha256:" + "0" * 64)
    file.write_text(text)
    from dataclasses import replace

    found = list(
        check_bank(replace(opened, router_path=tmp_path / "router"), settings(banks=["x"]))
    )
    findings = [one for one in found if isinstance(one, Finding)]
    assert told(findings, "router")[0][0] == "error"


def test_a_backbone_without_chat_template_is_a_warning(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint.path, plain)
    (plain / "chat_template.jinja").unlink()
    found = told(fast(backbone=str(plain)), "tokenizer")
    assert any(level == "warning" and "chat template" in text for level, text in found)


def test_no_such_device_is_an_error_and_nothing_else_is_looked_at(bank_path: Path) -> None:
    findings = fast(banks=[str(bank_path)], device="cuda:99")
    assert findings[-1].level == "error"
    assert "cuda:99" in findings[-1].text


def host(**values: object) -> list[Finding]:
    return list(check_host(settings(banks=["x"], **values)))


def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ((level, text),) = told(host(port=taken.getsockname()[1]), "address")
    assert level == "error"
    assert "--port" in text


def test_an_open_address_without_keys_is_a_warning(tmp_path: Path) -> None:
    assert [level for level, _ in told(host(host="0.0.0.0"), "address")] == ["ok", "warning"]
    keys = write_keys(tmp_path / "keys.yaml")
    found = host(host="0.0.0.0", api_keys=str(keys))
    assert [level for level, _ in told(found, "address")] == ["ok"]


def write_keys(path: Path, **values: object) -> Path:
    plain = {"name": "k", "hash": token_hash(new_token().encode())}
    add_key(path, Key.model_validate(plain | values))
    return path


def test_keys_are_counted_and_their_file_is_looked_at(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", scopes=["admin"])
    assert told(host(api_keys=str(keys)), "keys") == [
        ("ok", f"{keys}: 1 valid, 1 of them with scope admin")
    ]
    keys.chmod(0o644)
    assert told(host(api_keys=str(keys)), "keys")[1][1].endswith(f"chmod 600 {keys}")
    keys.chmod(0o622)
    assert told(host(api_keys=str(keys)), "keys")[0][0] == "error"
    old = write_keys(tmp_path / "old.yaml", expires="2020-01-01")
    assert [level for level, _ in told(host(api_keys=str(old)), "keys")] == ["ok"] + ["warning"] * 2
    assert told(host(api_keys=str(tmp_path / "gone.yaml")), "keys")[0][0] == "error"


def test_the_state_folder_is_looked_at_and_not_made(tmp_path: Path) -> None:
    new = tmp_path / "a" / "state"
    assert told(host(state=str(new)), "state") == [("ok", f"{new} will be made")]
    assert not new.parent.exists()
    held = StateFolder(new)
    ((level, text),) = told(host(state=str(new)), "state")
    assert level == "error"
    assert "another server" in text
    held.close()
    assert told(host(state=str(new)), "state")[0][0] == "ok"
    (new / "modules.json").write_text("{")
    assert told(host(state=str(new)), "state")[0][0] == "error"
    assert told(host(module_sources={"uploads": True}), "state")[0][0] == "error"
    assert told(host(database="sqlite:///trial.sqlite"), "state")[0][0] == "error"


def test_module_roots_must_be_there_and_not_everybodys(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    roots = [str(tmp_path / "gone"), str(open_to_all), str(tmp_path)]
    found = told(host(module_roots=roots), "module")
    assert [level for level, _ in found] == ["error", "warning", "ok"]


def test_too_few_open_files_are_a_warning() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limit[1]))
    try:
        ((level, text),) = told(host(), "open")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert level == "warning"
    assert "ulimit -n 4352" in text
