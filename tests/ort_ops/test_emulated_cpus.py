"""The library on x86-64 CPUs that lack instructions of this one: an illegal instruction anywhere ends the process.

TRIX_ORT_ISA can't show that: it chooses kernels, but what the compiler put elsewhere still runs on the full CPU.
"""

import platform
import shutil
import sys
from pathlib import Path

import pytest
from native_builds import run

from ort_ops.self_test import ISA_MESSAGE

INSTRUCTION_SETS = {"Haswell": "avx2", "Nehalem": "scalar"}


@pytest.fixture(params=INSTRUCTION_SETS)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """qemu, set to one CPU."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the emulated CPUs are those of x86-64 Linux")
    found = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if found is None:
        pytest.skip("qemu-x86_64-static is not on the path (Debian, Ubuntu: apt install qemu-user-static)")
    monkeypatch.setenv("QEMU_CPU", request.param)
    return found


def test_operators_are_right_under_onnxruntime(emulator: str, native_library: None, request: pytest.FixtureRequest) -> None:
    output = run(emulator, sys.executable, "-m", "ort_ops.self_test")
    assert output.startswith("native ok"), output[:1000]
    assert "\nportable ok" in output, output[:1000]
    assert f"{ISA_MESSAGE}{INSTRUCTION_SETS[request.node.callspec.params['emulator']]}\n" in output


@pytest.mark.slow
def test_cpp_tests_pass(emulator: str, plain_build: Path, request: pytest.FixtureRequest) -> None:
    output = run(emulator, plain_build / "kernel_tests")
    assert "0 failures\n" in output
    assert f"ran ternary_matmul_{INSTRUCTION_SETS[request.node.callspec.params['emulator']]}\n" in output
    assert "skipped ternary_matmul_avx512_vnni" in output
