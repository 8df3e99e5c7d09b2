"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, with mutated models and random shapes."""

import re
import sys
from pathlib import Path

import pytest
from test_native_build import build, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized_build(tmp_path_factory: pytest.TempPathFactory, cxx_compiler: str) -> Path:
    folder = tmp_path_factory.mktemp("sanitized_build")
    build(folder, "-DTRIX_BUILD_TESTS=ON", "-DTRIX_SANITIZE=ON")
    return folder


def runtime_libraries(compiler: str) -> str:
    """The sanitizer and libstdc++ must be loaded before Python, whose binary knows neither."""
    names = ("libasan.so", "libstdc++.so.6")
    paths = [run(compiler, f"-print-file-name={name}").strip() for name in names]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip(f"{compiler} has no shared sanitizer runtime: {paths}")
    return " ".join(paths)


def test_cpp_tests_pass_sanitized(sanitized_build: Path) -> None:
    assert run(sanitized_build / "kernel_tests").endswith("0 failures\n")


def test_mutated_models_and_random_shapes_are_clean(sanitized_build: Path, cxx_compiler: str) -> None:
    output = run(
        sys.executable,
        Path(__file__).parents[1] / "support" / "fuzz_worker.py",
        next(sanitized_build.glob("libtrix_ort_ops.*")),
        "0",
        "2000",
        "2000",
        LD_PRELOAD=runtime_libraries(cxx_compiler),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )
    report = re.search(r"loaded (\d+) of 2000 mutated models, (\d+) runs gave a result", output)
    assert report is not None, output
    num_loaded, num_results = map(int, report.groups())
    # Most mutations leave no valid model; those that do, and every valid case, must have run.
    assert num_loaded > 200
    assert num_results > 2000
