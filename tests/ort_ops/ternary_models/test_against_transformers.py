"""The readers against transformers, which reads the same files.

Legend: T tokens, N rows, K columns of a projection.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ternary_folders import stored_name, tiny_model, write_master, write_packed

from ort_ops.ternary_models.reading import open_checkpoint
from ort_ops.ternary_models.ternary_codes import quantise_master, unpack_rows
from ort_ops.ternary_models.types import DecoderConfig, TernaryMatrix

transformers = pytest.importorskip("transformers", reason="compares with transformers")
bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="compares with transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to read such models")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles parts of its layers, which takes a C++ compiler and minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def bit_linear(x_TK: np.ndarray, matrix: TernaryMatrix) -> np.ndarray:
    """What BitNet computes with 8 bits, in float32."""
    largest_T1 = np.maximum(np.abs(x_TK).max(axis=1, keepdims=True), np.float32(1e-5))
    q_TK = np.rint(x_TK * (np.float32(127) * (np.float32(1) / largest_T1)))
    return (q_TK @ matrix.code_NK.T.astype(np.float32)) * (largest_T1 / np.float32(127)) * matrix.scale


def tokens(num_columns: int) -> np.ndarray:
    """Of all sizes, down to those below the smallest scale of BitNet."""
    rng = np.random.default_rng(0)
    size_T1 = np.array([[1.0], [100.0], [1e-3], [1.1e-5], [0.9e-5], [1e-6], [1e-9], [0.0]])
    return (rng.standard_normal((8, num_columns)) * size_T1).astype(np.float32)


def test_packed_as_transformers_packs() -> None:
    code_NK = np.random.default_rng(0).integers(-1, 2, (24, 9)).astype(np.int8)
    packed = bitnet.pack_weights(torch.from_numpy(code_NK.copy()))
    np.testing.assert_array_equal(unpack_rows(packed.numpy(), "w"), code_NK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(5))
def test_masters_are_rounded_as_transformers_does(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight_NK = (torch.randn(300, 200) * 0.02).to(dtype)
    matrix = quantise_master(weight_NK.float().numpy(), "w")
    quantised_NK = bitnet.WeightQuant.apply(weight_NK).float().numpy()
    np.testing.assert_array_equal(matrix.code_NK, np.sign(quantised_NK))
    rounding = 2.0**-22 if dtype == torch.float32 else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    np.testing.assert_allclose(np.abs(quantised_NK[quantised_NK != 0]), matrix.scale, rtol=rounding)


def check_config(model: Any, config: DecoderConfig) -> None:
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    assert model.model.layers[0].self_attn.head_dim == config.head_size
    assert model.model.layers[0].input_layernorm.variance_epsilon == config.norm_epsilon
    assert ("self_attn.attn_sub_norm" in dict(model.model.layers[0].named_modules())) == config.has_sub_norms
    activation = model.model.layers[0].mlp.act_fn(torch.tensor([-1.0, 3.0]))
    expected = torch.tensor([0.0, 9.0]) if config.activation == "relu2" else torch.nn.functional.silu(torch.tensor([-1.0, 3.0]))
    torch.testing.assert_close(activation, expected)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize(("model_type", "is_tied"), [("bitnet", True), ("llama", False)])
def test_every_projection_of_a_packed_model(tmp_path: Path, model_type: str, is_tied: bool, linear_class: str) -> None:
    """Each token within 1e-6 of its own largest output, also where max |x| < 1e-5."""
    tiny = tiny_model(model_type, is_tied)
    folder = write_packed(tmp_path, tiny, linear_class, num_shards=2)
    model, checkpoint = load(folder), open_checkpoint(folder)
    check_config(model, checkpoint.config)
    weights = model.state_dict()
    for name, (num_rows, num_columns) in ((name, weight.shape) for name, weight in tiny.masters.items()):
        projection = model.get_submodule(stored_name(name).removesuffix(".weight"))
        assert type(projection).__name__ == ("BitLinear" if linear_class == "bitlinear" else "AutoBitLinear")
        x_TK = tokens(num_columns)
        with torch.no_grad():
            expected_TN = projection(torch.from_numpy(x_TK)).numpy()
        found_TN = bit_linear(x_TK, checkpoint.ternary(name))
        assert found_TN.shape == (8, num_rows)
        largest_T1 = np.abs(expected_TN).max(axis=1, keepdims=True)
        assert (np.abs(found_TN - expected_TN) <= 1e-6 * largest_T1).all(), name
    for name in tiny.floats:
        np.testing.assert_array_equal(checkpoint.float32(name), weights[stored_name(name)].numpy())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_projection_of_a_master(tmp_path: Path, dtype: type) -> None:
    tiny = tiny_model("bitnet")
    folder = write_master(tmp_path, tiny, dtype)
    model, checkpoint = load(folder), open_checkpoint(folder)
    for name, master in tiny.masters.items():
        x_TK = tokens(master.shape[1])
        projection = model.get_submodule(stored_name(name).removesuffix(".weight"))
        assert projection.online_quant
        with torch.no_grad():
            expected_TN = projection(torch.from_numpy(x_TK)).numpy()
        # It multiplies floats, in the order of the library: less exact than whole numbers.
        largest_T1 = np.abs(expected_TN).max(axis=1, keepdims=True)
        assert (np.abs(bit_linear(x_TK, checkpoint.ternary(name)) - expected_TN) <= 1e-5 * largest_T1).all(), name


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_file_in_gguf_is_the_model_that_transformers_reads(tmp_path: Path, kind: str, is_tied: bool) -> None:
    """Among other things, rows of q and k are in the order that its rotation of halves means."""
    gguf = pytest.importorskip("gguf", reason="files in GGUF need gguf")
    from ternary_gguf import write_gguf

    tiny = tiny_model("llama", is_tied)
    path = write_gguf(tmp_path / "m.gguf", tiny, gguf.GGMLQuantizationType[kind])
    model, checkpoint = load(tmp_path, gguf_file=path.name), open_checkpoint(path)
    check_config(model, checkpoint.config)
    weights = model.state_dict()
    for name in tiny.masters:
        matrix = checkpoint.ternary(name)
        np.testing.assert_array_equal(matrix.code_NK * matrix.scale, weights[stored_name(name)].numpy(), err_msg=name)
    for name in tiny.floats:
        np.testing.assert_array_equal(checkpoint.float32(name), weights[stored_name(name)].numpy(), err_msg=name)
