import math
from typing import Any

import pytest
import torch

from trix.nn import FFNConfig, TriXBlock
from trix.routing.balance import balance_loss, balance_nudge, mean_softmax, tile_load


def test_load_is_the_share_of_assignments() -> None:
    assert tile_load(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [0.25, 0.0, 0.75, 0.0]
    assert tile_load(torch.zeros(0, 1, dtype=torch.int64), 2).tolist() == [0.0, 0.0]


def test_balance_loss_is_one_when_even_and_num_tiles_when_collapsed() -> None:
    even = torch.eye(4) * 50
    assert balance_loss(even, even.argmax(-1, keepdim=True)).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 0, 0, 0]] * 4)
    assert balance_loss(collapsed, collapsed.argmax(-1, keepdim=True)).item() == pytest.approx(4.0)
    assert balance_loss(torch.zeros(0, 4), torch.zeros(0, 1, dtype=torch.int64)).item() == 0.0


def test_a_step_down_the_balance_loss_evens_the_scores() -> None:
    score = torch.randn(64, 4)
    score[:, 1] += 2.0
    score.requires_grad_()
    balance_loss(score, score.argmax(-1, keepdim=True)).backward()
    assert score.grad is not None
    assert score.grad[:, 1].mean() > 0  # descent lowers the crowded tile's score


def test_the_bias_moves_against_the_load() -> None:
    bias = balance_nudge(torch.tensor([[0], [0], [0], [1], [1], [2]]), 3, rate=0.1)
    assert bias.tolist() == pytest.approx([-0.1, 0.0, 0.1])


def test_by_ratio_the_bias_moves_as_far_as_the_load_is_off() -> None:
    by_ratio = torch.tensor(True)
    nudge = balance_nudge(torch.tensor([[0]] * 8 + [[1]] * 2), 4, 0.1, is_by_ratio=by_ratio)
    expected = [0.1 * math.log(0.25 / 0.8), 0.1 * math.log(0.25 / 0.2), 0.4, 0.4]
    assert nudge.tolist() == pytest.approx(expected, abs=1e-6)
    in_use = torch.tensor([True, True, True, False])
    assert balance_nudge(torch.tensor([[0], [1], [2]]), 4, 0.1, in_use=in_use, is_by_ratio=by_ratio).tolist() == [0.0] * 4
    assert balance_nudge(torch.empty(0, 1, dtype=torch.int64), 4, 0.1, is_by_ratio=by_ratio).tolist() == [0.0] * 4


def test_padding_counts_neither_in_the_load_nor_in_the_probability() -> None:
    score, tile_idx = torch.randn(9, 4), torch.randint(0, 4, (9, 1))
    mask = torch.tensor([True] * 6 + [False] * 3)
    torch.testing.assert_close(balance_loss(score, tile_idx, mask.unsqueeze(-1)), balance_loss(score[:6], tile_idx[:6]))
    assert balance_loss(score, tile_idx, torch.zeros(9, 1)) == 0.0


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_mean_softmax_has_the_gradient_of_its_formula(is_masked: bool) -> None:
    torch.manual_seed(0)
    score = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    is_counted = torch.tensor([True, False, True, True, False, True]) if is_masked else None
    counted = score if is_counted is None else score[is_counted]
    torch.testing.assert_close(mean_softmax(score, is_counted), counted.softmax(dim=-1).mean(dim=0))
    assert torch.autograd.gradcheck(mean_softmax, (score, is_counted))


def test_tiles_that_are_not_in_use_have_no_part_in_the_balance() -> None:
    tile_idx = torch.tensor([[0], [0], [0], [2], [2]])
    nudge = balance_nudge(tile_idx, 4, rate=0.1, in_use=torch.tensor([True, False, True, False]))
    assert nudge.tolist() == pytest.approx([-0.1, 0.0, 0.1, 0.0])


@pytest.mark.parametrize("is_padded", [False, True])
def test_two_processes_have_the_balance_of_one(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    score, tile_idx = torch.randn(12, 4, requires_grad=True), torch.randint(0, 4, (12, 2))
    mask_T = torch.tensor([True] * 7 + [False] * 5) if is_padded else torch.ones(12, dtype=torch.bool)
    weight = mask_T.unsqueeze(-1).expand(-1, 2).float()
    expected = balance_loss(score, tile_idx, weight)
    (expected_gradient,) = torch.autograd.grad(expected, score)
    nudge = balance_nudge(tile_idx, 4, 0.1, weight)

    halves = (slice(0, 6), slice(6, 12))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sent: list[list[torch.Tensor]] = [[], []]  # by half, what it tells the other
    for half, part in enumerate(halves):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, told=sent[half]: told.append(count.clone()))
        balance_loss(score[part], tile_idx[part], weight[part])
        balance_nudge(tile_idx[part], 4, 0.1, weight[part])
    losses = []
    for half, part in enumerate(halves):
        messages = iter(sent[1 - half])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, told=messages: count.add_(next(told)))
        losses.append(balance_loss(score[part], tile_idx[part], weight[part]))
        assert balance_nudge(tile_idx[part], 4, 0.1, weight[part]).tolist() == nudge.tolist()
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.autograd.grad(mean, score)[0], expected_gradient)


@pytest.mark.parametrize("kind", ["trix", "hierarchical", "sparse_lookup", "sparse_lookup_v2"])
def test_the_balance_loss_trains_under_autocast(kind: Any) -> None:
    block = TriXBlock(16, 2, FFNConfig(kind=kind, num_tiles=4), context_length=8)
    with torch.autocast("cpu", torch.bfloat16):
        y, _, aux = block(torch.randn(2, 5, 16), return_routing=True)
        assert aux is not None
        loss = y.float().square().mean() + aux["total_aux"]
    loss.backward()
    assert aux["balance"].dtype == torch.float32
    gradients = [p.grad for p in block.ffn.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
