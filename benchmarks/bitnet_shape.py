"""A decoder of the shape of BitNet b1.58 2B4T with random weights, and its sessions in onnxruntime.

Legend: T tokens, V vocabulary, S positions, H heads of keys, D their size.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ort_ops.library import LIBRARY_NAME, get_library_path
from ort_ops.ternary_models.decoder_graph import PAST, PRESENT
from ort_ops.ternary_models.names import MODEL
from ort_ops.ternary_models.types import DecoderConfig, TernaryMatrix

LUT = "mlas.use_lut_gemm"  # the session option of onnxruntime for products by tables


def shape(num_layers: int, vocab_size: int, num_positions: int, shrink: int = 1) -> DecoderConfig:
    """2B4T with these numbers; its widths and heads are divided by ``shrink``."""
    return DecoderConfig(
        hidden_size=2560 // shrink,
        num_layers=num_layers,
        num_heads=20 // shrink,
        num_key_value_heads=5 // min(shrink, 5),
        head_size=128,
        intermediate_size=6912 // shrink // 256 * 256,
        vocab_size=vocab_size,
        max_position=num_positions,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        activation="relu2",
        has_sub_norms=True,
        is_head_tied=True,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )


class RandomCheckpoint:
    """Random weights, each of which depends on its name alone."""

    format = "random weights"
    tokenizer_files: tuple[Path, ...] = ()
    sources: Mapping[str, str] = {}

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config

    def ternary(self, name: str) -> TernaryMatrix:
        config = self.config
        q_width, kv_width = config.num_heads * config.head_size, config.num_key_value_heads * config.head_size
        hidden, ffn = config.hidden_size, config.intermediate_size
        shapes = {"q": (q_width, hidden), "k": (kv_width, hidden), "v": (kv_width, hidden), "o": (hidden, q_width)}
        shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        N, K = shapes[name.split(".")[-1]]
        # A power of 2, which float16 holds: TQ2_0 keeps its scales so.
        return TernaryMatrix(_random(name).integers(-1, 2, (N, K), dtype=np.int8), np.float32(2.0 ** round(-0.5 * np.log2(K))))

    def float32(self, name: str) -> NDArray[np.float32]:
        config = self.config
        if name == "embedding":
            rows = _random(name).standard_normal((min(config.vocab_size, 1024), config.hidden_size), dtype=np.float32)
            return np.resize(rows, (config.vocab_size, config.hidden_size))
        widths = {"attention_sub_norm": config.num_heads * config.head_size, "ffn_sub_norm": config.intermediate_size}
        return _random(name).uniform(0.5, 1.5, widths.get(name.split(".")[-1], config.hidden_size)).astype(np.float32)

    def past(self, layer: int, part: str) -> NDArray[np.float32]:
        """Keys or values of all positions of a layer, [H, S, D]."""
        config = self.config
        shape_HSD = (config.num_key_value_heads, config.max_position, config.head_size)
        return _random(f"{layer}.{part}").standard_normal(shape_HSD, dtype=np.float32)


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


class SessionDecoder:
    """A folder of `write_decoder` in a session, as onnxruntime-genai runs it: keys and values are written in place.

    Raises:
        ValueError: onnxruntime refuses the model.
    """

    def __init__(self, folder: Path, checkpoint: RandomCheckpoint, options: ort.SessionOptions, num_threads: int) -> None:
        options.intra_op_num_threads, options.log_severity_level = num_threads, 3
        self._session = ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        self._vocab_size = checkpoint.config.vocab_size
        self._cache = {
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(checkpoint.past(layer, part)[None])
            for layer in range(checkpoint.config.num_layers)
            for part in ("key", "value")
        }

    def prepare(self, token_T: NDArray[np.int64], num_past: int) -> None:
        """Choose what `run` reads: these tokens, after num_past tokens in the cache."""
        binding = self._session.io_binding()
        mask = np.ones((1, num_past + len(token_T)), np.int64)
        for name, array in (("input_ids", token_T[None]), ("attention_mask", mask)):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"{PAST}.{name}", value)
            binding.bind_ortvalue_output(f"{PRESENT}.{name}", value)
        self._logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, len(token_T), self._vocab_size), np.float32))
        binding.bind_ortvalue_output("logits", self._logits)
        self._binding = binding

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def logits(self) -> NDArray[np.float32]:
        """Those of the last run, [T, V]."""
        logits: NDArray[np.float32] = self._logits.numpy()[0]
        return logits

    def close(self) -> None:
        del self._session, self._binding, self._cache


@contextmanager
def library_of(isa: str, folder: Path) -> Iterator[Path]:
    """A copy of the native library that takes this instruction set: it looks it up once, when it is registered first."""
    path = folder / f"{isa}-{LIBRARY_NAME}"
    if not path.exists():
        shutil.copyfile(get_library_path(), path)
    before = os.environ.get("TRIX_ORT_ISA")
    os.environ["TRIX_ORT_ISA"] = isa
    try:
        yield path
    finally:
        os.environ.pop("TRIX_ORT_ISA") if before is None else os.environ.update(TRIX_ORT_ISA=before)
