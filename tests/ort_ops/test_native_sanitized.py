"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, with mutated models and random shapes.

The mutated ones run for TRIX_FUZZ_SECONDS (default 30, always the same cases in the same order); `make fuzz` gives them ten
minutes and a seed of their own, TRIX_FUZZ_SEED.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import build, run
from shown import SHOWN

from ort_ops.operators import SCHEMAS

SECONDS = float(os.environ.get("TRIX_FUZZ_SECONDS", "30"))
SEED = os.environ.get("TRIX_FUZZ_SEED", "0")


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


@pytest.mark.timeout(SECONDS + 600)
def test_mutated_models_and_random_shapes_are_clean(
    sanitized_build: Path, cxx_compiler: str, record_property: Callable[[str, str], None]
) -> None:
    output = run(
        sys.executable,
        Path(__file__).parents[1] / "support" / "fuzz_worker.py",
        next(sanitized_build.glob("libtrix_ort_ops.*")),
        SEED,
        str(SECONDS),
        timeout=SECONDS + 300,
        LD_PRELOAD=runtime_libraries(cxx_compiler),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )
    names = [*(op.name for op in SCHEMAS), "in all"]
    summary = [line for line in output.splitlines() if line.startswith(tuple(f"{name}: " for name in names))]
    record_property(SHOWN, "\n".join(summary))
    assert [line.partition(":")[0] for line in summary] == names, output[-1000:]
    for line in summary:
        found = re.search(r": (\d+) mutated models, (\d+) refused; (\d+) valid models, all ran; (\d+) .*, (\d+) refused", line)
        assert found is not None, line
        num_mutated, num_refused, num_valid, num_inputs, num_inputs_refused = map(int, found.groups())
        # Most mutations leave no valid model; some do, and about every other case was valid, or the kernels went untested.
        assert num_mutated - num_refused > 0.05 * num_mutated > 0, line
        assert num_valid > num_mutated / 4, line
        assert num_inputs > num_inputs_refused, line
