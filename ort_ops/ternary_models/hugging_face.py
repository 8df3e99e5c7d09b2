"""Checkpoints of Hugging Face: a folder with config.json and safetensors, ternary codes packed or master weights."""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ort_ops.ternary_models.checks import ROWS_AT_ONCE, check_finite, file_digest
from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.hugging_face_config import CONFIG_FILE, read_config
from ort_ops.ternary_models.safetensors_folder import SafetensorsFolder
from ort_ops.ternary_models.tensor_shapes import float_shapes, ternary_shapes
from ort_ops.ternary_models.ternary_codes import CODES_PER_BYTE, quantise_master, scale_of_codes, unpack_rows
from ort_ops.ternary_models.types import TernaryMatrix

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
FLOATS = ("F32", "BF16", "F16")
_OUTSIDE = {"embedding": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
_INSIDE = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD = "lm_head.weight"
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # transformers computes it anew


class _Expected(NamedTuple):
    """The dtypes and shapes that a tensor may have. why: what the error about its dtype ends with."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    why: str = ""


class HuggingFaceCheckpoint:
    """A :class:`~ort_ops.ternary_models.types.TernaryCheckpoint` of a folder; sizes and names are checked when it is made.

    Whether the projections are packed is what quantization_mode says, and the dtypes must agree. ``weight_scale`` is a factor
    with linear_class autobitlinear, otherwise a divisor. With tie_word_embeddings, a stored head must equal the embedding.

    Raises:
        CheckpointError: here for files, settings, names and shapes, in :meth:`ternary` and :meth:`float32` for values.
    """

    def __init__(self, folder: Path) -> None:
        self.config, self._quantization = read_config(folder)
        self._tensors = SafetensorsFolder(folder)
        layers = {match[1] for name in self._tensors.stored if (match := _LAYER.match(name))}
        if len(layers) != self.config.num_layers:
            raise CheckpointError(
                f"num_hidden_layers of {CONFIG_FILE} ({self.config.num_layers}) must be the layers in {folder} ({len(layers)})"
            )
        self._check_tensors()
        is_master, linear_class = self._quantization
        self.format = "Hugging Face, master weights" if is_master else f"Hugging Face, packed, {linear_class}"
        self.tokenizer_files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())

    @cached_property
    def sources(self) -> Mapping[str, str]:
        files = (self._tensors.folder / CONFIG_FILE, *self._tensors.files)
        return {path.name: file_digest(path) for path in files}

    def ternary(self, name: str) -> TernaryMatrix:
        stored_name = _stored_name(name)
        if self._quantization.is_master:
            return quantise_master(self._tensors.read(stored_name).astype(np.float32), stored_name)
        scale_name = f"{stored_name}_scale"
        stored_scale = np.float32(self._tensors.read(scale_name).item())
        scale = scale_of_codes(stored_scale, self._quantization.linear_class == "autobitlinear", scale_name)
        return TernaryMatrix(unpack_rows(self._tensors.read(stored_name), stored_name), scale)

    def float32(self, name: str) -> NDArray[np.float32]:
        stored_name = _stored_name(name)
        values = np.empty(self._tensors.stored[stored_name].shape, dtype=np.float32)
        start = 0
        for part in self._tensors.rows(stored_name, ROWS_AT_ONCE):
            stop = start + len(part)
            values[start:stop] = part
            check_finite(values[start:stop], stored_name)
            start = stop
        return values

    def _check_tensors(self) -> None:
        stored, folder = self._tensors.stored, self._tensors.folder
        expected = dict(self._expected())
        for name, (dtypes, shapes, why) in expected.items():
            if name not in stored:
                raise CheckpointError(f"{folder} must hold the tensor {name}")
            if stored[name].dtype not in dtypes:
                raise CheckpointError(f"dtype of {name} ({stored[name].dtype}) must be {' or '.join(dtypes)}{why}")
            if stored[name].shape not in shapes:
                raise CheckpointError(
                    f"shape of {name} {stored[name].shape} must be {' or '.join(map(str, shapes))}, as {CONFIG_FILE} says"
                )
        for name in sorted(stored.keys() - expected.keys()):
            if name == _HEAD and self.config.is_head_tied:
                self._check_tied_head()
            elif not _UNUSED.fullmatch(name):
                raise CheckpointError(f"{folder} holds {name!r:.80}, a tensor that no decoder of this kind has")

    def _check_tied_head(self) -> None:
        embedding = _stored_name("embedding")
        is_alike = self._tensors.stored[_HEAD][1:] == self._tensors.stored[embedding][1:]
        pairs = zip(*(self._tensors.rows(name, ROWS_AT_ONCE) for name in (_HEAD, embedding)), strict=True)
        if not is_alike or not all(np.array_equal(head, rows) for head, rows in pairs):
            raise CheckpointError(f"{_HEAD} must equal {embedding}, as tie_word_embeddings of {CONFIG_FILE} (true) says")

    def _expected(self) -> Iterator[tuple[str, _Expected]]:
        for name, shape in float_shapes(self.config).items():
            yield _stored_name(name), _Expected(FLOATS, (shape,))
        for name, (num_rows, num_columns) in ternary_shapes(self.config).items():
            weight = _stored_name(name)
            if self._quantization.is_master:
                why = ": quantization_mode online means master weights"
                yield weight, _Expected(FLOATS, ((num_rows, num_columns),), why)
                continue
            if num_rows % CODES_PER_BYTE:
                raise CheckpointError(f"rows of {weight} ({num_rows}) must be a multiple of {CODES_PER_BYTE} to be packed")
            why = ": quantization_mode offline means packed codes, master weights need online"
            yield weight, _Expected(("U8",), ((num_rows // CODES_PER_BYTE, num_columns),), why)
            yield f"{weight}_scale", _Expected(FLOATS, ((1,), ()))


def _stored_name(name: str) -> str:
    if name in _OUTSIDE:
        return f"{_OUTSIDE[name]}.weight"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_INSIDE[part]}.weight"
