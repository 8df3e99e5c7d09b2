import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_banded
from torch import Tensor
from tridiagonal import dense, random_operator, relative_error, tokens

from trix.functional.resolvent import (
    METHODS,
    Method,
    Pair,
    hermitian_couplings,
    log_prefix_determinant,
    open_left_end,
    resolvent_pivots,
    two_sided_diagonal,
)
from trix.functional.resolvent_sweep import resolvent_sweep

TOLERANCE = {"chunk": 1e-12, "loop": 1e-12, "scan": 1e-11}
EXACT = 1e-11  # float64, in another order of operations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 100, 700])
def test_pivots_are_the_last_entries_of_dense_inverses(num_tokens: int, method: Method) -> None:
    alpha, c, w = random_operator(3, num_tokens, spikes=1e9, seed=num_tokens)
    G = resolvent_pivots(alpha, w, method=method)
    for length in {1, (num_tokens + 1) // 2, num_tokens}:
        block = dense(tokens(alpha, slice(length)), tokens(c, slice(length)))
        last = torch.linalg.inv(block)[:, -1, -1:]
        assert relative_error(tokens(G, slice(length - 1, length)), last) <= TOLERANCE[method]


def test_4096_tokens_have_the_entries_of_the_dense_inverse() -> None:
    """Of its columns at some tokens, which a solve gives in a third of the time of them all."""
    alpha, c, w = random_operator(4096, spikes=1e9)
    places = [0, 1, 31, 32, 2047, 4094, 4095]
    columns = torch.linalg.solve(dense(alpha, c), torch.eye(4096, dtype=torch.complex128)[:, places])
    for method in METHODS:
        G = resolvent_pivots(alpha, w, method=method)
        assert relative_error(tokens(G, slice(-1, None)), columns[-1, -1:]) <= TOLERANCE[method]
        both = two_sided_diagonal(alpha, w, method=method)
        assert relative_error(Pair(both.re[places], both.im[places]), columns[places].diagonal()) <= TOLERANCE[method]


def test_the_two_sided_diagonal_of_4096_tokens_is_that_of_a_banded_solve() -> None:
    alpha, c, w = random_operator(4096, spikes=1e9)
    below = torch.complex(*c)[1:].numpy()
    band = [np.append(0, below.conj()), torch.complex(*alpha).numpy(), np.append(below, 0)]
    expected = torch.from_numpy(solve_banded((1, 1), np.stack(band), np.eye(4096)).diagonal().copy())
    for method in METHODS:
        assert relative_error(two_sided_diagonal(alpha, w, method=method), expected) <= TOLERANCE[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 5, 37])
def test_gradients_of_the_pivots(num_tokens: int, method: Method) -> None:
    # In the terms of the model: potential, energy, broadening (for all tokens and for each), couplings, and the state.
    alpha, _, w = random_operator(2, num_tokens)
    energy, eta = torch.tensor([0.3, 0.1], dtype=torch.float64)
    eta_of_token = torch.rand(2, num_tokens, dtype=torch.float64)
    inputs = [alpha.re, energy, eta, eta_of_token, w, torch.tensor([0.5, -1.0]).double(), torch.rand(2).double()]

    def pivots(v: Tensor, energy: Tensor, eta: Tensor, eta_of_token: Tensor, w: Tensor, *first: Tensor) -> Pair:
        return resolvent_pivots(Pair(v - energy, -eta - eta_of_token), w, Pair(*first), method=method)

    assert torch.autograd.gradcheck(pivots, [x.detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("method", ["chunk", "scan"])
def test_gradients_agree_with_the_loop_at_resets_and_spikes(method: Method) -> None:
    alpha, _, w = random_operator(2, 200, eta=0.02, spikes=1e6)
    w[0, 50] = w[1, 64] = w[:, 130:133] = 0.0
    inputs = [x.requires_grad_() for x in (*alpha, w)]
    weight = torch.randn(2, 2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(method: Method) -> tuple[Tensor, ...]:
        G = resolvent_pivots(Pair(*inputs[:2]), inputs[2], method=method)
        return torch.autograd.grad([G.re, G.im], inputs, [*weight])

    for found, expected in zip(gradients(method), gradients("loop"), strict=True):
        assert (found - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_prefix_and_every_row_gives_the_same_bits(method: Method, dtype: torch.dtype) -> None:
    alpha, _, w = random_operator(5, 1100, eta=0.01, spikes=1e9, dtype=dtype)
    G = resolvent_pivots(alpha, w, method=method)
    lengths = [*range(1, 40), 63, 64, 65, 95, 150, 511, 1024, 1025, 1099]
    for length in lengths[::6] if method == "loop" else lengths:
        for rows in (slice(0, 5), slice(1, 2), slice(2, 5)):
            part = resolvent_pivots(
                *(Pair(x[rows, :length], y[rows, :length]) for x, y in [alpha]), w[rows, :length], method=method
            )
            assert torch.equal(part.re, G.re[rows, :length])
            assert torch.equal(part.im, G.im[rows, :length])


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_that_is_continued_is_the_whole_sweep(method: Method) -> None:
    alpha, _, w = random_operator(3, 150)
    whole = resolvent_pivots(alpha, w, method=method)
    state = None
    for part in (slice(0, 47), slice(47, 48), slice(48, 150)):
        G = resolvent_pivots(tokens(alpha, part), w[..., part], state, method=method)
        assert relative_error(G, torch.complex(*tokens(whole, part))) <= EXACT
        state = Pair(G.re[..., -1], G.im[..., -1])


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_forgets_what_stood_before(method: Method) -> None:
    alpha, _, w = random_operator(2, 120)
    w[:, 70] = 0.0
    whole = resolvent_pivots(alpha, w, method=method)
    alone = resolvent_pivots(tokens(alpha, slice(70, None)), w[:, 70:], method=method)
    assert relative_error(tokens(whole, slice(70, None)), torch.complex(*alone)) <= EXACT
    changed = Pair(torch.cat([-alpha.re[:, :70], alpha.re[:, 70:]], dim=1), alpha.im)
    other = resolvent_pivots(changed, w, method=method)
    assert torch.equal(other.re[:, 70:], whole.re[:, 70:])
    assert not torch.equal(other.re[:, :70], whole.re[:, :70])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.floats(1e-3, 10.0),
    st.sampled_from([0.0, 1.0, 4.0]),
    st.sampled_from([0.0, 1.0, 1e9]),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from(METHODS),
    st.integers(0, 99),
)
def test_pivots_are_bounded_by_the_eta_of_their_token(
    num_tokens: int, eta: float, spread: float, spikes: float, scale: float, method: Method, seed: int
) -> None:
    """eta is the least of the text; with a spread of 4 the largest is 10,000 times it."""
    alpha, _, w = random_operator(2, num_tokens, spikes=spikes, seed=seed)
    factor = 10 ** (spread * torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    eta_of_token = eta * factor
    G = resolvent_pivots(Pair(alpha.re, -eta_of_token), scale * w, method=method)
    assert (torch.complex(*G).abs() * eta_of_token).max() <= 1 + 1e-9
    assert (G.im > 0).all()


def test_without_couplings_the_pivots_are_reciprocals() -> None:
    alpha, _, w = random_operator(3, 40, spikes=1e9)
    expected = 1 / torch.complex(*alpha)
    assert relative_error(resolvent_pivots(alpha, None), expected) <= 1e-15
    assert relative_error(resolvent_pivots(alpha, 0 * w), expected) <= 1e-15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 100, 700])
def test_the_two_sided_diagonal_is_that_of_the_dense_inverse(num_tokens: int, method: Method) -> None:
    alpha, c, w = random_operator(3, num_tokens, spikes=1e9, seed=num_tokens)
    expected = torch.linalg.inv(dense(alpha, c)).diagonal(dim1=-2, dim2=-1)
    assert relative_error(two_sided_diagonal(alpha, w, method=method), expected) <= TOLERANCE[method]
    coupled = w + 7.0 * (torch.arange(num_tokens) == 0)
    assert relative_error(two_sided_diagonal(alpha, coupled, method=method), expected) <= TOLERANCE[method]


def test_gradients_of_the_two_sided_diagonal() -> None:
    alpha, _, w = random_operator(1, 40, eta=0.2)
    inputs = [x.requires_grad_() for x in (*alpha, w)]
    assert torch.autograd.gradcheck(lambda a_re, a_im, w: two_sided_diagonal(Pair(a_re, a_im), w), inputs)


def test_the_prefix_determinant_is_that_of_the_leading_blocks() -> None:
    alpha, c, w = random_operator(20, eta=0.3)
    free = Pair(torch.full_like(alpha.re, -0.2), alpha.im)
    log_D = log_prefix_determinant(resolvent_pivots(alpha, w), resolvent_pivots(free, w))
    for length in (1, 2, 7, 20):
        blocks = [dense(tokens(x, slice(length)), tokens(c, slice(length))) for x in (alpha, free)]
        expected = torch.linalg.det(blocks[0]) / torch.linalg.det(blocks[1])
        found = torch.polar(log_D.re[length - 1].exp(), log_D.im[length - 1])
        torch.testing.assert_close(found, expected)


def test_the_phase_counts_the_levels_that_crossed_the_energy() -> None:
    alpha, c, w = random_operator(60, eta=1e-9)
    free = Pair(torch.zeros_like(alpha.re), alpha.im)
    below = [int((torch.linalg.eigvalsh(dense(Pair(x.re, 0 * x.im), c)) < 0).sum()) for x in (free, alpha)]
    phase = log_prefix_determinant(resolvent_pivots(alpha, w), resolvent_pivots(free, w)).im[-1]
    assert phase / math.pi == pytest.approx(below[0] - below[1], abs=1e-5)
    assert below[0] != below[1]


def test_from_the_open_left_end_equal_tokens_have_equal_pivots() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = Pair(4 * torch.randn(30, generator=generator).double(), -torch.rand(30, generator=generator).double() - 1e-3)
    w = 3 * torch.rand(30, generator=generator).double()
    w[:3] = 0.0
    alpha.re[3] = 0.0
    G = open_left_end(alpha, w)
    assert (w.sqrt() * torch.complex(*G).abs()).max() <= 1 + 1e-12
    rows = [x.unsqueeze(-1).expand(-1, 50) for x in (*alpha, w)]
    swept = resolvent_pivots(Pair(*rows[:2]), rows[2], G)
    assert relative_error(swept, torch.complex(*G).unsqueeze(-1)) <= 1e-12
    inputs = [x[3:].clone().requires_grad_() for x in (*alpha, w)]
    assert torch.autograd.gradcheck(lambda a_re, a_im, w: open_left_end(Pair(a_re, a_im), w), inputs)
    uncoupled = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(open_left_end(Pair(alpha.re[:2], alpha.im[:2]), uncoupled).re.sum(), uncoupled)
    torch.testing.assert_close(grad, (1 / torch.complex(*alpha)[:2] ** 3).real)


def test_an_empty_batch_has_no_pivots() -> None:
    for method in METHODS:
        G = resolvent_pivots(Pair(torch.ones(0, 3, 40), -torch.ones(0, 3, 40)), torch.ones(0, 3, 40), method=method)
        assert G.re.shape == G.im.shape == (0, 3, 40)


def refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    alpha, _, w = random_operator(2, 5)
    arguments: dict[str, Any] = {"alpha": alpha, "w": w, "first": None}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        resolvent_pivots(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["alpha"].im.fill_(0.0), r"eta = -Im alpha \(-?0\.0\) must be > 0"),
        (lambda a: a["alpha"].im[1].select(0, 3).fill_(0.5), r"eta = -Im alpha \(-0\.5\) must be > 0"),
        (lambda a: a["w"][0].select(0, 2).fill_(-0.25), r"w \(-0\.25\) must be >= 0"),
        (lambda a: a["alpha"].re[0].select(0, 2).fill_(math.nan), r"Re alpha \(nan\) must be finite"),
        (lambda a: a["alpha"].im[0].select(0, 2).fill_(-math.inf), r"Im alpha \(-inf\) must be finite"),
        (lambda a: a["w"][0].select(0, 2).fill_(math.inf), r"w \(inf\) must be finite"),
        (lambda a: a.update(alpha=Pair(torch.ones(2, 0), torch.ones(2, 0))), r"alpha \(2, 0\) must be \[..., N\] with N >= 1"),
        (
            lambda a: a.update(alpha=Pair(*(x.half() for x in a["alpha"]))),
            r"dtype of alpha \(torch.float16\) must be torch.float32",
        ),
        (lambda a: a.update(w=a["w"].float()), r"dtype of w \(torch.float32\) must be that of alpha \(torch.float64\)"),
        (lambda a: a.update(w=a["w"][:, :4]), r"shape of w \(2, 4\) must be \(2, 5\), as alpha \(2, 5\) has it"),
        (lambda a: a.update(first=Pair(torch.ones(3), torch.ones(3))), r"shape of first \(3,\) must be \(2,\)"),
        (lambda a: a.update(method="fast"), r"method \('fast'\) must be one of chunk, loop, scan"),
    ],
)
def test_wrong_input_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    refused(change, message)


def test_the_operator_passes_torchs_own_checks() -> None:
    for num_tokens in (1, 40):
        alpha, _, w = random_operator(2, 3, num_tokens)
        arguments = (*alpha, w, torch.zeros(2, 3).double(), torch.zeros(2, 3).double())
        torch.library.opcheck(resolvent_sweep, tuple(x.requires_grad_() for x in arguments))


def test_the_sweep_is_compiled_and_exported_whole() -> None:
    class Sweep(torch.nn.Module):
        def forward(self, a_re: Tensor, a_im: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(resolvent_pivots(Pair(a_re, a_im), w))

    alpha, _, w = random_operator(2, 40, dtype=torch.float32)
    expected = resolvent_pivots(alpha, w)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Sweep(), (*alpha, w), dynamic_shapes=({1: length},) * 3)
    assert "trix.resolvent_sweep" in str(program.graph)
    longer, _, w_longer = random_operator(2, 90, dtype=torch.float32)
    for found in (
        program.module()(*longer, w_longer),
        torch.compile(Sweep(), fullgraph=True, backend="aot_eager")(*longer, w_longer),
    ):
        assert torch.equal(found[0], resolvent_pivots(longer, w_longer).re)
    assert torch.equal(program.module()(*alpha, w)[1], expected.im)


def test_hoppings_that_are_not_conjugates_are_refused() -> None:
    c = Pair(torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 4.0]))
    assert hermitian_couplings(c).tolist() == [5.0, 25.0]
    assert hermitian_couplings(c, Pair(c.re, -c.im)).tolist() == [5.0, 25.0]
    with pytest.raises(ValueError, match=r"b \(3\+4j\) must be the conjugate of c \(3\+4j\)"):
        hermitian_couplings(c, Pair(c.re, torch.tensor([2.0, 4.0])))
    with pytest.raises(ValueError, match=r"b \(0.25\+0j\) must be the conjugate of c \(4\+0j\)"):
        hermitian_couplings(Pair(torch.tensor([4.0]), torch.zeros(1)), Pair(torch.tensor([0.25]), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"Re b .* must"):
        hermitian_couplings(c, Pair(c.re.double(), c.im.double()))
