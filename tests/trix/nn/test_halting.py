"""Adaptive computation time."""

import pytest
import torch
from torch import Tensor

from trix.nn import FFNConfig, TriXStack
from trix.nn.halting import Halting
from trix.outputs import TokenContext


def make(threshold: float = 0.2, **settings: object) -> TriXStack:
    torch.manual_seed(0)
    ffn = FFNConfig(num_tiles=4)
    return TriXStack(4, 16, 2, ffn, context_length=12, halt_threshold=threshold, **settings).double().eval()  # type: ignore[arg-type]


def weights(p: list[float], threshold: float) -> tuple[list[float], int]:
    """By hand: the weight of each block, and the blocks computed."""
    spent, found = 0.0, []
    for place, value in enumerate(p):
        is_last = place == len(p) - 1 or spent + value >= 1 - threshold
        found.append(1 - spent if is_last else value)
        if is_last:
            return found, place + 1
        spent += value
    raise AssertionError


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6])
def test_a_token_ends_where_the_formula_says(threshold: float) -> None:
    halting = Halting(1, threshold).double()
    with torch.no_grad():
        halting.halt.weight.fill_(1.0)
        halting.halt.bias.zero_()
    logit_LT = torch.randn(5, 30, dtype=torch.float64)
    halted = halting.start(logit_LT[0][None, :, None])
    for place in range(5):
        halted = halting.step(logit_LT[place][None, :, None], halted, is_last=place == 4)
    for token in range(30):
        by_hand, steps = weights(torch.sigmoid(logit_LT[:, token]).tolist(), threshold)
        assert halted.steps_BT[0, token] == steps
        expected = sum(weight * float(x) for weight, x in zip(by_hand, logit_LT[:, token], strict=False))
        assert halted.mean_BTD[0, token, 0].item() == pytest.approx(expected)
        assert halted.remainder_BT[0, token].item() == pytest.approx(by_hand[-1])
    torch.testing.assert_close(halted.spent_BT, torch.ones_like(halted.spent_BT))
    assert len(set(halted.steps_BT.flatten().tolist())) > 1
    cost = 0.01 * (halted.steps_BT + halted.remainder_BT)
    torch.testing.assert_close(halting.ponder(halted, None), cost.mean())
    mask = torch.arange(30)[None] < 7
    torch.testing.assert_close(halting.ponder(halted, mask), cost[:, :7].mean())


def _halting_at_once(stack: TriXStack) -> TriXStack:
    with torch.no_grad():
        stack.halting.halt.weight.zero_()  # type: ignore[union-attr]
        stack.halting.halt.bias.fill_(30.0)  # type: ignore[union-attr]
    return stack


def test_tokens_that_have_halted_are_computed_by_no_tile_and_stay_as_they_are() -> None:
    stack, x = _halting_at_once(make()), torch.randn(2, 9, 16, dtype=torch.float64)
    y, infos, _ = stack(x, return_routing=True)
    first, _ = stack.blocks[0](x, return_routing=True, context=TokenContext(embedding_BTD=x))[:2]
    torch.testing.assert_close(y, first)
    assert infos[0]["weight"].min() > 0
    assert all(bool((info["weight"] == 0).all()) for info in infos[1:])


def test_it_is_causal_and_a_text_may_come_in_pieces() -> None:
    stack, x = make(0.45), torch.randn(2, 9, 16, dtype=torch.float64)
    edited = x.clone()
    edited[:, 6] += 1
    assert torch.equal(stack(x)[:, :6], stack(edited)[:, :6])
    state, parts = stack.empty_state(2), []
    for piece in x.split([4, 1, 4], dim=1):
        (part, _, _), state = stack(piece, state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), stack(x))


def test_the_cost_reaches_the_decision() -> None:
    stack = make().train()
    _, _, aux = stack(torch.randn(2, 9, 16, dtype=torch.float64), return_routing=True)
    aux["total_aux"].backward()
    gradient: Tensor = stack.halting.halt.bias.grad  # type: ignore[union-attr,assignment]
    assert gradient.abs() > 0


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_a_threshold_outside_the_unit_interval_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"halting threshold \({threshold}\) must be > 0 and < 1"):
        make(threshold)
