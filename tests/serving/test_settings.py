"""serve.yaml and the options over it: what conversations keep, and where modules come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.routers.conversation import Stickiness
from mergeroute.serving.errors import SettingsError
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(f"banks: [zoo]\n{text}\n")
    return path


def test_conversations_and_roots_arrive_in_the_service(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    said = "{mode: each-turn, margin: 0.25, sessions: 5, idle_minutes: 0.5}"
    file = write(tmp_path, f"conversations: {said}\nmodule_roots: [loras, {tmp_path}]")
    options = read_settings(file, {}).service_options
    assert options.stickiness == Stickiness("each-turn", 0.25)
    assert (options.sessions, options.idle_s) == (5, 30.0)
    assert options.module_roots == (tmp_path / "loras", tmp_path)


def test_the_defaults_are_the_services_own_and_the_current_folder() -> None:
    options = ServeSettings(banks=("zoo",)).service_options
    assert options.stickiness == Stickiness("sticky", 0.5)
    assert (options.sessions, options.idle_s) == (10_000, 3600.0)
    assert [root.resolve() for root in options.module_roots] == [Path.cwd()]


def test_the_command_lines_roots_take_the_files_place(tmp_path: Path) -> None:
    file = write(tmp_path, "module_roots: [gone]")
    settings = read_settings(file, {"module_roots": (str(tmp_path),)})
    assert settings.service_options.module_roots == (tmp_path,)


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="gone is no folder"):
        _ = read_settings(write(tmp_path, "module_roots: [gone]"), {}).service_options


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{mode: often}", "conversations.mode"),
        ("{margin: 2}", "conversations.margin"),
        ("{margin: .nan}", "conversations.margin"),
        ("{sessions: -1}", "conversations.sessions"),
        ("{idle_minutes: 0}", "conversations.idle_minutes"),
        ("{idle: 1}", "conversations.idle"),
        ("sticky", "conversations"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path: Path, said: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_settings(write(tmp_path, f"conversations: {said}"), {})


@pytest.mark.parametrize(
    "origin",
    [
        "app.example",
        "https://app.example/",
        "https://App.example",
        "https://app.example:443",
        "https://a b",
        "null",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(tmp_path: Path, origin: str) -> None:
    with pytest.raises(SettingsError, match=r"cors_origins: .*scheme://host"):
        read_settings(write(tmp_path, f"cors_origins: ['{origin}']"), {})


@pytest.mark.parametrize(
    "origin", ["*", "https://app.example", "http://localhost:3000", "http://[::1]:8080"]
)
def test_an_origin_is_taken_as_it_is(tmp_path: Path, origin: str) -> None:
    settings = read_settings(write(tmp_path, f"cors_origins: ['{origin}']"), {})
    assert settings.cors_origins == (origin,)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("pressure", "watchdog_seconds"),
        ("limits", "body_seconds"),
        ("conversations", "idle_minutes"),
    ],
)
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_without_end_is_refused(
    tmp_path: Path, section: str, key: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=rf"{section}\.{key} is (inf|nan): .*finite"):
        read_settings(write(tmp_path, f"{section}: {{{key}: {value}}}"), {})


@pytest.mark.parametrize("text", ["port: 1\nport: 2", "limits: {stops: 1, stops: 2}"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"serve.yaml cannot be read: .*twice: keep one"):
        read_settings(write(tmp_path, text), {})
