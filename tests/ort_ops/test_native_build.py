"""Building the native library: its C++ tests, what it exports, and an installation without a compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import ort_ops
from ort_ops.library import get_library_path

NATIVE = Path(ort_ops.__file__).parent / "native"


def run(*command: str | Path, **environment: str) -> str:
    finished = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=500,
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


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory, cxx_compiler: str) -> Path:
    folder = tmp_path_factory.mktemp("native_build")
    build(folder, "-DTRIX_BUILD_TESTS=ON")
    return folder


def test_cpp_tests_pass(build_folder: Path) -> None:
    output = run(build_folder / "kernel_tests")
    assert output.endswith("0 failures\n")
    assert output.count("ran ") >= 2, output


def test_register_custom_ops_is_the_only_export(native_library: None) -> None:
    nm = tool("nm")
    symbols = run(nm, "-D", "--defined-only", get_library_path()).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["RegisterCustomOps"]


def test_instruction_set_objects_hold_no_weak_symbols(build_folder: Path) -> None:
    """A weak copy compiled for AVX2 could be linked into callers that run on a CPU without it."""
    nm = tool("nm")
    objects = [path for path in build_folder.rglob("*.o") if "_avx2" in path.name]
    for path in objects:
        kinds = {line.split()[-2] for line in run(nm, path).split("\n") if len(line.split()) >= 2}
        assert not kinds & {"W", "V", "u"}, f"{path.name}: {kinds}"


def test_without_a_compiler_the_configuration_succeeds_and_installs_nothing(tmp_path: Path) -> None:
    """A path that holds the build tool and no compiler, as on a machine without g++."""
    cmake, make = tool("cmake"), tool("ninja" if generator() else "make")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / Path(make).name).symlink_to(make)
    build_folder, prefix = tmp_path / "build", tmp_path / "prefix"
    bare = {"PATH": str(tools), "CC": "", "CXX": ""}
    output = run(cmake, "-S", NATIVE, "-B", build_folder, *generator(), f"-DCMAKE_INSTALL_PREFIX={prefix}", **bare)
    for hint in ("No working C++ compiler", "apt install g++;", "portable path"):
        assert hint in " ".join(output.split())
    run(cmake, "--build", build_folder, **bare)
    run(cmake, "--install", build_folder, **bare)
    assert not [path for path in prefix.rglob("*") if path.is_file()]
