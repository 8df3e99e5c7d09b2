"""A removed tile gets no tokens and counts for nothing; what a layer cannot do without is not removed."""

import copy
from typing import Any

import pytest
import torch

from trix.nn import HierarchicalTriXFFN, SparseLookupFFN, SparseLookupFFNv2, TriXFFN
from trix.routing import SignatureSurgery

WIDTH, NUM_TILES = 16, 4
LAYERS = {
    "trix explicit": lambda: TriXFFN(WIDTH, NUM_TILES, top_k=2),
    "trix emergent": lambda: TriXFFN(WIDTH, NUM_TILES, routing="emergent"),
    "adaptive": lambda: TriXFFN(WIDTH, NUM_TILES, max_k=2),
    "hierarchical": lambda: HierarchicalTriXFFN(WIDTH, NUM_TILES),
    "lookup v1": lambda: SparseLookupFFN(WIDTH, NUM_TILES, top_k=2),
    "lookup v2": lambda: SparseLookupFFNv2(WIDTH, NUM_TILES),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> SignatureSurgery:
    torch.manual_seed(0)
    return LAYERS[request.param]()


def run(layer: SignatureSurgery, x: torch.Tensor) -> Any:
    return layer(x, return_routing=True) if isinstance(layer, TriXFFN) else layer(x)


def test_no_token_goes_to_a_removed_tile_and_the_layer_trains_on(layer: SignatureSurgery) -> None:
    x = torch.randn(200, WIDTH, requires_grad=True)
    assert (run(layer.eval(), x)[1]["tile_idx"] == 2).any()
    layer.remove_tile(2, tag="off")
    layer.train()
    for _ in range(3):
        output, info, aux = run(layer, x)
        assert not (info["tile_idx"] == 2).any()
    (output.square().sum() + aux["total_aux"]).backward()
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    assert all(bool(value.isfinite().all()) for value in (output, x.grad, *gradients))
    entry = layer.get_surgery_history()[-1]
    assert (entry["operation"], entry["tile_idx"], entry["tag"]) == ("remove", 2, "off")


def test_a_state_dict_keeps_the_removal(layer: SignatureSurgery) -> None:
    layer.remove_tile(1)
    state = copy.deepcopy(layer.state_dict())
    layer.insert_signature(1, torch.ones(WIDTH))
    layer.load_state_dict(state)
    assert not (run(layer.eval(), torch.randn(200, WIDTH))[1]["tile_idx"] == 1).any()


def test_an_inserted_signature_brings_the_tile_back(layer: SignatureSurgery) -> None:
    layer.remove_tile(1)
    signature = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
    layer.insert_signature(1, signature)
    assert run(layer.eval(), 10 * signature[None])[1]["tile_idx"].flatten()[0] == 1


def test_a_token_of_another_tile_is_computed_as_if_the_removed_one_had_never_been() -> None:
    torch.manual_seed(0)
    layer = TriXFFN(WIDTH, NUM_TILES).eval()
    x = torch.randn(100, WIDTH)
    layer.remove_tile(3)
    output, info, _ = layer(x, return_routing=True)
    gate = info["scores"][:, :3].softmax(-1).gather(-1, info["tile_idx"]) * NUM_TILES**0.5
    torch.testing.assert_close(info["weight"], gate)
    assert output.isfinite().all()


def test_what_cannot_be_removed_is_left(layer: SignatureSurgery) -> None:
    layer.freeze_signature(0)
    with pytest.raises(ValueError, match=r"the signature of tile_idx \(0\) must not be frozen: unfreeze it first"):
        layer.remove_tile(0)
    with pytest.raises(ValueError, match=r"tile_idx \(4\) must be >= 0 and < num_tiles \(4\)"):
        layer.remove_tile(4)
    layer.unfreeze_signature(0)
    top_k = layer.router.top_k
    for tile in range(NUM_TILES - top_k):
        layer.remove_tile(tile)
    with pytest.raises(ValueError, match=r"tile_idx \(0\) must be a tile in use, not a free slot"):
        layer.remove_tile(0)
    before = len(layer.get_surgery_history())
    with pytest.raises(ValueError, match=rf"in use and in reach after it \({top_k - 1}\) must be >= top_k \({top_k}\)"):
        layer.remove_tile(3)
    assert len(layer.get_surgery_history()) == before
    assert not layer.router.is_free_E[3]
