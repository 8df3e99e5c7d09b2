"""The 8-bit steps of a BitLinear are the same whole numbers in torch, in the native library and in the portable definition."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from packed_models import make_model, native_session, portable_session

from ort_ops.operators.ternary_matmul import TERNARY_MATMUL
from ort_ops.panels import to_panels
from trix.functional.tile_matmul import in_8bit_steps
from trix.nn.bit_linear import MIN_MAGNITUDE

NUM_TOKENS, NUM_COLUMNS = 2**17, 16


def rows_between_steps(seed: int) -> np.ndarray:
    """[T, K]: values within a unit of the last place of a tie between two steps, or at the largest of the token."""
    rng = np.random.default_rng(seed)
    largest_T1 = np.exp(rng.uniform(-13, 13, (NUM_TOKENS, 1)))  # down to a fifth of MIN_MAGNITUDE
    level_TK = rng.integers(-127, 127, (NUM_TOKENS, NUM_COLUMNS)) + 0.5
    x_TK = (level_TK * np.maximum(largest_T1, MIN_MAGNITUDE) / 127).clip(-largest_T1, largest_T1).astype(np.float32)
    x_TK[:, :1] = largest_T1
    x_TK[:, 1:] = np.nextafter(x_TK[:, 1:], rng.choice(np.float32([-np.inf, 0, np.inf]), (NUM_TOKENS, NUM_COLUMNS - 1)))
    return x_TK


def steps_of_bit_linear(x_TK: np.ndarray) -> np.ndarray:
    """round(x * (127 / max(max |x|, 1e-5))) as torch computes it, in float32."""
    x = torch.from_numpy(x_TK)
    return (x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=MIN_MAGNITUDE))).round().numpy()


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("open_session", [native_session, portable_session])
def test_millions_of_steps_next_to_a_tie_are_those_of_torch(
    open_session: Callable[[onnx.ModelProto], ort.InferenceSession],
) -> None:
    """The unit matrix shows the steps: a row of the result is whole numbers times max |x| / 127."""
    attributes = {"activation_bits": 8, "group_size": 0, "min_magnitude": MIN_MAGNITUDE}
    session = open_session(make_model(TERNARY_MATMUL, with_functions=open_session is portable_session, **attributes))
    weights = {"packed": to_panels(np.eye(NUM_COLUMNS, dtype=np.int8)), "row_scale": np.ones(NUM_COLUMNS, np.float32)}
    x_TK = rows_between_steps(1)
    step_T1 = np.abs(x_TK).max(-1, keepdims=True).clip(np.float32(MIN_MAGNITUDE)) / np.float32(127)
    (y_BTN,) = session.run(None, {"x": x_TK[None], **weights})
    np.testing.assert_array_equal(np.rint(y_BTN[0] / step_T1), steps_of_bit_linear(x_TK))


def test_the_layer_in_torch_has_the_same_steps() -> None:
    x_TK = rows_between_steps(2)
    steps, _ = in_8bit_steps(torch.from_numpy(x_TK), MIN_MAGNITUDE)
    np.testing.assert_array_equal(steps.round().numpy(), steps_of_bit_linear(x_TK))


def test_the_rows_tell_one_rounding_from_two() -> None:
    """127 / m rounded once gives other steps for these rows: a product that did so would fail."""
    x_TK = rows_between_steps(1)
    largest_T1 = np.abs(x_TK).max(-1, keepdims=True).clip(np.float32(MIN_MAGNITUDE))
    rounded_once_TK = np.rint(x_TK * (np.float32(127) / largest_T1))
    assert (rounded_once_TK != steps_of_bit_linear(x_TK)).mean() > 0.01
