"""torch's sweep and mixing, the portable functions and the kernels compute the same."""

import numpy as np
import pytest
import torch
from packed_models import make_model, mix_inputs, native_session, portable_session, sweep_inputs

from ort_ops.operators.resolvent_mix import RESOLVENT_MIX
from ort_ops.operators.resolvent_sweep import RESOLVENT_SWEEP
from trix.functional.resolvent import METHODS, Pair, resolvent_pivots
from trix.functional.resolvent_mix import MIX_METHODS, resolvent_mix

pytestmark = pytest.mark.usefixtures("native_library")
SESSIONS = {"native": native_session, "portable": portable_session}


def pairs(inputs: dict[str, np.ndarray], *names: str) -> list[Pair]:
    return [Pair(*(torch.from_numpy(inputs[f"{name}_{part}"]) for part in ("re", "im"))) for name in names]


@pytest.mark.parametrize("path", SESSIONS)
@pytest.mark.parametrize("num_tokens", [1, 33, 200])
def test_pivots_have_the_bits_of_the_loop_in_torch(path: str, num_tokens: int) -> None:
    inputs = sweep_inputs(np.random.default_rng(num_tokens), 2, 9, num_tokens)
    found = SESSIONS[path](make_model(RESOLVENT_SWEEP, with_functions=True)).run(None, inputs)
    alpha, first = pairs(inputs, "alpha", "first")
    for method in METHODS:
        expected = resolvent_pivots(alpha, torch.from_numpy(inputs["w"]), first, method=method)
        for part, of_torch in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, of_torch.numpy(), rtol=0, atol=3e-5 * np.abs(part).max())
            if method == "loop":
                assert part.tobytes() == of_torch.numpy().tobytes()


@pytest.mark.parametrize("path", SESSIONS)
@pytest.mark.parametrize("num_tokens", [1, 33, 200])
@pytest.mark.parametrize("query_width", [None, 1, 5])
def test_mixing_is_that_of_torch(path: str, num_tokens: int, query_width: int | None) -> None:
    rng = np.random.default_rng(num_tokens)
    inputs = mix_inputs(rng, 2, 3, num_tokens, query_width or 1, 11, {1}, {1})
    if query_width is None:
        inputs["q"], inputs["k"] = (np.ones((1, 1, 1, 1), np.float32) for _ in range(2))
    found = SESSIONS[path](make_model(RESOLVENT_MIX, with_functions=True)).run(None, inputs)
    G, c, first = pairs(inputs, "G", "c", "first")
    u, q, k = (torch.from_numpy(inputs[name]) for name in ("u", "q", "k"))
    if query_width is None:
        first = Pair(*(part.squeeze(2) for part in first))
    for method in MIX_METHODS:
        queries = {} if query_width is None else {"q": q, "k": k}
        y, last = resolvent_mix(G, c, u, first, method=method, **queries)
        for part, of_torch in zip(found, (*y, *last), strict=True):
            expected = of_torch.numpy().reshape(part.shape)
            np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
