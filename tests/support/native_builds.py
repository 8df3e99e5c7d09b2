"""Building the native sources with cmake, for the tests that need more than the installed library."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import ort_ops

NATIVE = Path(ort_ops.__file__).parent / "native"


def run(*command: str | Path, timeout: float = 500, **environment: str) -> str:
    """What the command says, on both streams; a failure shows the end of it."""
    finished = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=timeout,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout + finished.stderr


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
