import pytest
import torch

from trix.nn import GridSplines, HingeSplines

NUM_TILES = 5
KINDS = [
    lambda: GridSplines(NUM_TILES, 3, is_ternary=False),
    lambda: GridSplines(NUM_TILES, 3, is_ternary=True),
    lambda: HingeSplines(NUM_TILES, 6),
]


def by_definition(splines: GridSplines | HingeSplines, p: torch.Tensor, e: int) -> torch.Tensor:
    """One point of one tile."""
    if isinstance(splines, HingeSplines):
        creases = torch.relu(splines.slope_EGI[e] @ p + splines.offset_EG[e])
        return splines.base_E[e] + splines.height_EG[e] @ creases
    n = splines.grid_size
    corner = splines.values()[e].reshape(n + 1, n + 1)
    position = [(float(a) + 1) / 2 * n for a in p]
    cell = [min(int(a), n - 1) for a in position]
    (u, v), (i, j) = [a - c for a, c in zip(position, cell, strict=True)], cell
    top = (1 - v) * corner[i, j] + v * corner[i, j + 1]
    bottom = (1 - v) * corner[i + 1, j] + v * corner[i + 1, j + 1]
    return (1 - u) * top + u * bottom


@pytest.mark.parametrize("make", KINDS)
def test_each_token_meets_the_function_of_its_own_tile(make) -> None:
    splines = make().double()
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1], [0, 0]], dtype=torch.float64)
    point = torch.cat([torch.rand(40, 2, dtype=torch.float64) * 2 - 1, corners])
    tile_idx = torch.randint(0, NUM_TILES, (len(point),))
    expected = torch.stack([by_definition(splines, p, int(e)) for p, e in zip(point, tile_idx, strict=True)])
    torch.testing.assert_close(splines(point, tile_idx), expected)


@pytest.mark.parametrize("make", [KINDS[0], KINDS[2]])
def test_gradients_are_those_of_the_formula(make) -> None:
    splines = make().double()
    point = (torch.rand(6, 2, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    tile_idx = torch.tensor([0, 1, 1, 2, 4, 0])
    parameters = {name: value.detach().clone().requires_grad_() for name, value in splines.named_parameters()}

    def magnitude(point: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(splines, dict(zip(parameters, values, strict=True)), (point, tile_idx))

    assert torch.autograd.gradcheck(magnitude, (point, *parameters.values()))


def test_ternary_splines_hold_three_values_per_tile_and_still_learn() -> None:
    splines = GridSplines(4, 16)
    assert splines.values().shape == (4, 17 * 17)
    for values in splines.values():
        scale = values.abs().max()
        assert set((values / scale).unique().tolist()) == {-1.0, 0.0, 1.0}
    splines(torch.rand(50, 2) * 2 - 1, torch.randint(0, 4, (50,))).sum().backward()
    assert splines.corner_EV.grad is not None
    assert splines.corner_EV.grad.abs().sum() > 0


def test_a_grid_spline_is_continuous_across_its_cells() -> None:
    splines = GridSplines(1, 4, is_ternary=False).double()
    edge = torch.stack([torch.linspace(-1, 1, 50).double(), torch.full((50,), 0.5).double()], dim=-1)
    step = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    tile_idx = torch.zeros(50, dtype=torch.int64)
    torch.testing.assert_close(splines(edge - step, tile_idx), splines(edge + step, tile_idx), atol=1e-7, rtol=0)


@pytest.mark.parametrize("make", [GridSplines, HingeSplines])
def test_only_chosen_tiles_get_a_gradient_and_no_tokens_is_fine(make) -> None:
    splines = make(NUM_TILES, 1)
    splines(torch.rand(8, 2), torch.tensor([1] * 8)).sum().backward()
    for parameter in splines.parameters():
        assert parameter.grad is not None
        assert parameter.grad[[0, 2, 3, 4]].eq(0).all()
    assert splines(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    with pytest.raises(ValueError, match=r"num_tiles \(0\) and grid_size \(4\) must be >= 1"):
        make(0, 4)
