import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix import TriXFFN
from trix.functional.gates import adaptive_k, adaptive_weight
from trix.functional.tile_matmul import group_tokens, grouped_linear
from trix.nn import FFNConfig
from trix.routing import LearnedRouter, SignatureRouter
from trix.routing.balance import tile_load
from trix.routing.confidence import routing_confidence


def test_k_and_weights_by_hand() -> None:
    score = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.875, 0.0], [1.0, 1.0, 0.875], [0.0, 5.0, 4.75]])
    assert routing_confidence(score).tolist() == [1.0, 0.125, 0.0, 0.25]
    assert adaptive_k(score, 0.25, max_k=2).tolist() == [1, 2, 2, 2]
    assert adaptive_k(score, 0.25, max_k=3).tolist() == [1, 2, 3, 2]
    tile_idx = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 2]])
    weight = adaptive_weight(score, tile_idx, 0.25)
    assert weight[0].tolist() == [1.0, 0.0]
    torch.testing.assert_close(weight[3], torch.tensor([5.0, 4.75]).softmax(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.0, 3.0))
def test_weights_of_used_tiles_sum_to_one_and_k_falls_with_confidence(seed: int, max_k: int, threshold: float) -> None:
    torch.manual_seed(seed)
    router = SignatureRouter(16, 6, max_k=max_k, confidence_threshold=threshold).double()
    router.balance_bias.copy_(torch.randn(6) * 0.3)
    decision = router(torch.randn(30, 16, dtype=torch.float64))
    assert decision.tile_idx.shape == decision.weight.shape == (30, max_k)
    torch.testing.assert_close(decision.weight.sum(1), torch.ones(30, dtype=torch.float64))
    k = (decision.weight != 0).sum(1)
    confidence = routing_confidence(decision.score)
    assert k[confidence > threshold].eq(1).all()
    if max_k == 2:
        assert k[confidence <= threshold].eq(2).all()
    is_used = decision.weight != 0
    assert (is_used[:, :-1] | ~is_used[:, 1:]).all()  # the best ones are used, the rest is padding


def test_the_threshold_means_the_same_at_every_width() -> None:
    torch.manual_seed(0)
    share = []
    for width in (32, 512):
        router = SignatureRouter(width, 8, max_k=2)
        share.append((router(torch.randn(4000, width)).weight[:, 1] == 0).float().mean().item())
    assert share[0] == pytest.approx(share[1], abs=0.06)
    assert 0.2 < share[1] < 0.9  # on raw scores nearly every gap is above the threshold


def adaptive(**options: object) -> TriXFFN:
    torch.manual_seed(3)
    return TriXFFN(12, 5, routing="explicit", max_k=3, confidence_threshold=0.5, **options).double()


def test_output_is_the_weighted_sum_of_the_used_tiles() -> None:
    ffn = adaptive().eval()
    x = torch.randn(40, 12, dtype=torch.float64)
    y, info, _ = ffn(x, return_routing=True)
    assert set((info["weight"] != 0).sum(1).tolist()) == {1, 2, 3}
    torch.testing.assert_close(y, ffn.tiles(x, info["tile_idx"], info["weight"]))  # every assignment computed
    ffn.pack()
    torch.testing.assert_close(ffn(x), y)


def test_gradients_equal_those_of_computing_every_assignment() -> None:
    ffn = adaptive().train()
    ffn.router.balance_rate = 0.0
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, *ffn.parameters())
    sparse = torch.autograd.grad(ffn(x).square().sum(), inputs)
    decision = ffn.router(x)
    dense = torch.autograd.grad(ffn.tiles(x, decision.tile_idx, decision.weight).square().sum(), inputs)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_behind_the_last_group_cost_nothing_and_are_zero(dtype: torch.dtype) -> None:
    groups = group_tokens(torch.tensor([3, 0, 3, 1, 3]), 3)  # 3 tiles: index 3 is none of them
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, weight, groups.ends, has_rest=True)
    torch.testing.assert_close(y[0], weight[0] @ x[0])
    torch.testing.assert_close(y[1], weight[1] @ x[1])
    assert y[2:].eq(0).all()
    y.sum().backward()
    assert x.grad[2:].eq(0).all()
    assert weight.grad[2].eq(0).all()


def test_unused_assignments_are_not_load() -> None:
    tile_idx, weight = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(tile_load(tile_idx, 3, weight), torch.tensor([2 / 3, 0.0, 1 / 3]))


def test_stats_report_mean_k_and_confidence() -> None:
    ffn = adaptive()
    x = torch.randn(200, 12, dtype=torch.float64)
    stats = ffn.get_routing_stats(x)
    _, info, _ = ffn.eval()(x, return_routing=True)
    assert stats["mean_k"] == pytest.approx((info["weight"] != 0).sum().item() / 200)
    confidence = routing_confidence(info["scores"])
    assert stats["confidence"] == pytest.approx(confidence.mean().item(), rel=1e-5)
    assert stats["confidence_quartiles"][1] == pytest.approx(confidence.median().item(), abs=0.05)
    assert stats["confidence_quartiles"] == sorted(stats["confidence_quartiles"])
    assert adaptive().get_routing_stats(x[:0])["mean_k"] == 0.0
    assert TriXFFN(12, 5, top_k=2).get_routing_stats(x.float())["mean_k"] == 2.0


@pytest.mark.parametrize("routing", ["explicit", "emergent", "learned"])
def test_compiles_exports_and_trains(routing: str) -> None:
    ffn = FFNConfig(num_tiles=4, routing=routing, max_k=2).build(16)
    assert isinstance(ffn, TriXFFN)
    x = torch.randn(8, 16)
    compiled = torch.compile(copy.deepcopy(ffn).eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ffn.eval()(x))
    program = torch.export.export(ffn, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    other = torch.randn(5, 16)
    torch.testing.assert_close(program.module()(other), ffn(other))
    ffn.train()(torch.randn(64, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ffn.parameters())


def test_errors_state_the_rule_and_both_values() -> None:
    with pytest.raises(ValueError, match=r"max_k \(5\) must be >= 1 and <= num_tiles \(4\), and top_k \(1\) must then be 1"):
        SignatureRouter(8, 4, max_k=5)
    with pytest.raises(ValueError, match=r"top_k \(2\) must then be 1"):
        LearnedRouter(8, 4, top_k=2, max_k=2)
    with pytest.raises(ValueError, match=r"confidence_threshold \(-0.1\) must be >= 0"):
        SignatureRouter(8, 4, max_k=2, confidence_threshold=-0.1)
