"""Where modules may be loaded from: under the roots, whatever the path looks like."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergeroute.adapters.lora import CONFIG_FILE, WEIGHTS_FILE
from mergeroute.serving.errors import ApiError
from mergeroute.serving.modules.paths import module_folder

from ...tiny import make_model, make_module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a module in it, beside a module outside."""
    for folder in ("root/sql", "outside/sql"):
        make_module(make_model(), "sql").save(tmp_path / folder)
    return tmp_path / "root"


def refused(path: str, *roots: Path) -> ApiError:
    with pytest.raises(ApiError) as caught:
        module_folder(path, [place.resolve() for place in roots], name="sql")
    assert caught.value.param == "lora_path"
    return caught.value


def test_relative_and_absolute_paths_under_a_root_are_found(root: Path) -> None:
    for path in ("sql", "./sql", "sql/../sql", str(root / "sql")):
        assert module_folder(path, [root.resolve()], name="sql") == (root / "sql").resolve()
    outside = root.parent / "outside"
    assert module_folder("sql", [outside, root], name="sql") == outside / "sql"
    assert module_folder(str(root / "sql"), [outside, root], name="sql") == root / "sql"


@pytest.mark.parametrize(
    "path", ["..", "../outside/sql", "sql/../../outside/sql", "/", "/etc", "/dev/zero", "/dev"]
)
def test_what_leads_out_is_refused_whether_it_is_there_or_not(root: Path, path: str) -> None:
    error = refused(path, root)
    assert (error.status, error.code) == (400, "adapter_path_forbidden")
    assert refused("../nothing", root).code == "adapter_path_forbidden"


def test_links_out_are_refused_and_links_inside_followed(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "sql")
    assert refused("link", root).code == "adapter_path_forbidden"
    (root / "alias").symlink_to(root / "sql")
    assert module_folder("alias", [root.resolve()], name="sql") == root / "sql"
    (root / "circle").symlink_to(root / "circle")
    assert refused("circle", root).code in ("invalid_lora_adapter", "adapter_path_forbidden")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_a_link_out_a_pipe_or_a_device_is_refused(root: Path, name: str) -> None:
    file = root / "sql" / name
    file.unlink()
    file.symlink_to(root.parent / "outside" / "sql" / name)
    assert refused("sql", root).code == "adapter_path_forbidden"
    file.unlink()
    file.symlink_to("/dev/zero")
    assert refused("sql", root).code == "adapter_path_forbidden"
    file.unlink()
    file.symlink_to(file)
    assert refused("sql", root).code in ("invalid_lora_adapter", "adapter_path_forbidden")
    file.unlink()
    os.mkfifo(file)
    assert "no regular file" in str(refused("sql", root))


def test_a_pipe_in_the_folders_place_is_no_adapter(root: Path) -> None:
    os.mkfifo(root / "pipe")
    assert refused("pipe", root).status == 404


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 5000])
def test_what_is_no_path_is_refused(root: Path, path: str) -> None:
    assert refused(path, root).status == 400


def test_nothing_there_is_404_with_vllms_words(root: Path) -> None:
    error = refused("gone", root)
    assert (error.status, error.code) == (404, "lora_adapter_not_found")
    assert str(error) == "Loading lora sql failed: No adapter found for gone"
    assert refused(f"sql/{WEIGHTS_FILE}", root).status == 404


def test_without_roots_nothing_is_loaded(root: Path) -> None:
    assert "--module-root" in str(refused(str(root / "sql")))


_SEGMENTS = st.sampled_from(
    ["..", ".", "", "sql", "link", "out", "loop", "sql/..", "\0", "/", "~", "x" * 300, "proc"]
)


@example(["loop", "..", "link"], False)
@example(["loop", "..", "out"], True)
@given(st.lists(_SEGMENTS, max_size=8), st.booleans())
def test_whatever_is_written_what_is_found_lies_under_the_root(
    segments: list[str], is_absolute: bool
) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "root"
        (root / "sql").mkdir(parents=True)
        (root / "link").symlink_to("sql")
        (root / "out").symlink_to("..")
        (root / "loop").symlink_to("loop")
        (root / "proc").symlink_to("/proc/self/root")
        path = "/".join(segments)
        with suppress(ApiError):
            found = module_folder(f"{root}/{path}" if is_absolute else path, [root], name="a")
            assert found.resolve() == found
            assert found.is_relative_to(root)
