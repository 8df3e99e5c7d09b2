"""The decoder of BitNet b1.58 2B4T in ggml, built from the source package of llama-cpp-python and called through ctypes.

ggml is compiled with its own CMake files, once for each instruction set, into build/ggml. The graph is in
`native/ggml_decoder.cpp`; of llama.cpp nothing takes part but ggml.
"""

import ctypes
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_modules.errors import UserError
from ort_ops.ternary_models.types import PROJECTIONS, DecoderConfig, TernaryCheckpoint

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "ggml"
PACKAGE = "llama-cpp-python==0.3.36"
TYPES = {"F32": 0, "Q8_0": 8, "TQ1_0": 34, "TQ2_0": 35}  # as in ggml.h
# native: -march=native. avx2: ggml's own choice for CPUs with AVX2, FMA, F16C and BMI2.
BUILDS = {"native": ("-DGGML_NATIVE=ON",), "avx2": ("-DGGML_NATIVE=OFF",)}
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DCMAKE_POSITION_INDEPENDENT_CODE=ON",
    "-DGGML_OPENMP=OFF",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("APP", "COMMON", "EXAMPLES", "SERVER", "TESTS", "TOOLS")),
)


def build(name: str) -> Path:
    """The shared library of one of BUILDS; compiles what is not there yet, a minute or two of CPU time.

    Raises:
        UserError: the package cannot be downloaded, or a compiler or CMake is missing or fails.
    """
    source, library = HERE / "native" / "ggml_decoder.cpp", BUILD / f"{name}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    sources = _fetch() / "vendor" / "llama.cpp"
    made = BUILD / name
    _call(["cmake", "-S", str(sources), "-B", str(made), *OPTIONS, *BUILDS[name]], "configured")
    _call(["cmake", "--build", str(made), "--target", "ggml"], "compiled")
    # Two of these libraries live in one process: each keeps its ggml to itself.
    archives = [str(made / "ggml" / "src" / archive) for archive in ("libggml-cpu.a", "libggml-base.a")]
    command = ["c++", "-O2", "-std=c++17", "-fPIC", "-shared", f"-I{sources / 'ggml' / 'include'}", str(source), *archives]
    partial = library.with_suffix(".partial")
    _call([*command, "-Wl,--exclude-libs,ALL", "-Wl,-Bsymbolic", "-lpthread", "-ldl", "-o", str(partial)], "linked")
    partial.replace(library)
    return library


def _fetch() -> Path:
    """The unpacked source package."""
    folder = BUILD / PACKAGE.replace("-", "_").replace("==", "-")
    if not folder.exists():
        archive = folder.with_name(f"{folder.name}.tar.gz")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(BUILD), PACKAGE]
        _call(pip, "downloaded")
        unpacked = BUILD / "unpacked"
        with tarfile.open(archive) as file:
            file.extractall(unpacked, filter="data")
        (unpacked / folder.name).replace(folder)
        unpacked.rmdir()
    return folder


def _call(command: list[str], done: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{PACKAGE} can't be {done}: {command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()[-1:]
        raise UserError(f"{PACKAGE} can't be {done}: {''.join(said)}") from error


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_size", "ffn", "vocab")),
        *((name, ctypes.c_int32) for name in ("positions", "threads", "ternary_type", "head_type")),
        *((name, ctypes.c_float) for name in ("rope_theta", "epsilon")),
    ]


class GgmlDecoder:
    """A decoder in ggml, with the weights of a checkpoint, which ggml quantises itself.

    Args:
        library: of `build`. ternary: the type of the projections, TQ2_0 or TQ1_0. head: the type of the embedding, which is
            also the head: F32 or Q8_0.

    Raises:
        ValueError: a decoder that the graph does not express.
        MemoryError: too little memory.
    """

    def __init__(self, library: Path, checkpoint: TernaryCheckpoint, ternary: str, head: str, num_threads: int) -> None:
        config = checkpoint.config
        if config.activation != "relu2" or not config.has_sub_norms or not config.is_head_tied:
            raise ValueError(f"{config} must have squared ReLU, sub-norms and a tied head")
        self._calls = _calls(library)
        self._vocab_size = config.vocab_size
        self._handle: int | None = self._calls.decoder_new(ctypes.byref(_sizes(config, ternary, head, num_threads)))
        if self._handle is None:
            raise MemoryError("ggml found no memory for the weights")
        self._set("embedding", checkpoint.float32("embedding"))
        self._set("norm", checkpoint.float32("norm"))
        for layer in range(config.num_layers):
            for name in ("attention_norm", "ffn_norm", "attention_sub_norm", "ffn_sub_norm"):
                self._set(f"layers.{layer}.{name}", checkpoint.float32(f"layers.{layer}.{name}"))
            for name in PROJECTIONS:
                matrix = checkpoint.ternary(f"layers.{layer}.{name}")
                self._set(f"layers.{layer}.{name}", matrix.code_NK * np.asarray(matrix.scale, np.float32)[..., None])

    def set_past(self, layer: int, keys_HSD: NDArray[np.float32], values_HSD: NDArray[np.float32]) -> None:
        """Fill the whole cache of a layer, float32 [heads of keys, positions, head size]."""
        for name, cache_HSD in (("keys", keys_HSD), ("values", values_HSD)):
            self._set(f"layers.{layer}.{name}", cache_HSD.transpose(1, 0, 2))

    def prepare(self, token_T: NDArray[np.int64], num_past: int) -> None:
        """Choose what `run` reads: these tokens, after num_past tokens in the cache."""
        self._token_T = token_T.astype(np.int32)
        if not self._calls.decoder_prepare(self._handle, len(token_T), num_past):
            raise MemoryError("ggml found no memory for the graph")

    def run(self) -> None:
        self._place = self._calls.decoder_run(self._handle, self._token_T.ctypes.data)
        if not self._place:
            raise RuntimeError("ggml could not compute the graph")

    def logits(self) -> NDArray[np.float32]:
        """Those of the last run, [T, V]."""
        logits: NDArray[np.float32] = np.ctypeslib.as_array(self._place, (len(self._token_T), self._vocab_size))
        return logits.copy()

    def close(self) -> None:
        self._calls.decoder_free(self._handle)
        self._handle = None

    def _set(self, name: str, values: NDArray[np.float32]) -> None:
        values = np.ascontiguousarray(values, np.float32)
        if not self._calls.decoder_set(self._handle, name.encode(), values.ctypes.data, values.size):
            raise ValueError(f"{name}: {values.size} values must be those of the tensor in ggml")


def _sizes(config: DecoderConfig, ternary: str, head: str, num_threads: int) -> _Sizes:
    return _Sizes(
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_key_value_heads,
        config.head_size,
        config.intermediate_size,
        config.vocab_size,
        config.max_position,
        num_threads,
        TYPES[ternary],
        TYPES[head],
        config.rope_theta,
        config.norm_epsilon,
    )


def _calls(library: Path) -> ctypes.CDLL:
    calls = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    calls.decoder_new.argtypes, calls.decoder_new.restype = [pointer], pointer
    calls.decoder_free.argtypes, calls.decoder_free.restype = [pointer], None
    calls.decoder_set.argtypes = [pointer, ctypes.c_char_p, pointer, ctypes.c_int64]
    calls.decoder_prepare.argtypes = [pointer, number, number]
    calls.decoder_run.argtypes, calls.decoder_run.restype = [pointer, pointer], ctypes.POINTER(ctypes.c_float)
    return calls
