import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.functional.phase import nearest_tiles, place_score, resolvent_phase
from trix.functional.resolvent import Pair


def random_pair(*shape: int, dtype: torch.dtype = torch.float32) -> Pair:
    torch.manual_seed(0)
    return Pair(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def test_the_phase_is_the_argument_modulo_pi() -> None:
    G = random_pair(2000, dtype=torch.float64)
    expected = torch.complex(*G).angle() % math.pi
    torch.testing.assert_close(resolvent_phase(G), expected, atol=1e-15, rtol=0)
    torch.testing.assert_close(resolvent_phase(Pair(-G.re, -G.im)), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_phase_has_the_same_bits_in_every_prefix_and_row(dtype: torch.dtype) -> None:
    G = random_pair(3, 257, dtype=dtype)
    whole = resolvent_phase(G)
    for length in range(1, 257):
        for row in range(3):
            part = Pair(G.re[row, :length].clone(), G.im[row, :length].clone())
            assert torch.equal(resolvent_phase(part), whole[row, :length])


def test_extreme_values_have_a_phase_and_a_gradient() -> None:
    # A potential of 1e9 gives Re G = -1e-9 and Im G = eta * 1e-18; eta = 1e-3 gives |G| up to 1e3.
    G = Pair(torch.tensor([1e-9, -1e-9, 0.0, 1e3]), torch.tensor([1e-21, 1e-21, 1e3, 1e-3]))
    re, im = (part.requires_grad_() for part in G)
    phase = resolvent_phase(Pair(re, im))
    torch.testing.assert_close(phase, torch.tensor([0.0, math.pi, math.pi / 2, 1e-6]), atol=1e-6, rtol=0)
    grad_re, grad_im = torch.autograd.grad(phase.sum(), (re, im))
    square = re.double().square() + im.double().square()
    torch.testing.assert_close(grad_re.double(), -im.double() / square, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_im.double(), re.double() / square, rtol=1e-5, atol=0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.data())
def test_no_tile_left_out_is_nearer(num_tiles: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_tiles))
    place = data.draw(st.floats(0, num_tiles))
    tile_idx = nearest_tiles(torch.tensor(place, dtype=torch.float64), num_tiles, top_k).tolist()
    assert tile_idx == list(range(tile_idx[0], tile_idx[0] + top_k))
    assert 0 <= tile_idx[0] <= num_tiles - top_k
    distance = {tile: abs(place - (tile + 0.5)) for tile in range(num_tiles)}
    rest = [distance[tile] for tile in distance if tile not in tile_idx]
    assert not rest or min(rest) >= max(distance[tile] for tile in tile_idx) - 1e-12


def test_tiles_are_weighed_by_a_bell_curve() -> None:
    tile_idx = torch.tensor([[2, 3]])
    weight = place_score(torch.tensor([2.9]), tile_idx).softmax(dim=-1)
    bell = torch.tensor([0.4, 0.6]).square().div(2 * 0.75**2).neg().exp()
    torch.testing.assert_close(weight[0], bell / bell.sum())


def test_not_a_number_names_tiles_that_exist() -> None:
    assert nearest_tiles(torch.tensor([math.nan, -math.inf]), 5, 2).tolist() == [[0, 1], [0, 1]]
