"""Building the native library: its C++ tests, what it exports, and an installation without a compiler."""

from pathlib import Path

from native_builds import NATIVE, generator, run, tool

from ort_ops.library import get_library_path


def test_cpp_tests_pass(plain_build: Path) -> None:
    output = run(plain_build / "kernel_tests")
    assert output.endswith("0 failures\n")
    assert output.count("ran ") >= 2, output


def test_register_custom_ops_is_the_only_export(native_library: None) -> None:
    nm = tool("nm")
    symbols = run(nm, "-D", "--defined-only", get_library_path()).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["RegisterCustomOps"]


def test_instruction_set_objects_hold_no_weak_symbols(plain_build: Path) -> None:
    """A weak copy compiled for AVX2 could be linked into callers that run on a CPU without it."""
    nm = tool("nm")
    objects = [path for path in plain_build.rglob("*.o") if "_avx" in path.name or "_dotprod" in path.name]
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
