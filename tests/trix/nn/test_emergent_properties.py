"""What routing by signatures should do as a whole, beside what its parts compute."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix import TriXFFN
from trix.nn import HierarchicalTriXFFN

LAYERS = ["explicit", "emergent", "hierarchical"]


def layer(kind: str, seed: int, num_tiles: int = 6, width: int = 24, top_k: int = 1) -> TriXFFN:
    torch.manual_seed(seed)
    if kind == "hierarchical":
        ffn: TriXFFN = HierarchicalTriXFFN(width, num_tiles, num_tiles * 8, top_k, tiles_per_cluster=4)
    else:
        ffn = TriXFFN(width, num_tiles, num_tiles * 8, top_k, routing=kind)
    return ffn.double().eval()


def tiles_of(ffn: TriXFFN, x: Tensor) -> Tensor:
    return ffn(x, return_routing=True)[1]["tile_idx"]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(LAYERS), st.integers(0, 100))
def test_same_weights_same_routing(kind: str, seed: int) -> None:
    ffn, twin = layer(kind, seed), layer(kind, seed + 1)
    twin.load_state_dict(ffn.state_dict())
    x = torch.randn(40, 24, dtype=torch.float64)
    for other in (ffn, twin, copy.deepcopy(ffn)):
        assert torch.equal(tiles_of(other, x), tiles_of(ffn, x))
        assert torch.equal(other(x), ffn(x))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LAYERS), st.integers(0, 100))
def test_small_changes_seldom_reroute_and_large_ones_sometimes_do(kind: str, seed: int) -> None:
    ffn = layer(kind, seed)
    x, direction = torch.randn(2, 400, 24, dtype=torch.float64)

    def rerouted(size: float) -> float:
        return (tiles_of(ffn, x + size * direction) != tiles_of(ffn, x)).double().mean().item()

    assert rerouted(0.0) == 0.0
    assert rerouted(0.01) < 0.05
    assert rerouted(0.01) <= rerouted(3.0)
    assert 0.2 < rerouted(3.0) < 1.0


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LAYERS), st.integers(0, 100), st.integers(1, 3))
def test_a_batch_is_computed_as_its_rows_are_one_by_one(kind: str, seed: int, top_k: int) -> None:
    ffn = layer(kind, seed, top_k=top_k)
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    rows = torch.stack([torch.stack([ffn(token) for token in sequence]) for sequence in x])
    torch.testing.assert_close(ffn(x), rows)
    order = torch.randperm(8)
    torch.testing.assert_close(ffn(x.flatten(0, 1)[order]), ffn(x).flatten(0, 1)[order])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LAYERS), st.integers(0, 100), st.floats(0.01, 100.0))
def test_scaling_the_input_reroutes_in_no_layer(kind: str, seed: int, factor: float) -> None:
    ffn = layer(kind, seed)
    x = torch.randn(30, 24, dtype=torch.float64)
    assert torch.equal(tiles_of(ffn, factor * x), tiles_of(ffn, x))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["emergent", "hierarchical"]), st.permutations(range(6)), st.integers(0, 50))
def test_permuting_the_tiles_permutes_the_choice_and_keeps_the_output(kind: str, order: list[int], seed: int) -> None:
    ffn = layer(kind, seed, top_k=2)
    permuted = copy.deepcopy(ffn)
    with torch.no_grad():
        permuted.tiles.up.weight.copy_(ffn.tiles.up.weight[order])
        permuted.tiles.down.weight.copy_(ffn.tiles.down.weight[order])
        if kind == "hierarchical":
            permuted.router.raw_signatures.copy_(ffn.router.raw_signatures[order])
    x = torch.randn(12, 24, dtype=torch.float64)
    assert torch.equal(torch.tensor(order)[tiles_of(permuted, x)], tiles_of(ffn, x))
    torch.testing.assert_close(permuted(x), ffn(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_training_settles_the_routing(kind: str) -> None:
    torch.manual_seed(0)
    ffn = layer(kind, 0, num_tiles=6, width=16).train()
    group = torch.randint(0, 6, (256,))
    x = torch.randn(6, 16, dtype=torch.float64)[group] + 0.3 * torch.randn(256, 16, dtype=torch.float64)
    target = torch.randn(6, 16, dtype=torch.float64)[group]
    num_steps = 60
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    previous, churn = tiles_of(ffn.eval(), x), []
    for _ in range(num_steps):
        y, _, aux = ffn.train()(x, return_routing=True)
        optimizer.zero_grad()
        ((y - target).square().mean() + aux["total_aux"]).backward()
        optimizer.step()
        schedule.step()
        present = tiles_of(ffn.eval(), x)
        churn.append((present != previous).double().mean().item())
        previous = present
    early, late = sum(churn[:15]) / 15, sum(churn[-15:]) / 15
    assert early > 0.0
    assert late < 0.5 * early
