"""Guards: nothing vanishes from the wheel, and imports go one way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("serving", "runtime", "routers", "adapters")
"""Left to right: a folder may import itself and those to its right."""


def modules() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every source file with its dotted name, the package's own name left out."""
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            yield path, path.relative_to(ROOT).with_suffix("").parts


def imported(tree: ast.AST, name: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Full dotted names that a module imports, relative ones resolved."""
    package = ("mergeroute", *name[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stated = tuple(node.module.split(".")) if node.module else ()
            outer = package[: len(package) - node.level + 1] if node.level else ()
            yield from ((*outer, *stated, alias.name) for alias in node.names)


def forbidden(tree: ast.AST, name: tuple[str, ...]) -> list[str]:
    """The imports of ours that go the wrong way, or leave the package."""
    allowed = LAYERS[LAYERS.index(name[0]) :]
    found = [target for target in imported(tree, name) if target[0] in ("mergeroute", *LAYERS)]
    return [".".join(t) for t in found if t[0] != "mergeroute" or t[1] not in allowed]


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(("mergeroute", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert len(settings["packages"]) == len(found)
    assert settings["package-dir"] == {f"mergeroute.{layer}": layer for layer in LAYERS}


def test_every_folder_with_source_is_a_package_and_is_typed() -> None:
    assert {path.parent for path, _ in modules() if not (path.parent / "__init__.py").exists()} == (
        set()
    )
    assert [layer for layer in LAYERS if not (ROOT / layer / "py.typed").exists()] == []


def test_type_checkers_see_the_same_folders() -> None:
    for layer in LAYERS:
        link = ROOT / ".typing" / "mergeroute" / layer
        assert link.resolve() == (ROOT / layer).resolve()


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path, name in modules()
        if name[0] == layer and (found := forbidden(ast.parse(path.read_text()), name))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("adapters/x", "from .blend import Blend", []),
        ("adapters/merging/x", "from ..blend import Blend", []),
        ("adapters/x", "from ..runtime.types import A", ["mergeroute.runtime.types.A"]),
        ("adapters/merging/x", "from ...routers import base", ["mergeroute.routers.base"]),
        ("adapters/x", "from .. import serving", ["mergeroute.serving"]),
        ("routers/x", "def f():\n    import mergeroute.runtime.a", ["mergeroute.runtime.a"]),
        ("runtime/x", "from mergeroute.serving import app", ["mergeroute.serving.app"]),
        ("runtime/x", "from mergeroute import adapters, serving", ["mergeroute.serving"]),
        ("runtime/x", "import adapters.blend", ["adapters.blend"]),
        ("runtime/vllm/__init__", "from ..types import A", []),
        ("serving/x", "from ..adapters import a\nfrom ..routers import b\nimport torch", []),
    ],
)
def test_the_guard_itself_sees_every_form_of_import(
    name: str, source: str, found: list[str]
) -> None:
    assert forbidden(ast.parse(source), tuple(name.split("/"))) == found


def test_the_wheel_holds_every_package_and_the_demo_bank(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "*_cache", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("adapters", "routers", "runtime", "serving"):
        files = [
            p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        ]
        assert {f"mergeroute/{p.relative_to(ROOT).as_posix()}" for p in files} <= names
    assert "mergeroute/serving/demo_bank/manifest.json" in names
