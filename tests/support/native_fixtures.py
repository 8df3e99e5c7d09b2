"""Fixtures of the tests that need the native library or a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_builds import build

from ort_ops.library import LibraryNotFoundError, get_library_path


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((name for name in candidates if name and shutil.which(name)), None)


@pytest.fixture(scope="session")
def cxx_compiler() -> str:
    """A C++ compiler; its absence skips the test."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) on this machine")
    return compiler


@pytest.fixture(scope="session")
def plain_build(tmp_path_factory: pytest.TempPathFactory, cxx_compiler: str) -> Path:
    """A build folder with the library and the C++ tests."""
    folder = tmp_path_factory.mktemp("plain_build")
    build(folder, "-DTRIX_BUILD_TESTS=ON")
    return folder


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skips only where the library cannot be had: with a compiler, a missing library is a failure."""
    try:
        get_library_path()
    except LibraryNotFoundError as error:
        if find_compiler() is None:
            pytest.skip(f"no C++ compiler on this machine: {error}")
        raise


def has_instruction_set(isa: str) -> bool:
    """Whether the library and this CPU can run these kernels."""
    finished = subprocess.run(
        [sys.executable, "-c", "from ort_ops.library import session_options; session_options()"],
        capture_output=True,
        env=os.environ | {"TRIX_ORT_ISA": isa},
    )
    return finished.returncode == 0
