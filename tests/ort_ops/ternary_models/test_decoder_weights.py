"""The weights of a decoder in the layouts of onnxruntime's operators, against the slow reading of their rules."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ort_ops.ternary_models.decoder_weights import int8_codes, int8_scales, rotations, rows_as, stack, two_bit
from ort_ops.ternary_models.types import TernaryMatrix


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 9), num_columns=st.integers(1, 300))
def test_two_bit_codes_are_w_plus_2_and_padded_with_zeros(seed: int, num_rows: int, num_columns: int) -> None:
    code = np.random.default_rng(seed).integers(-1, 2, (num_rows, num_columns), dtype=np.int8)
    packed = two_bit(code)
    num_blocks = -(-num_columns // 128)
    assert packed.shape == (num_rows, num_blocks, 32)
    for n in range(num_rows):
        for k in range(num_blocks * 128):
            block, place = divmod(k, 128)
            field = int(packed[n, block, place // 4]) >> 2 * (place % 4) & 3
            assert field - 2 == (code[n, k] if k < num_columns else 0)


@pytest.mark.parametrize(("bits", "block", "limit"), [(2, 128, 0.01), (8, 32, 0.01)])
def test_onnxruntime_multiplies_the_matrix_that_was_packed(bits: int, block: int, limit: float) -> None:
    """Its activations are in int8, which is where the difference comes from: another layout would be another matrix."""
    random = np.random.default_rng(bits)
    x = random.standard_normal((5, 256), dtype=np.float32)
    if bits == 2:
        matrix = random.integers(-1, 2, (40, 256), dtype=np.int8)
        codes, scales = two_bit(matrix), np.full((40, 2), 0.5, np.float32)
        expected = x @ matrix.T.astype(np.float32) * 0.5
    else:
        weight = random.standard_normal((40, 256), dtype=np.float32)
        scales = int8_scales(weight)
        codes = np.concatenate(list(int8_codes(weight, scales)))
        expected = x @ weight.T
    sizes = {"K": 256, "N": 40, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 40])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    assert np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < limit


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 9), num_blocks=st.integers(1, 4), exponent=st.integers(-38, 30))
def test_int8_is_within_half_a_step_of_each_block(seed: int, num_rows: int, num_blocks: int, exponent: int) -> None:
    random = np.random.default_rng(seed)
    matrix = (random.standard_normal((num_rows, 32 * num_blocks)) * 10.0**exponent).astype(np.float32)
    matrix[0, :32] = 0
    scale = int8_scales(matrix)
    codes = np.concatenate(list(int8_codes(matrix, scale)))
    assert codes.dtype == np.uint8
    assert codes.shape == (num_rows, num_blocks, 32)
    assert codes.min() >= 1
    restored = (codes.astype(np.float64) - 128) * scale[..., None]
    step = scale[..., None].astype(np.float64)
    assert (np.abs(restored - matrix.reshape(restored.shape)) <= 0.5001 * step + 1e-45).all()
    assert (codes[0, 0] == 128).all()


def test_parts_are_the_whole_for_more_rows_than_one_part() -> None:
    matrix = np.random.default_rng(0).standard_normal((5000, 32), dtype=np.float32)
    np.testing.assert_array_equal(np.concatenate(list(rows_as(matrix, np.dtype(np.float16)))), matrix.astype(np.float16))
    scale = int8_scales(matrix)
    np.testing.assert_allclose(scale, np.abs(matrix).max(1, keepdims=True) / 127, rtol=1e-6)
    assert np.concatenate(list(int8_codes(matrix, scale))).shape == (5000, 1, 32)


def test_rotations_are_the_angles_of_each_position() -> None:
    cos, sin = rotations(50, 16, 10000.0)
    assert cos.shape == sin.shape == (50, 8)
    for s in (0, 1, 49):
        for h in range(8):
            angle = s * 10000.0 ** (-2 * h / 16)
            np.testing.assert_allclose([cos[s, h], sin[s, h]], [np.cos(angle), np.sin(angle)], atol=1e-5)


def test_stacked_rows_keep_their_scales() -> None:
    random = np.random.default_rng(1)
    one = TernaryMatrix(random.integers(-1, 2, (3, 5), dtype=np.int8), np.float32(0.5))
    other = TernaryMatrix(random.integers(-1, 2, (2, 5), dtype=np.int8), np.array([2, 3], np.float32))
    code, scale = stack([one, other])
    np.testing.assert_array_equal(code, np.concatenate([one.code_NK, other.code_NK]))
    np.testing.assert_array_equal(scale, np.float32([0.5, 0.5, 0.5, 2, 3]))
