"""Finding, registering and configuring the native library."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from packed_models import make_model, native_session, tile_matmul_inputs

import ort_ops.library
from ort_ops.library import LibraryNotFoundError, get_library_path, session_options
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL

pytestmark = pytest.mark.usefixtures("native_library")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRIX_ORT_ISA"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


RUN_ONE_MODEL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
import numpy as np, onnxruntime as ort
from packed_models import make_model, tile_matmul_inputs
from ort_ops.library import session_options
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
inputs, _ = tile_matmul_inputs(np.random.default_rng(0), 3, 2, 5, 7)
for _ in range(2):
    options = session_options()
    options.log_severity_level = 1
    model = make_model(TERNARY_TILE_MATMUL).SerializeToString()
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, inputs)
"""


def test_library_path_is_a_file_beside_the_package() -> None:
    path = get_library_path()
    assert path.is_file()
    assert path.name == ort_ops.library.LIBRARY_NAME
    assert path.parent.name == "ort_ops"


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_ops.library, "LIBRARY_NAME", "libabsent.so")
    with pytest.raises(LibraryNotFoundError, match=r"libabsent\.so.*C\+\+17 compiler.*pip install"):
        session_options()


def test_session_options_take_threads_and_reject_zero() -> None:
    assert session_options(intra_op_num_threads=3).intra_op_num_threads == 3
    with pytest.raises(ValueError, match=r"intra_op_num_threads \(0\) must be >= 1"):
        session_options(intra_op_num_threads=0)


def test_many_session_options_share_one_domain() -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(0), 3, 2, 5, 7)
    model = make_model(TERNARY_TILE_MATMUL)
    sessions = [native_session(model) for _ in range(3)]
    results = [session.run(None, inputs)[0] for session in sessions]
    assert all(np.array_equal(results[0], result) for result in results)
    # The domain outlives the options and sessions that used it.
    del sessions
    gc.collect()
    assert np.array_equal(native_session(model).run(None, inputs)[0], results[0])


def test_registering_twice_on_the_same_options_is_an_error_not_a_crash() -> None:
    options = session_options()
    options.register_custom_ops_library(str(get_library_path()))
    with pytest.raises(Exception, match="already set"):
        ort.InferenceSession(make_model(TERNARY_TILE_MATMUL).SerializeToString(), options)


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_instruction_set_is_chosen_by_environment_and_logged_once(isa: str) -> None:
    finished = run_python(RUN_ONE_MODEL, TRIX_ORT_ISA=isa)
    assert finished.returncode == 0, finished.stderr
    message = "ai.trix: kernels run with instruction set "
    assert finished.stderr.count(message) == 1
    chosen = finished.stderr.split(message)[1].split()[0]
    assert chosen == (isa or chosen)


def test_unknown_instruction_set_is_an_error_at_registration() -> None:
    finished = run_python("from ort_ops.library import session_options; session_options()", TRIX_ORT_ISA="mmx")
    assert finished.returncode != 0
    last_line = finished.stderr.strip().split("\n")[-1]
    assert last_line.startswith("ValueError: onnxruntime can't use the native operators: ")
    assert last_line.endswith("TRIX_ORT_ISA (mmx) must be one of: scalar, avx2, avx512_vnni, neon, neon_dotprod")


def test_old_runtime_gets_a_clean_status() -> None:
    """A stand-in for onnxruntime 1.16: its GetApi knows no version 17, and slot 0 of version 1 is CreateStatus."""
    messages = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        messages.append((code, message.decode()))
        return 0x1234

    table = (ctypes.c_void_p * 275)()
    table[0] = ctypes.cast(create_status, ctypes.c_void_p).value

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if version <= 16 else None

    api_base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    library = ctypes.CDLL(str(get_library_path()))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    library.RegisterCustomOps.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert library.RegisterCustomOps(None, ctypes.addressof(api_base)) == 0x1234
    not_implemented = 9
    assert messages == [(not_implemented, "ai.trix: onnxruntime must be >= 1.17 (its C API version 17); this one is older")]
