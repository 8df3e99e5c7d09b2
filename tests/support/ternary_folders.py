"""Tiny random ternary language models, and the folders in which Hugging Face keeps them. Written with numpy and safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ort_ops.ternary_models.tensor_shapes import float_shapes, ternary_shapes
from ort_ops.ternary_models.types import DecoderConfig

WIDTH, NUM_LAYERS, NUM_HEADS, NUM_KEY_VALUE_HEADS, INNER, VOCABULARY = 256, 3, 4, 2, 512, 96
STORED_NAMES = {
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
Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class TinyModel:
    """masters, floats: float32 by the names of ort_ops.ternary_models.types, of values that bfloat16 holds."""

    model_type: str
    config: DecoderConfig
    masters: Mapping[str, np.ndarray]
    floats: Mapping[str, np.ndarray]


def tiny_model(model_type: str = "bitnet", is_head_tied: bool = True, seed: int = 0, num_layers: int = NUM_LAYERS) -> TinyModel:
    is_bitnet = model_type == "bitnet"
    config = DecoderConfig(
        hidden_size=WIDTH,
        num_layers=num_layers,
        num_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        head_size=WIDTH // NUM_HEADS,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        max_position=128,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        activation="relu2" if is_bitnet else "silu",
        has_sub_norms=is_bitnet,
        is_head_tied=is_head_tied,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
    )
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...], mean: float, deviation: float) -> np.ndarray:
        return (mean + deviation * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16).astype(np.float32)

    masters = {name: drawn(shape, 0.0, 0.02) for name, shape in ternary_shapes(config).items()}
    floats = {
        name: drawn(shape, 0.0 if len(shape) == 2 else 1.0, 0.5 if len(shape) == 2 else 0.1)
        for name, shape in float_shapes(config).items()
    }
    return TinyModel(model_type, config, masters, floats)


def codes_and_factor(master_NK: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """int8 codes, and the factor that the weights were multiplied by to round them: what BitNet calls the scale."""
    factor = np.float32(1) / np.maximum(np.float32(np.abs(master_NK.astype(np.float64)).mean()), np.float32(1e-5))
    return np.clip(np.round(master_NK * factor), -1, 1).astype(np.int8), factor


def pack(code_NK: np.ndarray) -> np.ndarray:
    """uint8 [N / 4, K], written value by value."""
    num_rows, num_columns = code_NK.shape
    packed = np.zeros((num_rows // 4, num_columns), np.uint8)
    for row in range(num_rows):
        block, place = divmod(row, num_rows // 4)
        packed[place] |= (code_NK[row] + 1).astype(np.uint8) << np.uint8(2 * block)
    return packed


def stored_name(name: str) -> str:
    outside = {"embedding": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
    if name in outside:
        return f"{outside[name]}.weight"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{STORED_NAMES[part]}.weight"


def master_tensors(model: TinyModel, dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    return {stored_name(name): values.astype(dtype) for name, values in (model.masters | model.floats).items()}


def packed_tensors(model: TinyModel, linear_class: str = "autobitlinear", dtype: Any = np.float32) -> Tensors:
    """dtype: of scales, norms, embedding and head."""
    tensors = {stored_name(name): values.astype(dtype) for name, values in model.floats.items()}
    for name, master in model.masters.items():
        code, factor = codes_and_factor(master)
        scale = np.float32(1) / factor if linear_class == "autobitlinear" else factor
        tensors[stored_name(name)] = pack(code)
        tensors[f"{stored_name(name)}_scale"] = np.array([scale]).astype(dtype)
    return tensors


def config_values(model: TinyModel, **quantization: Any) -> dict[str, Any]:
    """What config.json holds, as transformers writes it."""
    config = model.config
    return {
        "architectures": ["BitNetForCausalLM" if model.model_type == "bitnet" else "LlamaForCausalLM"],
        "model_type": model.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.is_head_tied,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "quantization_config": {"quant_method": "bitnet"} | quantization,
    }


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], num_shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names, shard_of = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::num_shards]}, folder / file)
        shard_of |= dict.fromkeys(names[shard::num_shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def write_packed(folder: Path, model: TinyModel, linear_class: str | None = "autobitlinear", num_shards: int = 1) -> Path:
    """linear_class: None is not written, which means bitlinear."""
    given = {} if linear_class is None else {"linear_class": linear_class}
    tensors = packed_tensors(model, linear_class or "bitlinear")
    return write_folder(folder, config_values(model, **given), tensors, num_shards)


def write_master(folder: Path, model: TinyModel, dtype: Any = ml_dtypes.bfloat16) -> Path:
    values = config_values(model, linear_class="autobitlinear", quantization_mode="online")
    return write_folder(folder, values, master_tensors(model, dtype))
