"""Folders of Hugging Face: every form gives the same model, and what is no ternary model is refused in one line."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ternary_folders import (
    TinyModel,
    codes_and_factor,
    config_values,
    master_tensors,
    packed_tensors,
    tiny_model,
    write_folder,
    write_master,
    write_packed,
)

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.reading import open_checkpoint
from ort_ops.ternary_models.types import TernaryCheckpoint

MODELS = {
    f"{model_type}, {'tied' if is_tied else 'head'}": tiny_model(model_type, is_tied, seed)
    for seed, (model_type, is_tied) in enumerate([("bitnet", True), ("bitnet", False), ("llama", True), ("llama", False)])
}
MODEL = tiny_model(num_layers=1)
DOWN = "model.layers.0.mlp.down_proj.weight"


def check_floats(checkpoint: TernaryCheckpoint, model: TinyModel) -> None:
    for name, values in model.floats.items():
        np.testing.assert_array_equal(checkpoint.float32(name), values, strict=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear", None])
def test_both_meanings_of_the_scale_and_the_master_are_one_model(
    tmp_path: Path, name: str, num_shards: int, linear_class: str | None
) -> None:
    model = MODELS[name]
    packed = open_checkpoint(write_packed(tmp_path / "packed", model, linear_class, num_shards))
    master = open_checkpoint(write_master(tmp_path / "master", model))
    assert packed.config == master.config == model.config
    assert (packed.format, master.format) == (
        f"Hugging Face, packed, {linear_class or 'bitlinear'}",
        "Hugging Face, master weights",
    )
    check_floats(packed, model)
    check_floats(master, model)
    for projection, weight in model.masters.items():
        codes, factor = codes_and_factor(weight)
        for checkpoint in (packed, master):
            matrix = checkpoint.ternary(projection)
            np.testing.assert_array_equal(matrix.code_NK, codes, strict=True)
            assert matrix.scale == np.float32(1) / factor
            assert isinstance(matrix.scale, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_scales_and_norms_are_float32_before_anything_is_computed(tmp_path: Path, dtype: type, linear_class: str) -> None:
    tensors = packed_tensors(MODEL, linear_class, dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path, config_values(MODEL, linear_class=linear_class), tensors))
    stored = np.float32(tensors[f"{DOWN}_scale"][0])
    assert checkpoint.ternary("layers.0.down").scale == (stored if linear_class == "autobitlinear" else np.float32(1) / stored)
    np.testing.assert_array_equal(checkpoint.float32("norm"), tensors["model.norm.weight"].astype(np.float32), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_masters_of_any_dtype(tmp_path: Path, dtype: type) -> None:
    checkpoint = open_checkpoint(write_master(tmp_path, MODEL, dtype))
    weight = MODEL.masters["layers.0.up"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(checkpoint.ternary("layers.0.up").code_NK, codes_and_factor(weight)[0])


def test_older_names_of_the_settings(tmp_path: Path) -> None:
    """rope_theta outside, a scalar as weight_scale, tables of rotations, an equal head: all stand in files that people have."""
    tensors = packed_tensors(MODEL)
    tensors[f"{DOWN}_scale"] = tensors[f"{DOWN}_scale"].reshape(())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    values = config_values(MODEL, linear_class="autobitlinear", modules_to_not_convert=["lm_head"])
    values |= {"rope_theta": 500000.0, "rope_scaling": None, "pad_token_id": -1, "eos_token_id": [2, 3]}
    del values["rope_parameters"], values["architectures"]
    config = open_checkpoint(write_folder(tmp_path, values, tensors)).config
    assert (config.rope_theta, config.is_head_tied) == (500000.0, True)
    assert (config.eos_token_ids, config.pad_token_id) == ((2, 3), None)


@pytest.mark.parametrize(("model_type", "theta", "activation"), [("bitnet", 500000.0, "relu2"), ("llama", 10000.0, "silu")])
def test_defaults_are_those_of_the_architecture(tmp_path: Path, model_type: str, theta: float, activation: str) -> None:
    model = tiny_model(model_type, num_layers=1)
    values = config_values(model)
    for name in ("rope_parameters", "hidden_act", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"):
        del values[name]
    config = open_checkpoint(write_folder(tmp_path, values, packed_tensors(model))).config
    assert (config.rope_theta, config.activation) == (theta, activation)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)


def test_generation_config_says_what_ends_a_text(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, MODEL)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert open_checkpoint(folder).config.eos_token_ids == (5, 7)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert open_checkpoint(folder).config.eos_token_ids == (2,)


def test_sources_and_tokenizer_files(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, MODEL, num_shards=2)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert [path.name for path in checkpoint.tokenizer_files] == ["tokenizer.json", "chat_template.jinja"]
    digests = dict(checkpoint.sources)
    shards = [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    assert sorted(digests) == sorted(["config.json", "model.safetensors.index.json", *shards])
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in digests.items())


def test_neither_torch_nor_transformers_is_loaded(tmp_path: Path) -> None:
    write_packed(tmp_path, MODEL)
    code = (
        "import sys; from pathlib import Path; from ort_ops.ternary_models.reading import open_checkpoint\n"
        f"checkpoint = open_checkpoint(Path({str(tmp_path)!r})); checkpoint.ternary('layers.0.q'); checkpoint.float32('norm')\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.stdout == "[]\n", result.stderr


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "ort_ops.ternary_models.gguf_checkpoint", raising=False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"m.gguf needs the package gguf: pip install 'trix\[import\]'"):
        open_checkpoint(tmp_path / "m.gguf")


Values, Tensors = dict[str, Any], dict[str, np.ndarray]


def changed(name: str, value: Any) -> Callable[[Values, Tensors], None]:
    """A setting of config.json, or with a dot one of its quantization_config."""

    def change(values: Values, tensors: Tensors) -> None:
        target = values["quantization_config"] if "." in name else values
        target[name.split(".")[-1]] = value

    return change


def without(name: str) -> Callable[[Values, Tensors], None]:
    def change(values: Values, tensors: Tensors) -> None:
        (values if name in values else tensors).pop(name)

    return change


def put(name: str, make: Callable[[np.ndarray], np.ndarray], source: str = "") -> Callable[[Values, Tensors], None]:
    """A tensor made of that of the name, or of another one."""

    def change(values: Values, tensors: Tensors) -> None:
        tensors[name] = make(tensors[source or name])

    return change


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0}
REFUSALS: dict[str, tuple[Callable[[Values, Tensors], None], str]] = {
    "architecture": (changed("model_type", "qwen2"), "model_type of config.json ('qwen2') must be bitnet or llama"),
    "another head": (
        changed("architectures", ["BitNetForSequenceClassification"]),
        "architectures of config.json (['BitNetForSequenceClassification']) must be ['BitNetForCausalLM'] for bitnet",
    ),
    "activation": (changed("hidden_act", "gelu"), "hidden_act of config.json ('gelu') must be silu or relu2"),
    "bias": (changed("attention_bias", True), "attention_bias of config.json (true) must be false"),
    "scaled rotation": (changed("rope_scaling", LLAMA3), "rope_type of config.json ('llama3') must be default"),
    "scaled rotation, as transformers 5 says it": (changed("rope_parameters", LLAMA3), "('llama3') must be default"),
    "scaled rotation, by its old name": (
        changed("rope_scaling", {"type": "linear", "factor": 2.0}),
        "rope_type of config.json ('linear') must be default",
    ),
    "a part of the head rotated": (
        changed("rope_parameters", {"partial_rotary_factor": 0.5}),
        "must hold rope_type default and rope_theta alone",
    ),
    "rotations as a text": (
        changed("rope_parameters", "default"),
        "rope_parameters of config.json ('default') must be an object",
    ),
    "not quantised": (without("quantization_config"), "must hold a quantization_config with quant_method bitnet"),
    "another method": (
        changed("quantization_config.quant_method", "gptq"),
        "quant_method of quantization_config of config.json",
    ),
    "norm inside": (
        changed("quantization_config.use_rms_norm", True),
        "use_rms_norm of quantization_config of config.json (true)",
    ),
    "a projection stays float": (
        changed("quantization_config.modules_to_not_convert", ["lm_head", "mlp.down_proj"]),
        "names mlp.down_proj: model.layers.0.mlp.down_proj must be ternary",
    ),
    "a layer stays float": (
        changed("quantization_config.modules_to_not_convert", ["lm_head", "model.layers.0"]),
        "names model.layers.0: model.layers.0.self_attn.q_proj must be ternary",
    ),
    "ternary head": (
        changed("quantization_config.modules_to_not_convert", ["model.norm"]),
        "(['model.norm']) must name lm_head: no ternary head is read",
    ),
    "a pattern": (
        changed("quantization_config.modules_to_not_convert", ["lm_head", "(a+)+$"]),
        "must be plain names of modules",
    ),
    "size as a text": (changed("hidden_size", "256"), "hidden_size of config.json ('256') must be a whole number from 1"),
    "size as a fraction": (changed("num_hidden_layers", 1.0), "num_hidden_layers of config.json (1.0) must be a whole number"),
    "K beyond the operator's": (
        changed("intermediate_size", 2**19),
        "intermediate_size of config.json (524288) must be a whole number from 1 to 524272",
    ),
    "heads and keys": (changed("num_key_value_heads", 3), "attention heads (4) must be a multiple of key-value heads (3)"),
    "odd head": (changed("head_dim", 63), "size of an attention head (63) must be even"),
    "width and heads": (changed("num_attention_heads", 3), "hidden_size (256) must be a multiple of num_attention_heads (3)"),
    "number that is none": (changed("rms_norm_eps", float("nan")), "rms_norm_eps of config.json (nan) must be a number > 0"),
    "token": (changed("eos_token_id", [2, 96]), "eos_token_id of config.json (96) must be a whole number from 0 to 95"),
    "more layers": (changed("num_hidden_layers", 2), "num_hidden_layers of config.json (2) must be the layers in "),
    "no tensor": (without("model.norm.weight"), "must hold the tensor model.norm.weight"),
    "no scale": (without(f"{DOWN}_scale"), f"must hold the tensor {DOWN}_scale"),
    "no sub-norm": (without("model.layers.0.mlp.ffn_sub_norm.weight"), "must hold the tensor model.layers.0.mlp.ffn_sub_norm"),
    "no head": (changed("tie_word_embeddings", False), "must hold the tensor lm_head.weight"),
    "another head than the embedding": (
        put("lm_head.weight", lambda table: table + 1, "model.embed_tokens.weight"),
        "lm_head.weight must equal model.embed_tokens.weight, as tie_word_embeddings of config.json (true) says",
    ),
    "a head of other sizes": (
        put("lm_head.weight", lambda table: table[:90], "model.embed_tokens.weight"),
        "lm_head.weight must equal model.embed_tokens.weight",
    ),
    "unknown tensor": (
        put("model.layers.0.self_attn.q_proj.bias", np.copy, "model.norm.weight"),
        "holds 'model.layers.0.self_attn.q_proj.bias', a tensor that no decoder of this kind has",
    ),
    "shape": (put(DOWN, lambda packed: packed[:, :-1]), f"shape of {DOWN} (64, 511) must be (64, 512), as config.json says"),
    "shape of a norm": (put("model.norm.weight", lambda norm: norm[:9]), "shape of model.norm.weight (9,) must be (256,)"),
    "scale per row": (
        put(f"{DOWN}_scale", lambda scale: np.repeat(scale, 256)),
        f"shape of {DOWN}_scale (256,) must be (1,) or ()",
    ),
    "neither packed nor master": (
        put(DOWN, lambda packed: packed.astype(np.float32)),
        f"dtype of {DOWN} (F32) must be U8: quantization_mode offline means packed codes, master weights need online",
    ),
    "packed where masters are": (
        changed("quantization_config.quantization_mode", "online"),
        "(U8) must be F32 or BF16 or F16: quantization_mode online means master weights",
    ),
    "dtype of a norm": (
        put("model.norm.weight", lambda norm: norm.astype(np.float64)),
        "dtype of model.norm.weight (F64) must be F32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path: Path, case: str) -> None:
    change, text = REFUSALS[case]
    values, tensors = config_values(MODEL, linear_class="autobitlinear"), packed_tensors(MODEL)
    change(values, tensors)
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(write_folder(tmp_path, values, tensors))
    assert text in str(failure.value)
    assert "\n" not in str(failure.value)


def test_rows_that_no_byte_holds_are_refused(tmp_path: Path) -> None:
    values = config_values(MODEL) | {"intermediate_size": 510}
    with pytest.raises(CheckpointError, match=r"rows of model.layers.0.mlp.gate_proj.weight \(510\) must be a multiple of 4"):
        open_checkpoint(write_folder(tmp_path, values, packed_tensors(MODEL)))


BAD_VALUES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str, str]] = {
    "reserved code": (DOWN, lambda packed: packed | np.uint8(0b1100), "layers.0.down", f"{DOWN}: byte [0, 0] "),
    "negative scale": (f"{DOWN}_scale", np.negative, "layers.0.down", f"{DOWN}_scale (-"),
    "no scale": (f"{DOWN}_scale", lambda scale: scale * np.nan, "layers.0.down", f"{DOWN}_scale (nan) must be > 0"),
    "norm": (
        "model.norm.weight",
        lambda norm: np.where(np.arange(256) == 3, np.inf, norm).astype(np.float32),
        "norm",
        "model.norm.weight must be finite: of 256 values 1 are NaN or infinite",
    ),
    "embedding": (
        "model.embed_tokens.weight",
        lambda table: table * np.float32(np.nan),
        "embedding",
        "model.embed_tokens.weight must be finite: of 24576 values 24576 are NaN",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_refuses_values(tmp_path: Path, case: str) -> None:
    stored_name, make, name, text = BAD_VALUES[case]
    tensors = packed_tensors(MODEL)
    tensors[stored_name] = make(tensors[stored_name])
    checkpoint = open_checkpoint(write_folder(tmp_path, config_values(MODEL, linear_class="autobitlinear"), tensors))
    with pytest.raises(CheckpointError) as failure:
        checkpoint.ternary(name) if name.endswith("down") else checkpoint.float32(name)
    assert text in str(failure.value)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    """A Llama as any other: its weights could be quantised, but it was not trained for that."""
    model = tiny_model("llama", num_layers=1)
    values = config_values(model)
    del values["quantization_config"]
    with pytest.raises(CheckpointError, match=r"Master weights of a ternary model need .*online"):
        open_checkpoint(write_folder(tmp_path, values, master_tensors(model)))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", "C:b"])
def test_a_shard_must_lie_in_the_folder(tmp_path: Path, shard: str) -> None:
    folder = write_packed(tmp_path / "folder", MODEL, num_shards=2)
    write_packed(tmp_path, MODEL)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], shard)
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"weight_map of .* must name files of its own folder"):
        open_checkpoint(folder)


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, MODEL, num_shards=2)
    index = folder / "model.safetensors.index.json"
    honest = json.loads(index.read_text())
    shards = sorted(set(honest["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(honest["weight_map"], shards[0])}))
    with pytest.raises(CheckpointError, match=rf"{shards[0]} must hold '.*', as model.safetensors.index.json says"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="must give the name of a file for each tensor"):
        open_checkpoint(folder)
    index.write_text(json.dumps(honest))
    (folder / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1]} cannot be read: No such file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    weights = write_packed(tmp_path, MODEL) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model.safetensors must be a whole safetensors file"):
        open_checkpoint(tmp_path)


def test_folders_without_their_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: No such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json \(list\) must be a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json must be JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_values(MODEL)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: No such file"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"nothing must exist: a folder with config.json and safetensors, or a file in GGUF"
    ):
        open_checkpoint(tmp_path / "nothing")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = tiny_model(num_layers=8)
    folder = write_packed(tmp_path, model)
    tracemalloc.start()
    checkpoint = open_checkpoint(folder)
    before = tracemalloc.get_traced_memory()[0]
    for name in model.masters:
        checkpoint.ternary(name)
    for name in model.floats:
        checkpoint.float32(name)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(weight.size for weight in model.masters.values())
    assert peak - before < 4 * largest, "codes are bytes, and less than three times as much is used besides"
    assert now - before < largest, "nothing is kept"
