"""A packed sparse lookup in torch computes what SparseLookup does."""

import numpy as np
import pytest
import torch
from packed_models import lookup_inputs, lookup_keys

from ort_ops.panels import from_panels
from trix.functional.lookup import sparse_lookup
from trix.functional.packing import pack_ternary

KINDS = [{"has_hinges": 0}, {"has_hinges": 1}]


def torch_arguments(
    inputs: dict[str, np.ndarray],
    top_k: int = 1,
    grid_size: int = 16,
    has_hinges: int = 0,
    route_on_norm: int = 1,
    epsilon: float = 1e-5,
) -> tuple[object, ...]:
    signatures = from_panels(inputs["signatures"], len(inputs["bias"]), inputs["x"].shape[1])
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()} | {
        "signatures": pack_ternary(torch.from_numpy(signatures))
    }
    return (*tensors.values(), top_k, grid_size, bool(has_hinges), bool(route_on_norm), epsilon)


@pytest.mark.parametrize("route_on_norm", [0, 1])
@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
@pytest.mark.parametrize("sizes", [(0, 1, 3, 8, 2, 4), (1, 1, 1, 7, 1, 1), (23, 2, 40, 130, 33, 16), (5, 3, 3, 64, 80, 7)])
def test_torch_equals_the_reference(sizes: tuple[int, ...], kind: dict[str, int], route_on_norm: int) -> None:
    inputs, y, tile_idx = lookup_inputs(np.random.default_rng(7), *sizes, **kind, route_on_norm=route_on_norm)
    arguments = torch_arguments(inputs, sizes[1], sizes[5], **kind, route_on_norm=route_on_norm)
    actual_y, actual_idx, score, _ = (value.numpy() for value in sparse_lookup(*arguments))
    np.testing.assert_array_equal(actual_idx, tile_idx)
    np.testing.assert_allclose(actual_y, y, rtol=0, atol=3e-5 * np.abs(y).max(initial=1.0))
    np.testing.assert_allclose(score, lookup_keys(inputs, route_on_norm, 1e-5)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_the_operator_of_torch_is_a_proper_one(kind: dict[str, int]) -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(8), 5, 2, 3, 20, 10, **kind)
    torch.library.opcheck(sparse_lookup, torch_arguments(inputs, 2, **kind))
