"""The journal: what was appended is found, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeroute.serving.errors import SettingsError
from mergeroute.serving.experiments.journal import Journal, JournalFullError
from mergeroute.serving.experiments.records import Record, from_line, to_line

from .recorded import exposure, one_of_each, stored_request


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty one."""
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


def drain(journal: Journal) -> list[Record]:
    """All that is in it."""
    found: list[Record] = []
    while batch := journal.read():
        found.extend(batch.records)
        journal.drained(batch)
    return found


def lines(folder: Path) -> list[bytes]:
    """All files of a journal, one after the other."""
    return [line for path in sorted(folder.glob("0*")) for line in path.read_bytes().splitlines()]


def test_records_come_out_as_they_went_in(journal: Journal) -> None:
    given = [record for name in "abc" for record in one_of_each(name)]
    for record in given:
        journal.append(record)
    assert journal.backlog == 15
    assert drain(journal) == given
    assert (journal.backlog, journal.backlog_bytes) == (0, 0)
    assert journal.read() is None


def test_what_is_not_drained_is_there_after_a_restart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        journal = Journal(tmp_path)
        journal.append(exposure(name))
        assert [record.request_id for record in journal.pending()] == list("ab"[: ord(name) - 96])
        journal.close()
    journal = Journal(tmp_path)
    journal.append(exposure("c"))
    assert journal.backlog == 3
    assert [record.request_id for record in drain(journal)] == ["a", "b", "c"]
    journal.close()
    assert list(tmp_path.glob("0*")) == []


def test_what_was_read_and_not_drained_is_read_again(journal: Journal) -> None:
    journal.append(exposure("a"))
    first = journal.read()
    assert first == journal.read()


def test_files_go_as_they_are_drained(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    long = stored_request("a", body="x" * 1_000_000)
    for _ in range(12):
        journal.append(long)
    assert len(list(tmp_path.glob("0*"))) == 3
    assert len(drain(journal)) == 12
    assert len(list(tmp_path.glob("0*"))) == 1
    journal.close()


def test_one_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for _ in range(10):
        journal.append(stored_request("a", body="x" * 1_000_000))
        drain(journal)
    assert sum(path.stat().st_size for path in tmp_path.glob("0*")) < 6_000_000
    journal.close()


def test_it_is_bounded_and_keeps_the_oldest(tmp_path: Path) -> None:
    size = len(to_line(exposure("a")))
    journal = Journal(tmp_path, limit_bytes=3 * size)
    for name in "abc":
        journal.append(exposure(name))
    with pytest.raises(JournalFullError, match="bring the database back") as caught:
        journal.append(exposure("d"))
    assert (caught.value.status, journal.dropped) == (503, 1)
    assert [record.request_id for record in drain(journal)] == ["a", "b", "c"]
    journal.append(exposure("e"))
    with pytest.raises(JournalFullError):
        journal.append(exposure("f"), share=0.5)
    journal.close()


def test_a_last_line_without_its_end_is_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(exposure("a"))
    journal.close()
    (path,) = tmp_path.glob("0*")
    path.write_bytes(path.read_bytes() + to_line(exposure("b"))[:-9])
    journal = Journal(tmp_path)
    journal.append(exposure("c"))
    assert [record.request_id for record in drain(journal)] == ["a", "c"]
    assert journal.refused == 0
    journal.close()


def test_a_line_that_holds_no_record_is_kept_aside(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(exposure("a"))
    journal.close()
    (path,) = tmp_path.glob("0*")
    path.write_bytes(b"\0\0\0\n" + path.read_bytes() + b"{}\n")
    journal = Journal(tmp_path)
    assert [record.request_id for record in journal.pending()] == ["a"]
    assert [record.request_id for record in drain(journal)] == ["a"]
    assert (journal.refused, journal.backlog) == (2, 0)
    assert (tmp_path / "refused.jsonl").read_bytes() == b"\0\0\0\n{}\n"
    journal.close()


def test_threads_append_at_once(journal: Journal) -> None:
    def append(thread: int) -> None:
        for number in range(200):
            journal.append(exposure(f"{thread}-{number}"))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found = drain(journal)
    for thread in threads:
        thread.join()
    found += drain(journal)
    assert len({record.request_id for record in found}) == len(found) == 800
    for number in range(4):
        own = [r.request_id for r in found if r.request_id.startswith(f"{number}-")]
        assert own == [f"{number}-{each}" for each in range(200)]


def test_a_journal_has_one_owner(journal: Journal) -> None:
    with pytest.raises(SettingsError, match="another process keeps its journal"):
        Journal(journal.folder)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be used"):
        Journal(tmp_path / "file")


def test_a_folder_that_is_taken_away_is_drained_still(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(exposure("a"))
    (tmp_path / "journal").rename(tmp_path / "elsewhere")
    journal.append(exposure("b"))
    assert [record.request_id for record in drain(journal)] == ["a", "b"]
    journal.close()


def test_a_file_that_cannot_be_followed_by_another_is_drained(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for _ in range(4):
        journal.append(stored_request("a", body="x" * 1_100_000))
    (tmp_path / "journal").rename(tmp_path / "elsewhere")
    assert len(drain(journal)) == 4
    assert (journal.backlog, journal.backlog_bytes) == (0, 0)
    with pytest.raises(JournalFullError, match="make room"):
        journal.append(exposure("a"))
    (tmp_path / "elsewhere").rename(tmp_path / "journal")
    journal.append(exposure("b"))
    assert drain(journal) == [exposure("b")]
    journal.close()


def test_a_full_disk_takes_no_part_of_a_record(tmp_path: Path) -> None:
    line = to_line(exposure("a"))
    child = _child(f"limit({2 * len(line) + 10})", "append('a')", "append('b')", "append('c')")
    told = subprocess.run([sys.executable, "-c", child, tmp_path], capture_output=True, timeout=60)
    assert told.stdout.decode().split() == ["a", "b", "full"], told.stderr.decode()[-2000:]
    assert [from_line(each) for each in lines(tmp_path)] == [exposure("a"), exposure("b")]


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    child = _child("import itertools", "for n in itertools.count(): append(str(n))")
    process = subprocess.Popen([sys.executable, "-c", child, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(2000)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().splitlines(keepends=True)
    process.wait(30)
    process.stdout.close()
    told = [int(line) for line in acknowledged if line.endswith(b"\n")]
    journal = Journal(tmp_path)
    found = [int(record.request_id) for record in drain(journal)]
    journal.close()
    assert found == list(range(len(found)))
    assert len(told) <= len(found) <= len(told) + 1


def _child(*statements: str) -> str:
    """A program that keeps a journal in the folder it is told, and says what was appended."""
    return "\n".join(
        [
            "import resource, signal, sys",
            "from pathlib import Path",
            "from mergeroute.serving.experiments.journal import Journal, JournalFullError",
            "from tests.serving.experiments.recorded import exposure",
            "journal = Journal(Path(sys.argv[1]))",
            "def append(name):",
            "    try: journal.append(exposure(name))",
            "    except JournalFullError: name = 'full'",
            "    print(name, flush=True)",
            "def limit(size):",
            "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))",
            *statements,
        ]
    )
