"""torch's stand-in for SignatureRoute, which packed layers run, against the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import route_inputs, run_route

from trix.functional.gates import Gate
from trix.functional.packing import pack_ternary
from trix.functional.tile_matmul import signature_route
from trix.routing import HierarchicalRouter, SignatureRouter

pytestmark = pytest.mark.usefixtures("native_library")


def run_torch(inputs: dict[str, np.ndarray], signatures: np.ndarray, *attributes: float) -> list[np.ndarray]:
    x, bias, log_mass = (torch.from_numpy(inputs[name]) for name in ("x", "bias", "log_mass"))
    packed = pack_ternary(torch.from_numpy(signatures))
    return [output.numpy() for output in signature_route(x, packed, bias, log_mass, *attributes)]


def may_round_otherwise(score_TE: np.ndarray, bias_E: np.ndarray) -> np.ndarray:
    """Tokens with two keys so close, or a score so close to the threshold below the best, that rounding may decide."""
    key_TE = np.where(np.isneginf(bias_E), np.arange(len(bias_E)) * 1e3, score_TE + bias_E)
    ordered_TE = np.sort(key_TE, axis=1)
    best_T1 = np.where(np.isneginf(bias_E), -1e9, score_TE).max(1, keepdims=True)
    is_close_T = (np.diff(ordered_TE, axis=1) < 1e-5).any(1)
    return is_close_T | (np.abs(best_T1 - score_TE - 0.3) < 1e-5).any(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 20),
    num_tiles=st.integers(1, 40),
    num_columns=st.integers(1, 70),
    share_of_k=st.floats(0.0, 1.0),
    gate=st.sampled_from(Gate),
    share_free=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_torch_and_the_kernel_decide_alike(
    seed: int, num_tokens: int, num_tiles: int, num_columns: int, share_of_k: float, gate: Gate, share_free: float
) -> None:
    rng = np.random.default_rng(seed)
    inputs, signatures = route_inputs(rng, num_tokens, num_tiles, num_columns)
    inputs["bias"][rng.random(num_tiles) < share_free] = -np.inf
    inputs["x"][:1, :1] = np.nan if seed % 3 == 0 else inputs["x"][:1, :1]
    top_k = 1 + round(share_of_k * (num_tiles - 1))
    expected = run_torch(inputs, signatures, top_k, int(gate), 0.3)
    found = run_route(inputs, top_k, gate=int(gate), confidence_threshold=0.3)
    is_clear_T = ~may_round_otherwise(expected[2], inputs["bias"])
    assert is_clear_T.sum() >= num_tokens / 2 or num_columns < 8
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[is_clear_T], other[is_clear_T], rtol=1e-4, atol=1e-5)


def routers() -> dict[str, SignatureRouter]:
    torch.manual_seed(0)
    made = {
        "softmax": SignatureRouter(24, 9, top_k=3),
        "adaptive": SignatureRouter(24, 9, max_k=4, confidence_threshold=0.5),
        "sigmoid": HierarchicalRouter(24, 9, top_k=2),
    }
    for router in made.values():
        torch.nn.init.normal_(router.balance_bias, std=0.1)
        router.remove(4)
        router.log_mass_E[2] = 0.7
    return made


@pytest.mark.parametrize("name", routers())
def test_a_packed_router_decides_as_it_did(name: str) -> None:
    router, x_TD = routers()[name], torch.randn(50, 24)
    before = router(x_TD)
    router.pack_signatures()
    packed = router(x_TD)
    assert torch.equal(packed.tile_idx, before.tile_idx)
    torch.testing.assert_close(packed.weight, before.weight)
    is_known = before.score.isfinite()  # the two-level search leaves most scores out
    torch.testing.assert_close(packed.score[is_known], before.score[is_known])
    assert packed.score[:, 4].isneginf().all()
    assert packed.score[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("name", routers())
def test_a_packed_router_is_one_operator_and_its_decision(name: str) -> None:
    router = routers()[name]
    router.pack_signatures()
    decision = router(x_TD := torch.randn(7, 24))
    bias_E = router.balance_bias + router.exclusion_E
    gate = {"softmax": Gate.SOFTMAX, "adaptive": Gate.ADAPTIVE, "sigmoid": Gate.SIGMOID}[name]
    arguments = (router.packed_signatures, bias_E, router.log_mass_E, router.top_k, int(gate), router.confidence_threshold)
    tile_idx_TK, weight_TK, _ = signature_route(x_TD, *arguments)
    assert torch.equal(decision.tile_idx, tile_idx_TK)
    assert torch.equal(decision.weight, weight_TK)
