"""Tiny random ternary language models as files in GGUF, written with the package gguf as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from ternary_folders import TinyModel, codes_and_factor

STORED_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "embedding": "token_embd",
    "head": "output",
    "norm": "output_norm",
}
Settings = dict[str, int | float | str]


def ternary_weights(model: TinyModel) -> dict[str, tuple[np.ndarray, np.float32]]:
    """Codes and a scale that float16 holds."""
    found = {name: codes_and_factor(master) for name, master in model.masters.items()}
    return {name: (code, np.float32(np.float16(1 / factor))) for name, (code, factor) in found.items()}


def neighbours(weight_NK: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows in llama.cpp's order, for which it rotates neighbours: those of the two halves of a head take turns."""
    half = len(weight_NK) // num_heads // 2
    rows = [head * 2 * half + side * half + place for head in range(num_heads) for place in range(half) for side in (0, 1)]
    return weight_NK[rows]


def stored_name(name: str) -> str:
    if "." not in name:
        return f"{STORED_NAMES[name]}.weight"
    _, layer, part = name.split(".")
    return f"blk.{layer}.{STORED_NAMES[part]}.weight"


def gguf_tensors(model: TinyModel) -> dict[str, np.ndarray]:
    """float32 by the names of the file."""
    config = model.config
    heads = {"q": config.num_heads, "k": config.num_key_value_heads}
    found = dict(model.floats)
    for name, (code, scale) in ternary_weights(model).items():
        weight, part = code * scale, name.split(".")[-1]
        found[name] = neighbours(weight, heads[part]) if part in heads else weight
    return {stored_name(name): values for name, values in found.items()}


def gguf_settings(model: TinyModel) -> Settings:
    config = model.config
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_size,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }


def write_gguf(
    path: Path,
    model: TinyModel,
    kind: GGMLQuantizationType = GGMLQuantizationType.TQ2_0,
    table_kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    settings: Mapping[str, Any] | None = None,
    blocks: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
    """kind: of the projections. table_kind: of embedding and head. settings: instead of those of the model.

    blocks: quantised bytes and their type, for tensors that are other than the model's.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (gguf_settings(model) if settings is None else settings).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    writer.add_array("tokenizer.ggml.tokens", [f"token {place}" for place in range(model.config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [0.0] * model.config.vocab_size)
    names = {stored_name(name) for name in model.masters}
    stored: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}
    for name, values in gguf_tensors(model).items():
        used = kind if name in names else table_kind if values.ndim == 2 else GGMLQuantizationType.F32
        stored[name] = (gguf.quants.quantize(values, used), used)
    for name, (values, used) in (stored | dict(blocks or {})).items():
        writer.add_tensor(name, values, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
