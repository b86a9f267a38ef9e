"""docs/config.md is what the settings say, and the example says everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mergeroute.serving.config_docs import document, option_names
from mergeroute.serving.errors import SettingsError, UsageError
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings, section_of

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "serve.yaml"


def test_the_page_is_made_of_the_settings() -> None:
    """Else: python -m mergeroute.serving.config_docs > docs/config.md."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == document()


def fields(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in model.model_fields.items():
        yield before + name, field.description
        if section := section_of(model, name):
            yield from fields(section, f"{before}{name}.")


def test_every_setting_is_described() -> None:
    assert [name for name, said in fields(ServeSettings) if not said] == []


def stated(values: dict[str, object], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield before + name
        if isinstance(value, dict) and name not in ("modules",):
            yield from stated(value, f"{before}{name}.")


def test_the_example_states_everything_and_is_read() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    settings = read_settings(EXAMPLE, {})
    assert [bank.name for bank in settings.open_banks()] == ["zoo"]
    shown = {*stated(yaml.safe_load(text)), "backbone", "modules"}
    assert "# backbone: " in text
    assert "# modules: " in text
    assert shown == {name for name, _ in fields(ServeSettings)}


def test_what_the_example_calls_a_default_is_one() -> None:
    plain = ServeSettings(banks=("zoo",))
    changed = {"banks", "module_memory", "pinned_modules", "state"}
    said = read_settings(EXAMPLE, {"module_roots": (".",)})
    assert {n for n in ServeSettings.model_fields if getattr(said, n) != getattr(plain, n)} == (
        changed
    )


def test_every_option_of_serve_is_a_setting() -> None:
    import typer

    from mergeroute.serving.cli import app

    group = typer.main.get_command(app)
    command = group.commands["serve"]  # type: ignore[attr-defined]
    taken = {p.opts[0] for p in command.params if p.opts[0].startswith("--")}
    inside = {"--vllm-option", "--replicas"}  # of the section engine
    assert taken - {"--config"} - inside == set(option_names().values()) - {"BANK"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("bank: [x]", "bank is no setting: did you mean banks?"),
        ("limits: {body_byte: 1}", "limits.body_byte is no setting: did you mean body_bytes?"),
        ("pressure: {xyzzy: 1}", "pressure.xyzzy is no setting: leave it out; there are max_"),
        ("port: 99999", "port is 99999: it must be less than or equal to 65535; correct it"),
        ("limits: {stops: 17}", "limits.stops is 17: it must be less than or equal to 16; corr"),
        ("max_concurrency: yes", "max_concurrency is true (in YAML also yes, no, on, off)"),
        ("banks: zoo", "banks is 'zoo': it must be a list"),
        ("conversations: sticky", "conversations is 'sticky': it must be keys with values"),
        ("prefetch_modules: 3", "prefetch_modules is 3: it must be a list or it must be 'all'"),
        ("module_memory: much", "module_memory: 'much' is no size: write 2MB"),
    ],
)
def test_a_fault_names_file_key_value_rule_and_remedy(tmp_path: Path, said: str, told: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(said if "banks:" in said else f"banks: [zoo]\n{said}")
    with pytest.raises(SettingsError) as caught:
        read_settings(file, {})
    assert str(caught.value).startswith(f"{file}: {told}")
    assert not isinstance(caught.value, UsageError)


def test_all_faults_are_told_at_once_and_the_command_lines_as_wrong_usage(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("banks: [zoo]\nportt: 1\nlimits: {stops: 17, body_byte: 2}")
    with pytest.raises(SettingsError) as caught:
        read_settings(file, {})
    assert len(str(caught.value).splitlines()) == 3
    file.write_text("banks: [zoo]")
    with pytest.raises(UsageError, match="port is 99999"):
        read_settings(file, {"port": 99999})
