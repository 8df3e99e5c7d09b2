"""The scattering router: near tiles by phase, edges that follow the quantiles, the same bits everywhere."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from trix.nn import FFNConfig, TriXFFN
from trix.outputs import RoutingDecision, RowContext
from trix.routing import ScatteringRouter
from trix.routing.balance import tile_load


def route(router: ScatteringRouter, phase: Tensor) -> RoutingDecision:
    return router(torch.zeros(phase.numel(), router.d_model), RowContext(phase_T=phase.reshape(-1)))


def phases(num_tokens: int, deviation: float, eta: float = 1.0) -> Tensor:
    """The phases of 1 / (v - i eta), v normal with this deviation."""
    return math.pi / 2 - torch.atan(torch.randn(num_tokens) * deviation / eta)


def load_entropy(router: ScatteringRouter, phase: Tensor) -> float:
    load = tile_load(route(router, phase).tile_idx, router.num_tiles)
    return float(torch.special.entr(load).sum()) / math.log(router.num_tiles)


def calibrated(num_tiles: int, deviation: float, num_batches: int = 150, **settings: float) -> ScatteringRouter:
    torch.manual_seed(0)
    router = ScatteringRouter(4, num_tiles, top_k=2, **settings)
    for _ in range(num_batches):
        router.update_balance(route(router, phases(2048, deviation)).tile_idx)
    return router


def test_equal_bins_send_a_token_to_the_tiles_next_to_its_phase() -> None:
    router = ScatteringRouter(4, 8, top_k=2)
    place = torch.tensor([0.0, 0.4, 1.2, 1.7, 3.5, 7.9, 8.0])
    tile_idx, weight, score = route(router, place * math.pi / 8)
    assert tile_idx.tolist() == [[0, 1], [0, 1], [1, 0], [1, 2], [3, 4], [7, 6], [7, 6]] or tile_idx[4].tolist() == [3, 2]
    torch.testing.assert_close(score, -(place[:, None] - torch.arange(8) - 0.5).square() / (2 * 0.75**2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight, score.gather(1, tile_idx).softmax(dim=1))
    assert (weight[:, 0] >= weight[:, 1]).all()


def test_the_last_phase_belongs_to_the_last_tile() -> None:
    router = ScatteringRouter(4, 5, top_k=1)
    assert route(router, torch.tensor([0.0, math.pi])).tile_idx.flatten().tolist() == [0, 4]


@pytest.mark.parametrize("num_tiles", [8, 64])
@pytest.mark.parametrize("deviation", [0.02, 1.0])
def test_edges_learn_to_load_all_tiles_alike(num_tiles: int, deviation: float) -> None:
    router, fresh = calibrated(num_tiles, deviation), ScatteringRouter(4, num_tiles, top_k=2)
    unseen = phases(5000, deviation)
    assert load_entropy(router.eval(), unseen) > 0.95
    if deviation == 0.02:  # as measured before calibration: .33 with 8 tiles
        assert load_entropy(fresh, unseen) < 0.4


def test_edges_of_calibrated_bins_are_the_quantiles() -> None:
    router = calibrated(4, 1.0)
    exact = phases(200_000, 1.0).quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(router.edge, exact, atol=0.03, rtol=0)


def test_an_edge_rate_of_0_keeps_equal_bins() -> None:
    router = calibrated(8, 0.02, num_batches=3, edge_rate=0.0)
    torch.testing.assert_close(router.edge, torch.arange(1, 8) * math.pi / 8)
    assert calibrated(8, 0.02, num_batches=3, edge_rate=1.0).edge[0] > 1.0


def test_equal_phases_leave_bins_of_a_width_and_finite_gradients() -> None:
    router = ScatteringRouter(4, 8, top_k=2, edge_rate=0.5)
    for _ in range(200):
        router.update_balance(route(router, torch.full((64,), 1.0)).tile_idx)
    width = torch.cat([torch.zeros(1), router.edge, torch.full((1,), math.pi)]).diff()
    assert width.min() > 0.99e-3 * math.pi / 8
    phase = phases(100, 1.0).requires_grad_()
    router.place(phase).sum().backward()
    assert phase.grad.max() < 1010 * 8 / math.pi


def test_padding_and_empty_batches_do_not_move_the_edges_far() -> None:
    router, other = calibrated(8, 0.5), calibrated(8, 0.5)
    phase = torch.cat([phases(512, 0.5), torch.full((512,), 3.0)])
    weight = torch.ones(1024, 2)
    weight[512:] = 0.0
    router.update_balance(route(router, phase).tile_idx, weight)
    other.update_balance(route(other, phase[:512]).tile_idx)
    assert torch.equal(router.edge, other.edge)
    router.update_balance(torch.empty(0, 2, dtype=torch.int64))
    torch.testing.assert_close(router.edge, other.edge, atol=1e-3, rtol=0)


def test_tiles_and_weights_have_the_same_bits_in_every_prefix_and_row() -> None:
    router = calibrated(8, 0.5).eval()
    phase = phases(3 * 150, 0.5).reshape(3, 150)
    whole = [value.reshape(3, 150, -1) for value in route(router, phase)]
    for length in range(1, 150):
        for row in range(3):
            part = route(router, phase[row, :length].clone())
            assert all(torch.equal(value, one[row, :length]) for value, one in zip(part, whole, strict=True))


def test_the_gradient_reaches_the_phase_through_the_weights_of_two_tiles_and_not_of_one() -> None:
    phase = phases(50, 1.0).double().requires_grad_()
    router = ScatteringRouter(4, 8, top_k=2).double()
    # The places stand clear of the points at which the choice of tiles jumps.
    safe = phase.detach()[((phase.detach() * 8 / math.pi) % 1 - 0.5).abs() < 0.45].requires_grad_()
    assert torch.autograd.gradcheck(lambda value: route(router, value).weight[:, 0], (safe,))
    one = route(ScatteringRouter(4, 8, top_k=1), phase).weight
    assert torch.equal(one, torch.ones_like(one))
    assert torch.autograd.grad(one.sum(), phase)[0].abs().max() == 0


def test_adaptive_k_uses_one_tile_in_the_middle_of_a_bin_and_two_between_bins() -> None:
    router = ScatteringRouter(4, 8, max_k=2, confidence_threshold=0.3)
    weight = route(router, torch.tensor([2.5, 2.98]) * math.pi / 8).weight
    assert (weight != 0).sum(dim=1).tolist() == [1, 2]


def test_edges_survive_state_dicts_casts_and_copies_and_an_average_follows() -> None:
    router, other = calibrated(8, 0.02, num_batches=5), ScatteringRouter(4, 8, top_k=2)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.edge, router.edge)
    assert torch.equal(copy.deepcopy(router).edge, router.edge)
    assert router.half().edge.dtype == torch.float32
    layer = TriXFFN(4, 8, top_k=2, routing="scattering")
    average = AveragedModel(layer, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    average.update_parameters(layer)
    layer.router.update_balance(route(layer.router, phases(512, 0.02)).tile_idx)
    middle = (average.module.router.edge + layer.router.edge) / 2
    average.update_parameters(layer)
    torch.testing.assert_close(average.module.router.edge, middle)


@pytest.mark.parametrize("edge", [[1.0, 0.5, 2.0], [1.0, math.nan, 2.0], [0.0, 1.0, 2.0], [1.0, 2.0, 4.0]])
def test_edges_that_do_not_rise_are_refused(edge: list[float]) -> None:
    router = ScatteringRouter(4, 4)
    state = router.state_dict() | {"edge": torch.tensor(edge)}
    with pytest.raises(ValueError, match=r"edges \(\[.*\]\) must rise from 0 to pi"):
        router.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for edge"):
        router.load_state_dict(state | {"edge": torch.ones(3, 3)})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"edge_rate \(1.5\) must be >= 0 and <= 1"):
        ScatteringRouter(4, 8, edge_rate=1.5)
    with pytest.raises(ValueError, match=r"top_k \(9\) must be >= 1 and <= num_tiles \(8\)"):
        ScatteringRouter(4, 8, top_k=9)
    router = ScatteringRouter(4, 8)
    with pytest.raises(ValueError, match="needs the phase of each token, got None"):
        router(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"phases \(2\) must be one for each of the tokens \(3\)"):
        router(torch.zeros(3, 4), RowContext(phase_T=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"last dimension of x \(5\) must equal d_model \(4\)"):
        router(torch.zeros(3, 5), RowContext(phase_T=torch.zeros(3)))


def test_a_layer_trains_its_edges_and_leaves_them_alone_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = FFNConfig(num_tiles=8, top_k=2, routing="scattering").build(16)
    assert isinstance(layer, TriXFFN)
    x, phase = torch.randn(4, 64, 16), phases(256, 0.02).reshape(4, 64).requires_grad_()
    first = layer.router.edge.clone()
    layer(x, phase=phase).square().sum().backward()
    assert phase.grad.abs().max() > 0
    moved = layer.router.edge.clone()
    assert not torch.equal(moved, first)
    layer.eval()(x, phase=phase)
    assert torch.equal(layer.router.edge, moved)


def test_it_compiles_whole() -> None:
    router, phase = calibrated(8, 0.5, num_batches=3), phases(16, 0.5)
    compiled = torch.compile(lambda value: route(router, value), fullgraph=True, backend="eager")
    for found, expected in zip(compiled(phase), route(router, phase), strict=True):
        assert torch.equal(found, expected)
