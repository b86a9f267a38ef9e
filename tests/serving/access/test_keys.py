"""API keys and the file they are kept in."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.access.callers import Caller
from mergeroute.serving.access.key_file import (
    KeyFileError,
    KeyRing,
    add_key,
    read_keys,
    revoke_key,
)
from mergeroute.serving.access.keys import Key, find_key, new_token, token_hash
from mergeroute.serving.access.redaction import without_keys

from ..process import MERGEROUTE


def key(name: str, token: str, **values: object) -> Key:
    return Key.model_validate({"name": name, "hash": token_hash(token.encode()), **values})


@given(st.binary(max_size=64))
def test_only_the_token_itself_is_the_key(other: bytes) -> None:
    token = new_token()
    keys = [key(f"k{n}", new_token()) for n in range(3)] + [key("mine", token)]
    found = find_key(keys, token.encode())
    assert found is not None
    assert found.name == "mine"
    assert find_key(keys, other) is None
    assert find_key((), token.encode()) is None


def test_an_expired_key_is_none(tmp_path: Path) -> None:
    now, token = datetime.now(UTC), new_token()
    assert find_key([key("a", token, expires=now - timedelta(seconds=1))], token.encode()) is None
    assert find_key([key("a", token, expires=now + timedelta(hours=1))], token.encode())
    naive = key("a", token, expires=datetime(2999, 1, 1))
    assert naive.expires == datetime(2999, 1, 1, tzinfo=UTC)


def test_keys_are_added_and_revoked_and_the_token_is_nowhere(tmp_path: Path) -> None:
    file, token = tmp_path / "keys.yaml", new_token()
    full = key("a", token, scopes=["admin", "inference"], targets=["sql"], tokens_per_minute=9)
    add_key(file, full)
    add_key(file, key("b", new_token(), expires=datetime(2999, 1, 1, tzinfo=UTC)))
    assert read_keys(file)[0] == full
    assert [k.name for k in read_keys(file)] == ["a", "b"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    with pytest.raises(KeyFileError, match="'a' is there twice"):
        add_key(file, key("a", new_token()))
    revoke_key(file, "a")
    assert [k.name for k in read_keys(file)] == ["b"]
    with pytest.raises(KeyFileError, match=r"no key 'a'.*: b"):
        revoke_key(file, "a")
    assert sorted(tmp_path.iterdir()) == [file]


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    makers = [
        threading.Thread(target=add_key, args=(file, key(f"k{n}", new_token()))) for n in range(20)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(read_keys(file)) == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {name: a, hash: mr-SECRETSECRET}", "entry 1, hash"),
        ("- {name: a, hash: mr-SECRETSECRET", "no YAML in line"),
        ("- {name: a, mr-SECRETSECRET: 1}", "entry 1"),
        ("keys: mr-SECRETSECRET", "the file"),
        ("mr-SECRETSECRET", "the file"),
        ("- {name: 'a b', hash: 'sha256:" + "0" * 64 + "'}", "entry 1, name"),
        ("- {name: a, hash: 'sha256:" + "0" * 64 + "', scopes: [mr-SECRETSECRET]}", "scopes"),
        ("- {name: a, hash: 'sha256:" + "0" * 64 + "', requests_per_minute: 0}", "requests"),
        ("!!python/object/apply:os.system [mr-SECRETSECRET]", "no YAML"),
        ("\x00", "no YAML"),
    ],
)
def test_a_damaged_file_is_refused_without_showing_what_is_in_it(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=words) as caught:
        read_keys(file)
    assert "SECRET" not in str(caught.value)


def test_a_file_that_others_may_write_is_refused_and_one_they_may_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    add_key(file, key("a", new_token()))
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_keys(file)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert read_keys(file)
    assert "may be read by everybody" in caplog.text
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_keys(tmp_path / "gone.yaml")
    os.mkfifo(tmp_path / "pipe", 0o600)


def test_a_ring_follows_its_file_and_keeps_its_keys_when_it_breaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    file = tmp_path / "keys.yaml"
    add_key(file, key("a", new_token()))
    ring = KeyRing(file, clock=lambda: now[0])
    add_key(file, key("b", new_token()))
    assert not ring.is_stale()  # looked at a moment ago
    now[0] += 1.1
    assert ring.is_stale()
    ring.reload()
    assert [k.name for k in ring.keys] == ["a", "b"]
    for damage in (lambda: file.write_text("]"), file.unlink):
        damage()
        now[0] += 1.1
        assert ring.is_stale()
        ring.reload()
        assert [k.name for k in ring.keys] == ["a", "b"]
        assert "stay valid" in caplog.text
        caplog.clear()
        now[0] += 1.1
        assert not ring.is_stale()  # told once


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_key_stays_in_a_log_line(before: str, after: str) -> None:
    token = new_token()
    assert token not in without_keys(f"{before} {token}?{after}")
    fingerprint = "mr-0123456789ab-0123456789ab"
    assert without_keys(fingerprint) == fingerprint


def test_the_commands(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    def said(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(MERGEROUTE), "key", *arguments, "--file", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done

    token = said("create", "team", "--scope", "admin", "--target", "sql").stdout.strip()
    found = find_key(read_keys(file), token.encode())
    assert found is not None
    assert found.caller == Caller("team", frozenset(("admin",)), frozenset(("sql",)))
    listed = said("list", "--json").stdout
    assert [entry["name"] for entry in json.loads(listed)] == ["team"]
    assert "sha256" not in listed
    assert "is there twice" in said("create", "team", code=1).stderr
    assert "names no key" in said("create", "a b", code=2).stderr
    over = said("create", "old", "--expires", "2020-01-01", code=2)
    assert "2020-01-01 00:00:00 (UTC) is over" in over.stderr
    assert over.stdout == ""
    said("revoke", "team")
    assert read_keys(file) == ()
