"""A layer computes in the floats of its weights and its input, whatever torch's default dtype is as it is made or called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from trix import TriXFFN
from trix.nn import GatedFFN, HierarchicalTriXFFN, RotaryAttention, SparseLookupFFN, SparseLookupFFNv2
from trix.routing import ClaimMatrix
from trix.routing.balance import balance_loss, balance_nudge, tile_load

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "explicit": lambda: TriXFFN(16, 4, top_k=2, routing="explicit", diversity_weight=0.1),
    "emergent": lambda: TriXFFN(16, 4, diversity_weight=0.1),
    "adaptive": lambda: TriXFFN(16, 4, max_k=3),
    "learned": lambda: TriXFFN(16, 4, routing="learned"),
    "hash": lambda: TriXFFN(16, 4, routing="hash"),
    "scattering": lambda: TriXFFN(16, 4, top_k=2, routing="scattering"),
    "hierarchical": lambda: HierarchicalTriXFFN(16, 8, tiles_per_cluster=2),
    "gated": lambda: GatedFFN(16, 4),
    "sparse_lookup": lambda: SparseLookupFFN(16, 4, num_classes=3),
    "sparse_lookup_v2": lambda: SparseLookupFFNv2(16, 4, num_classes=3),
    "sparse_lookup_v2_sigmoid": lambda: SparseLookupFFNv2(16, 4, use_score_calibration=False),
    "ternary_attention": lambda: RotaryAttention(16, 2, 8, ternary=True),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer answers, and the loss of a training step."""
    if isinstance(layer, RotaryAttention):
        y, _, _ = layer(x)
        return y, y.square().mean()
    if isinstance(layer, SparseLookupFFN):
        y, _, aux = layer(x)
    elif isinstance(layer, TriXFFN):
        y, _, aux = layer(x, return_routing=True, token_idx=torch.arange(16).reshape(2, 8), phase=1.5 + x[..., 0].tanh())
    else:
        y, _, aux = layer(x, return_routing=True)
    return y, y.square().mean() + aux["total_aux"]


@pytest.mark.parametrize(("name", "dtype"), product(MAKERS, DTYPES))
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        torch.manual_seed(0)
        layer = MAKERS[name]()
        x = torch.randn(2, 8, 16)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in layer.state_dict().items()}
    results = []
    for called_under in DTYPES:
        layer.load_state_dict(state)
        layer.zero_grad()
        with default_dtype(called_under):
            torch.manual_seed(0)
            y, loss = run(layer.train(), x)
            loss.backward()
        assert y.dtype == dtype
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters() if parameter.grad is not None}
        assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients.values())
        assert gradients
        results.append({"y": y, "loss": loss} | gradients)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", ["explicit", "emergent", "sparse_lookup", "sparse_lookup_v2", "sparse_lookup_v2_sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_runs_under_another_default_dtype(name: str, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        torch.manual_seed(0)
        layer = MAKERS[name]().eval()
        x = torch.randn(2, 8, 16)
    assert isinstance(layer, TriXFFN | SparseLookupFFN)
    layer.pack()
    results = []
    for called_under in DTYPES:
        with default_dtype(called_under), torch.no_grad():
            results.append(run(layer, x)[0])
    assert results[0].dtype == dtype
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_beyond_what_bfloat16_can_count_are_exact(dtype: torch.dtype) -> None:
    tile_idx = torch.cat([torch.zeros(1001, 1), torch.ones(2002, 1)]).long()
    with default_dtype(dtype):
        load = tile_load(tile_idx, 3)
        assert load.dtype == torch.float32
        assert torch.equal(load, torch.tensor([1 / 3, 2 / 3, 0.0], dtype=torch.float32))
        assert balance_nudge(tile_idx, 3, 0.5).tolist() == [0.0, -0.5, 0.5]
        score = torch.zeros(3003, 3, dtype=torch.float32)
        assert balance_loss(score, tile_idx).item() == pytest.approx(1.0, rel=1e-4)

        claims = ClaimMatrix(3, 2)
        claims.update(tile_idx, (torch.arange(3003) % 7 == 0).long())
        for value in (claims.compute(), claims.purity()):
            assert value.dtype == torch.float32
        assert claims.purity()[:2].tolist() == pytest.approx([858 / 1001, 1716 / 2002], rel=1e-6)
