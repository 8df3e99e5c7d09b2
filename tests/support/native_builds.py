"""Building the native sources with cmake, for the tests that need more than the installed library."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import ort_ops

NATIVE = Path(ort_ops.__file__).parent / "native"


def run(*command: str | Path, timeout: float = 500, **environment: str) -> str:
    """What the command says, on both streams; a failure shows its beginning (a sanitizer's finding) and its end."""
    finished = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=timeout,
    )
    assert finished.returncode == 0, f"{command}\n{excerpt(finished.stdout)}\n{excerpt(finished.stderr)}"
    return finished.stdout + finished.stderr


def excerpt(text: str, size: int = 4000) -> str:
    return text if len(text) <= 2 * size else f"{text[:size]}\n[...]\n{text[-size:]}"


def tool(name: str) -> str:
    """cmake and ninja: from the path, or skip (pip fetches its own for an ordinary build)."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on the path")
    return found


def build(folder: Path, *options: str) -> None:
    run(tool("cmake"), "-S", NATIVE, "-B", folder, *generator(), *options)
    run(tool("cmake"), "--build", folder, "--parallel", "2")


def generator() -> tuple[str, ...]:
    return ("-G", "Ninja") if shutil.which("ninja") else ()
