"""Checkpoints in GGUF: one file, of the architecture llama, with projections in TQ1_0 or TQ2_0.

Legend: N rows, K columns of a projection, B blocks of 256 values in a row.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ort_ops.ternary_models.checks import (
    MAX_COLUMNS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCABULARY,
    ROWS_AT_ONCE,
    check_finite,
    check_heads,
    file_digest,
)
from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.gguf_header import GgufTensor, read_header
from ort_ops.ternary_models.settings import Settings
from ort_ops.ternary_models.tensor_shapes import float_shapes, ternary_shapes
from ort_ops.ternary_models.types import DecoderConfig, TernaryMatrix
from trix.regular_files import open_regular

ARCHITECTURE = "llama"
TERNARY_TYPES = ("TQ1_0", "TQ2_0")
FLOAT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K")
I2_S = 36  # of bitnet.cpp; the package gguf has no name for it
_TYPE_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}
_ONE = np.frombuffer(np.array(1, dtype="<f2").tobytes(), dtype=np.uint8)  # d of a block of codes
_EMBEDDING = "token_embd.weight"
_OUTSIDE = {"embedding": "token_embd", "head": "output", "norm": "output_norm"}
_INSIDE = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


class GgufCheckpoint:
    """A :class:`~ort_ops.ternary_models.types.TernaryCheckpoint` of a file; sizes and names are checked when it is made.

    Each block of 256 values of a row has a scale d in float16. All blocks of a row must have the same d, except blocks of
    zeros, which have d = 0. The rows of q and k come back in the order of Hugging Face, which rotates the two halves of a head;
    llama.cpp rotates neighbouring rows.

    The architecture bitnet is not read: llama.cpp computes it with SiLU, while BitNet b1.58 2B4T was trained with relu^2, and
    the file does not say which is meant. The vocabulary is not read either: there are no tokenizer files.

    Raises:
        CheckpointError: here for names, types and shapes, in :meth:`ternary` and :meth:`float32` for values.
    """

    tokenizer_files: tuple[Path, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = read_header(path)
        for name, tensor in self._header.tensors.items():
            if tensor.kind == I2_S:
                raise CheckpointError(
                    f"type of {name!r:.80} (I2_S) must be TQ1_0 or TQ2_0: the layout of I2_S depends on the machine that wrote "
                    "it, and the file does not say which. Import the Hugging Face folder with model.safetensors instead"
                )
        self.config = _read_config(Settings(self._header.values, path.name), self._header.tensors)
        types = self._check_tensors()
        self.format = f"GGUF, {' and '.join(sorted(types))}"

    @cached_property
    def sources(self) -> Mapping[str, str]:
        return {self._path.name: file_digest(self._path)}

    def ternary(self, name: str) -> TernaryMatrix:
        stored_name = _stored_name(name)
        tensor = self._header.tensors[stored_name]
        block_NB = self._rows(tensor, 0, tensor.shape[0]).reshape(tensor.shape[0], -1, _block_sizes(tensor)[1])
        d_NB = np.ascontiguousarray(block_NB[..., -2:]).view("<f2")[..., 0].astype(np.float32)
        scale_N = _row_scales(d_NB, stored_name)
        block_NB[..., -2:] = _ONE
        code_NK = dequantize(block_NB.reshape(tensor.shape[0], -1), GGMLQuantizationType(tensor.kind)).astype(np.int8)
        if code_NK.max() > 1:
            row, column = (int(place) for place in np.unravel_index(code_NK.argmax(), code_NK.shape))
            raise CheckpointError(f"{stored_name}: value [{row}, {column}] must have the code 0, 1 or 2, it has 3")
        code_NK.reshape(*d_NB.shape, -1)[d_NB == 0] = 0
        if name.endswith((".q", ".k")):
            order_N = self._halves_first(tensor.shape[0])
            code_NK, scale_N = code_NK[order_N], scale_N[order_N]
        return TernaryMatrix(code_NK, scale_N[0] if (scale_N == scale_N[0]).all() else scale_N)

    def float32(self, name: str) -> NDArray[np.float32]:
        stored_name = _stored_name(name)
        tensor = self._header.tensors[stored_name]
        values = np.empty(tensor.shape, dtype=np.float32)
        table = values.reshape(-1, tensor.shape[-1])
        for start in range(0, len(table), ROWS_AT_ONCE):
            part = table[start : start + ROWS_AT_ONCE]
            part[:] = dequantize(self._rows(tensor, start, start + len(part)), GGMLQuantizationType(tensor.kind))
            check_finite(part, stored_name)
        return values

    def _rows(self, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows [start, stop)."""
        block_values, block_bytes = _block_sizes(tensor)
        row_bytes = tensor.shape[-1] // block_values * block_bytes
        try:
            with open_regular(self._path) as file:
                file.seek(tensor.offset + start * row_bytes)
                content = np.fromfile(file, dtype=np.uint8, count=(stop - start) * row_bytes)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error.strerror or error}") from error
        if content.size != (stop - start) * row_bytes:
            raise CheckpointError(f"{self._path} must stay as it is while it is read: it has become shorter")
        return content.reshape(stop - start, row_bytes)

    def _halves_first(self, num_rows: int) -> NDArray[np.intp]:
        """Place in the file of each row: within a head the even rows come first, then the odd ones."""
        row_HP2 = np.arange(num_rows).reshape(-1, self.config.head_size // 2, 2)
        return row_HP2.swapaxes(1, 2).reshape(-1)

    def _check_tensors(self) -> set[str]:
        """The types of the projections, once all tensors are as they must be."""
        tensors, found = self._header.tensors, set()
        expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
        expected = {_stored_name(name): (FLOAT_TYPES, shape) for name, shape in float_shapes(self.config).items()}
        expected |= {_stored_name(name): (TERNARY_TYPES, shape) for name, shape in ternary_shapes(self.config).items()}
        for name, (types, shape) in expected.items():
            if name not in tensors:
                raise CheckpointError(f"{self._path} must hold the tensor {name}")
            self._check_tensor(name, types, shape)
            found |= {_TYPE_NAMES[tensors[name].kind]} if types is TERNARY_TYPES else set()
        for name in sorted(tensors.keys() - expected.keys()):
            why = ": scaled rotations are unknown" if name == "rope_freqs.weight" else ""
            raise CheckpointError(f"{self._path} holds {name!r:.80}, a tensor that this decoder does not have{why}")
        return found

    def _check_tensor(self, name: str, types: tuple[str, ...], shape: tuple[int, ...]) -> None:
        tensor = self._header.tensors[name]
        kind = _TYPE_NAMES.get(tensor.kind, str(tensor.kind))
        if kind not in types:
            raise CheckpointError(f"type of {name} ({kind}) must be {' or '.join(types)}")
        if tensor.shape != shape:
            raise CheckpointError(f"shape of {name} {tensor.shape} must be {shape}, as the settings of {self._path.name} say")
        block_values, block_bytes = _block_sizes(tensor)
        if shape[-1] % block_values:
            raise CheckpointError(f"columns of {name} ({shape[-1]}) must be a multiple of {block_values}, as {kind} has blocks")
        end = tensor.offset + math.prod(shape) // block_values * block_bytes
        if end > self._header.file_bytes:
            raise CheckpointError(
                f"{name} ends at byte {end}, but {self._path} has {self._header.file_bytes}: the file is cut off or damaged"
            )


def _read_config(about: Settings, tensors: Mapping[str, GgufTensor]) -> DecoderConfig:
    architecture = about.values.get("general.architecture")
    if isinstance(architecture, str) and architecture.startswith("bitnet"):
        raise CheckpointError(
            f"general.architecture of {about.where} ({architecture!r:.40}) must be llama: the file does not say whether it "
            "means SiLU, as llama.cpp computes, or relu^2, as in BitNet b1.58 2B4T. Import the Hugging Face folder instead"
        )
    about.text("general.architecture", (ARCHITECTURE,))
    if _EMBEDDING not in tensors:
        raise CheckpointError(f"{about.where} must hold the tensor {_EMBEDDING}")
    vocab_size = tensors[_EMBEDDING].shape[0]
    if vocab_size > MAX_VOCABULARY:
        raise CheckpointError(f"rows of {_EMBEDDING} ({vocab_size}) must be <= {MAX_VOCABULARY}")
    _check_rope(about)
    about.whole("llama.expert_count", 0, 0, 0)
    hidden_size = about.whole("llama.embedding_length", 1, MAX_COLUMNS)
    num_heads = about.whole("llama.attention.head_count", 1, MAX_HEADS)
    num_key_value_heads = about.whole("llama.attention.head_count_kv", 1, MAX_HEADS, num_heads)
    head_size = about.whole("llama.attention.key_length", 2, MAX_COLUMNS, hidden_size // num_heads)
    check_heads(num_heads, num_key_value_heads, head_size)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        about.whole(name, head_size, head_size, head_size)
    return DecoderConfig(
        hidden_size=hidden_size,
        num_layers=about.whole("llama.block_count", 1, MAX_LAYERS),
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_size=head_size,
        intermediate_size=about.whole("llama.feed_forward_length", 1, MAX_COLUMNS),
        vocab_size=vocab_size,
        max_position=about.whole("llama.context_length", 1, MAX_POSITION),
        rope_theta=about.positive("llama.rope.freq_base", 10000.0),
        norm_epsilon=about.positive("llama.attention.layer_norm_rms_epsilon"),
        activation="silu",
        has_sub_norms=False,
        is_head_tied=_stored_name("head") not in tensors,
        bos_token_id=about.token("tokenizer.ggml.bos_token_id", vocab_size),
        eos_token_ids=_end_tokens(about, vocab_size),
        pad_token_id=about.token("tokenizer.ggml.padding_token_id", vocab_size),
    )


def _check_rope(about: Settings) -> None:
    about.text("llama.rope.scaling.type", ("none",), "none")
    for name in ("llama.rope.scale_linear", "llama.rope.scaling.factor"):
        if about.values.get(name, 1.0) != 1.0:
            raise CheckpointError(
                f"{name} of {about.where} ({about.values[name]!r:.40}) must be 1: scaled rotations are unknown"
            )


def _end_tokens(about: Settings, vocab_size: int) -> tuple[int, ...]:
    """The end of a text and, in chats, of a turn."""
    tokens = (about.token(f"tokenizer.ggml.{name}_token_id", vocab_size) for name in ("eos", "eot"))
    return tuple(dict.fromkeys(token for token in tokens if token is not None))


def _row_scales(d_NB: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The scale of each row [N], which all its blocks must share; blocks with d = 0 are excluded.

    A row of zeros gets the largest scale of the matrix, a matrix of zeros the scale 1.
    """
    is_bad_N = ~(np.isfinite(d_NB) & (d_NB >= 0)).all(axis=1)
    if is_bad_N.any():
        row = int(is_bad_N.argmax())
        raise CheckpointError(f"{name}: scales of row {row} ({d_NB[row].min()} to {d_NB[row].max()}) must be >= 0 and finite")
    scale_N = d_NB.max(axis=1)
    is_varied_N = ((d_NB != 0) & (d_NB != scale_N[:, None])).any(axis=1)
    if is_varied_N.any():
        row = int(is_varied_N.argmax())
        found = np.unique(d_NB[row][d_NB[row] != 0])
        raise CheckpointError(
            f"{name}: scales of row {row} vary along K ({found[0]} to {found[-1]}), those of ternary weights are equal"
        )
    return np.where(scale_N > 0, scale_N, scale_N.max() or np.float32(1))


def _block_sizes(tensor: GgufTensor) -> tuple[int, int]:
    """Values and bytes of a block."""
    values, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return int(values), int(num_bytes)


def _stored_name(name: str) -> str:
    if name in _OUTSIDE:
        return f"{_OUTSIDE[name]}.weight"
    _, layer, part = name.split(".")
    return f"blk.{layer}.{_INSIDE[part]}.weight"
