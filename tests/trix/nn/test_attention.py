import pytest
import torch

from trix.nn import RotaryAttention
from trix.outputs import TokenContext


def attend(
    attention: RotaryAttention, x: torch.Tensor, is_causal: bool = True, mask: torch.Tensor | None = None
) -> torch.Tensor:
    y, state, phase = attention(x, TokenContext(mask_BT=mask, is_causal=is_causal))
    assert state == ()
    assert phase is None
    return y


def test_causal_attention_does_not_see_the_future() -> None:
    attention = RotaryAttention(16, 2, context_length=10).double()
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    edited = x.clone()
    edited[:, 6:] += 1.0
    assert torch.equal(attend(attention, x)[:, :6], attend(attention, edited)[:, :6])
    assert not torch.allclose(attend(attention, x, is_causal=False)[:, :6], attend(attention, edited, is_causal=False)[:, :6])


def test_attention_equals_the_formula_with_complex_rotation() -> None:
    """RoFormer's definition: a pair of coordinates is a complex number, turned by position times frequency."""
    torch.manual_seed(0)
    B, T, D, heads = 2, 5, 8, 2
    attention = RotaryAttention(D, heads, context_length=8).double()
    attention.cos, attention.sin = attention.cos.double(), attention.sin.double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T).chunk(3, dim=-1)
    width = D // heads
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones_like(angle), angle)
    out = torch.zeros(B, T, D, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        qc, kc = (torch.complex(*m[..., part].chunk(2, dim=-1)) * turn for m in (q, k))
        score = (qc @ kc.conj().mT).real / width**0.5
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        out[..., part] = score.softmax(-1) @ v[..., part]
    torch.testing.assert_close(attend(attention, x), out @ attention.out.weight.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_nothing_looks_at_padding(is_causal: bool) -> None:
    torch.manual_seed(0)
    attention = RotaryAttention(16, 2, context_length=10).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(attend(attention, x, is_causal, mask), attend(attention, x, is_causal))
    mask[1, 4:] = False
    edited = x.clone()
    edited[1, 4:] += 1.0
    got = attend(attention, edited, is_causal, mask)
    torch.testing.assert_close(got[1, :4], attend(attention, x[1:, :4], is_causal)[0])
    torch.testing.assert_close(got[0], attend(attention, x[:1], is_causal)[0])
    assert attend(attention, x, is_causal, torch.zeros_like(mask)).isfinite().all()


def test_the_state_holds_what_was_read_and_answers_go_on_from_it() -> None:
    torch.manual_seed(0)
    attention = RotaryAttention(16, 2, context_length=10).double()
    x = torch.randn(3, 10, 16, dtype=torch.float64)
    state, parts = attention.empty_state(3), []
    for part in x.split([4, 1, 0, 5], dim=1):
        before = [value.clone() for value in state]
        y, new_state, _ = attention(part, state=state)
        assert all(map(torch.equal, before, state))  # a value: whoever holds it can go on from it again
        parts.append(y)
        state = new_state
    torch.testing.assert_close(torch.cat(parts, dim=1), attend(attention, x))
    assert [value.shape for value in state] == [(3, 2, 10, 8)] * 2


def test_the_empty_state_is_what_the_specs_say() -> None:
    attention = RotaryAttention(16, 2, context_length=10).double()
    assert attention.state_specs() == (("key", ("batch", 2, "past", 8)), ("value", ("batch", 2, "past", 8)))
    state = attention.empty_state(3)
    assert [(value.shape, value.dtype) for value in state] == [((3, 2, 0, 8), torch.float64)] * 2


def test_gradients_go_through_the_state() -> None:
    attention = RotaryAttention(8, 2, context_length=4).double()

    def two_calls(x: torch.Tensor) -> torch.Tensor:
        first, state, _ = attention(x[:, :2], state=attention.empty_state(1))
        return torch.cat([first, attention(x[:, 2:], state=state)[0]], dim=1)

    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_calls, x)
    assert torch.autograd.gradcheck(lambda x: attend(attention, x), x)


def test_a_state_must_fit() -> None:
    attention = RotaryAttention(16, 2, 8)
    _, state, _ = attention(torch.randn(2, 6, 16), state=attention.empty_state(2))
    with pytest.raises(ValueError, match=r"sequence length \(3 after 6 before\) must be <= context_length \(8\)"):
        attention(torch.randn(2, 3, 16), state=state)
    with pytest.raises(ValueError, match=r"batch of the state \(2\) must be that of x \(1\)"):
        attention(torch.randn(1, 1, 16), state=state)
    for context in (TokenContext(is_causal=False), TokenContext(mask_BT=torch.ones(2, 1, dtype=torch.bool))):
        with pytest.raises(ValueError, match="with a state, is_causal must be True and mask_BT None"):
            attention(torch.randn(2, 1, 16), context, state)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"d_model \(12\) must be divisible by 2 \* n_heads \(8\)"):
        RotaryAttention(12, 4, 8)
    with pytest.raises(ValueError, match=r"sequence length \(9\) must be <= context_length \(8\)"):
        RotaryAttention(16, 4, 8)(torch.randn(1, 9, 16))


def test_ternary_projections_pack() -> None:
    attention = RotaryAttention(16, 2, 8, ternary=True)
    x = torch.randn(2, 8, 16)
    before = attend(attention, x)
    attention.qkv.pack()
    attention.out.pack()
    torch.testing.assert_close(attend(attention, x), before)
