"""Find and load the native operators. Needs onnxruntime only: no torch, no onnx, no trix."""

import importlib.resources
import sys
from pathlib import Path

import onnxruntime

_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
LIBRARY_NAME = "libtrix_ort_ops" + _SUFFIXES.get(sys.platform, ".so")


class LibraryNotFoundError(FileNotFoundError):
    """The package was installed without its native library."""


def get_library_path() -> Path:
    """The native library of this installation, editable or not.

    Raises:
        LibraryNotFoundError: the package was installed on a machine without a C++ compiler, or is not installed.
    """
    # An editable install keeps the library apart from the sources: only the import system knows both places.
    path = Path(str(importlib.resources.files("ort_ops").joinpath(LIBRARY_NAME)))
    if not path.is_file():
        raise LibraryNotFoundError(
            f"the native operators ({LIBRARY_NAME}) must be installed beside ort_ops, none found at {path}. "
            "Install a C++17 compiler (for example `apt install g++`) and run `pip install .` again. Models exported "
            "with fallback functions also run without them: use a plain onnxruntime.InferenceSession."
        )
    return path


def session_options(*, intra_op_num_threads: int | None = None) -> onnxruntime.SessionOptions:
    """Session options with the native operators registered.

    Args:
        intra_op_num_threads: threads of one operator; None leaves onnxruntime's choice. Results do not depend on it.

    Raises:
        LibraryNotFoundError: see `get_library_path`.
        ValueError: intra_op_num_threads < 1, onnxruntime is older than 1.17, or the environment variable TRIX_ORT_ISA
            names an instruction set (scalar, avx2, avx512_vnni, neon, neon_dotprod) that is unknown or that this machine lacks.
    """
    if intra_op_num_threads is not None and intra_op_num_threads < 1:
        raise ValueError(f"intra_op_num_threads ({intra_op_num_threads}) must be >= 1")
    options = onnxruntime.SessionOptions()
    path = get_library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ValueError(f"onnxruntime can't use the native operators: {' '.join(str(error).split())}") from error
    if intra_op_num_threads is not None:
        options.intra_op_num_threads = intra_op_num_threads
    return options
