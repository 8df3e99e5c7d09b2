from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tridiagonal import dense, random_operator, tokens

from trix.functional.resolvent import Pair, resolvent_pivots
from trix.functional.resolvent_mix import MIX_METHODS, MixMethod, resolvent_mix
from trix.functional.resolvent_mix_matrix import decay_matrix, resolvent_mix_matrix
from trix.functional.resolvent_mix_vector import resolvent_mix_vector

B, H, P, WIDTH = 2, 3, 4, 5
EXACT = 1e-11
AGAINST_DENSE = 1e-12
STATES = ("vector", "shared", "own")  # the state, and whose q and k the heads read with


def random_input(
    num_tokens: int, state: str, dtype: torch.dtype = torch.float64, seed: int = 0, **operator: float
) -> dict[str, Any]:
    """The arguments of resolvent_mix, with hermitian couplings."""
    alpha, c, w = random_operator(B, H, num_tokens, seed=seed, **{"eta": 0.1, **operator})
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    G = resolvent_pivots(alpha, w)
    arguments: dict[str, Any] = {name: Pair(x.re.to(dtype), x.im.to(dtype)) for name, x in (("G", G), ("c", c))}
    arguments["u"] = normal(B, H, num_tokens, P)
    if state == "vector":
        return arguments | {"first": Pair(normal(B, H, P), normal(B, H, P))}
    heads = 1 if state == "shared" else H
    arguments |= {"q": normal(B, heads, num_tokens, WIDTH), "k": normal(B, heads, num_tokens, WIDTH)}
    return arguments | {"first": Pair(normal(B, H, WIDTH, P), normal(B, H, WIDTH, P))}


def part_of(arguments: dict[str, Any], part: slice, first: Pair | None) -> dict[str, Any]:
    found = {name: tokens(arguments[name], part) for name in ("G", "c")}
    return found | {name: arguments[name][:, :, part] for name in ("u", "q", "k") if name in arguments} | {"first": first}


def small(arguments: dict[str, Any]) -> dict[str, Any]:
    """One batch row, two heads, one channel, queries of two."""

    def cut(name: str, x: Tensor) -> Tensor:
        if name == "first":
            return x[:1, :2, ..., :1] if x.ndim == 3 else x[:1, :2, :2, :1]
        return x[:1, :2, :, : {"u": 1}.get(name, 2)] if x.ndim == 4 else x[:1, :2]

    return {
        name: Pair(*(cut(name, x) for x in value)) if isinstance(value, Pair) else cut(name, value)
        for name, value in arguments.items()
    }


def leaves(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    return {
        name: [x.detach().clone().requires_grad_() for x in (value if isinstance(value, Pair) else [value])]
        for name, value in arguments.items()
    }


def mix(inputs: dict[str, list[Tensor]], method: MixMethod) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {name: Pair(*value) if len(value) == 2 else value[0] for name, value in inputs.items()}
    y, last = resolvent_mix(**arguments, method=method)
    return (*y, *last)


def assert_close(found: Pair, expected: Pair, tolerance: float) -> None:
    difference = torch.complex(*found) - torch.complex(*expected)
    assert difference.abs().max() <= tolerance * torch.complex(*expected).abs().max()


@pytest.mark.parametrize("method", MIX_METHODS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 100, 700])
def test_outputs_are_rows_of_the_dense_inverse_times_the_inputs(num_tokens: int, state: str, method: MixMethod) -> None:
    alpha, c, w = random_operator(B, H, num_tokens, eta=1e-3, spikes=1e9)
    arguments = random_input(num_tokens, state) | {"G": resolvent_pivots(alpha, w), "c": c, "first": None}
    y, last = resolvent_mix(**arguments, method=method)
    for i in {0, num_tokens // 2, num_tokens - 1}:
        row = torch.linalg.inv(dense(*(tokens(x, slice(i + 1)) for x in (alpha, c))))[..., -1:, :]
        if state != "vector":
            row = row * (arguments["q"][:, :, i : i + 1] @ arguments["k"][:, :, : i + 1].mT)
        expected = (row @ arguments["u"][:, :, : i + 1].to(row.dtype)).squeeze(-2)
        difference = torch.complex(y.re[:, :, i], y.im[:, :, i]) - expected
        assert (difference.norm(dim=-1) <= AGAINST_DENSE * expected.norm(dim=-1)).all()  # in every head, also at a spike
    if state == "vector":
        assert torch.equal(last.re, y.re[:, :, -1])
        assert torch.equal(last.im, y.im[:, :, -1])


def test_the_last_output_of_4096_tokens_is_the_last_row_of_the_dense_inverse_times_the_inputs() -> None:
    alpha, c, w = random_operator(4096, spikes=1e9)
    last = torch.eye(4096, dtype=torch.complex128)[:, -1:]
    row = torch.linalg.solve(dense(alpha, c).mT, last).mT
    G, hops = (Pair(*(part[None, None] for part in pair)) for pair in (resolvent_pivots(alpha, w), c))
    generator = torch.Generator().manual_seed(0)
    u, q, k = (torch.randn(1, 1, 4096, width, generator=generator, dtype=torch.float64) for width in (P, WIDTH, WIDTH))
    for arguments, weights in (({}, row), ({"q": q, "k": k}, row * (q[0, 0, -1:] @ k[0, 0].mT))):
        expected = weights @ u[0, 0].to(row.dtype)
        for method in MIX_METHODS:
            y, _ = resolvent_mix(G, hops, u, **arguments, method=method)
            difference = torch.complex(*y)[0, 0, -1:] - expected
            assert difference.norm() <= AGAINST_DENSE * expected.norm()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("num_tokens", "method"), [(1, "chunk"), (3, "chunk"), (35, "chunk"), (1, "loop"), (3, "loop")])
def test_gradients(num_tokens: int, method: MixMethod, state: str) -> None:
    inputs = leaves(small(random_input(num_tokens, state)))
    names = [name for name, value in inputs.items() for _ in value]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return mix({name: [x for key, x in zip(names, values, strict=True) if key == name] for name in inputs}, method)

    assert torch.autograd.gradcheck(function, [x for value in inputs.values() for x in value])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", ["hermitian", "spikes", "resets", "one_way", "growing"])
def test_the_chunks_agree_with_the_loop(case: str, state: str) -> None:
    arguments = random_input(150, state, spikes=1e9 if case == "spikes" else 0.0)
    c = torch.complex(*arguments["c"])
    if case == "resets":
        c[:, :, 64] = c[:, 0, 31] = 0.0
        c[0, 1, 5:8] = 0.0
    elif case == "one_way":
        arguments["G"] = resolvent_pivots(Pair(c.real, -c.abs() - 0.1), None)
    elif case == "growing":  # some factors far above 1, and products that grow
        c = 1.2 * c
    arguments["c"] = Pair(c.real, c.imag)
    if case == "growing":
        assert ((c * torch.complex(*arguments["G"])).abs() > 5).any()
    inputs = leaves(arguments)
    outputs = [mix(inputs, method) for method in ("chunk", "loop")]
    weights = [torch.randn_like(x) / x.detach().abs().max() for x in outputs[1]]
    all_inputs = [x for value in inputs.values() for x in value]
    grads = [torch.autograd.grad(found, all_inputs, weights) for found in outputs]
    for pair in (outputs, grads):
        for found, expected in zip(*pair, strict=True):
            assert found.isfinite().all()
            assert (found - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("method", MIX_METHODS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, EXACT)])
def test_a_text_read_in_pieces_gives_what_it_gives_at_once(
    dtype: torch.dtype, tolerance: float, state: str, method: MixMethod
) -> None:
    arguments = random_input(140, state, dtype)
    whole, whole_last = resolvent_mix(**arguments, method=method)
    last, pieces = arguments["first"], []
    for part in (slice(0, 47), slice(47, 48), slice(48, 112), slice(112, 140)):
        y, last = resolvent_mix(**part_of(arguments, part, last), method=method)
        pieces.append(y)
    assert_close(Pair(*(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))), whole, tolerance)
    assert_close(last, whole_last, tolerance)


@pytest.mark.parametrize("state", STATES)
def test_a_reset_cuts_exactly_and_a_later_token_changes_nothing(state: str) -> None:
    arguments = random_input(90, state, torch.float32)
    for part in arguments["c"]:
        part[:, :, 40] = 0.0
    y, _ = resolvent_mix(**arguments)
    u = arguments["u"].clone()
    u[:, :, :40] += 1.0
    u[:, :, 80:] -= 1.0
    edited, _ = resolvent_mix(**arguments | {"u": u, "first": None})
    for before, after in zip(y, edited, strict=True):
        is_same = (before == after).all(-1).all(0).all(0)
        assert is_same[40:80].all()
        assert not is_same[:40].any()
        assert not is_same[80:].any()


def test_one_value_is_mixed() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    G, c, first = Pair(one[0], 2 * one[0]), Pair(3 * one[0], one[0]), Pair(one[0], -one[0])
    for method in MIX_METHODS:
        for more in ({}, {"q": 2 * one, "k": 3 * one}):
            y, last = resolvent_mix(
                G, c, one, Pair(*(x.view(1, 1, *[1] * (2 if more else 1)) for x in first)), **more, method=method
            )
            state = (1 + 2j) * ((3 if more else 1) - (3 + 1j) * (1 - 1j))
            assert complex(last.re, last.im) == pytest.approx(state)
            assert complex(y.re, y.im) == pytest.approx((2 if more else 1) * state)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.sampled_from([1e-2, 0.3, 4.0]), st.sampled_from([0.0, 1.0, 1e9]), st.integers(0, 99))
def test_hermitian_mixing_has_gain_1_between_scaled_tokens(num_tokens: int, eta: float, spikes: float, seed: int) -> None:
    alpha, c, w = random_operator(B, H, num_tokens, spikes=spikes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    eta_of_token = eta * (0.1 + torch.rand(B, H, num_tokens, generator=generator, dtype=torch.float64))
    u = torch.randn(B, H, num_tokens, P, generator=generator, dtype=torch.float64)
    y, _ = resolvent_mix(resolvent_pivots(Pair(alpha.re, -eta_of_token), w), c, u)
    out = eta_of_token.unsqueeze(-1).sqrt() * torch.complex(*y).abs()
    bound = (u.square() / eta_of_token.unsqueeze(-1)).cumsum(2).sqrt()
    assert (out <= bound * (1 + 1e-9)).all()


def test_the_decay_matrix_holds_the_products_between_two_tokens() -> None:
    r = torch.rand(3, 8, dtype=torch.float64) * 2
    r[0, 3] = r[1, 0] = r[1, 7] = 0.0
    M = decay_matrix(r)
    for i in range(8):
        for j in range(8):
            expected = r[:, j + 1 : i + 1].prod(-1) if i >= j else torch.zeros(3).double()
            torch.testing.assert_close(M[:, i, j], expected)


@pytest.mark.parametrize("state", STATES)
def test_the_memory_layout_of_inputs_and_gradients_does_not_matter(state: str) -> None:
    arguments = random_input(40, state)

    def outputs_and_gradients(turned: bool) -> list[Tensor]:
        inputs = leaves(arguments)
        values = [x for value in inputs.values() for x in value]
        if turned:
            inputs = {name: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in value] for name, value in inputs.items()}
        y_re, y_im, *last = mix(inputs, "chunk")
        loss = y_re.sum() - 2 * y_im.sum() + sum(x.sum() for x in last)
        return [y_re, y_im, *last, *torch.autograd.grad(loss, values)]

    for found, expected in zip(outputs_and_gradients(True), outputs_and_gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(u=a["u"][0]), r"u \(3, 5, 4\) must be \[B, H, N, P\] with N >= 1 tokens"),
        (lambda a: a.update(u=a["u"][:, :, :0]), r"u \(2, 3, 0, 4\) must be \[B, H, N, P\] with N >= 1 tokens"),
        (lambda a: a.update(u=a["u"].half()), r"dtype of u \(torch.float16\) must be torch.float32 or torch.float64"),
        (lambda a: a.update(G=Pair(*(x.float() for x in a["G"]))), r"dtype of Re G \(torch.float32\) must be that of u"),
        (lambda a: a.update(c=tokens(a["c"], slice(4))), r"shape of Re c \(2, 3, 4\) must be \(2, 3, 5\), as u \(2, 3, 5, 4\)"),
        (lambda a: a.update(q=None), r"q \(not given\) and k \(given\) must be given together"),
        (
            lambda a: a.update(q=a["q"][..., :3]),
            r"shape of q \(2, 1, 5, 3\) must be \(2, 1, 5, 5\), as k \(2, 1, 5, 5\) has it",
        ),
        (lambda a: a.update(k=a["k"].expand(-1, 2, -1, -1)), r"k \(2, 2, 5, 5\) must be \[B, 1, N, n\] or \[B, H, N, n\]"),
        (
            lambda a: a.update(first=Pair(a["u"][:, :, 0], a["u"][:, :, 0])),
            r"shape of first \(2, 3, 4\) must be \(2, 3, 5, 4\)",
        ),
        (lambda a: a.update(method="scan"), r"method \('scan'\) must be one of chunk, loop"),
    ],
)
def test_wrong_input_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments = random_input(5, "shared")
    change(arguments)
    with pytest.raises(ValueError, match=message):
        resolvent_mix(**arguments)


def test_autocast_does_not_lower_the_precision() -> None:
    for state in STATES:
        arguments = random_input(40, state, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = resolvent_mix(**arguments)
        assert torch.equal(y.re, resolvent_mix(**arguments)[0].re)


@pytest.mark.parametrize("state", ["vector", "shared"])
def test_the_operators_pass_torchs_own_checks(state: str) -> None:
    operator = resolvent_mix_vector if state == "vector" else resolvent_mix_matrix
    for num_tokens in (1, 40):
        inputs = leaves(random_input(num_tokens, state))
        names = ["G", "c", "u", "first"] if state == "vector" else ["G", "c", "u", "q", "k", "first"]
        torch.library.opcheck(operator, tuple(x for name in names for x in inputs[name]))


@pytest.mark.parametrize("state", ["vector", "shared"])
def test_mixing_is_compiled_and_exported_whole(state: str) -> None:
    class Mix(torch.nn.Module):
        def forward(self, inputs: dict[str, list[Tensor]]) -> tuple[Tensor, ...]:
            return mix(inputs, "chunk")

    arguments = random_input(40, state, torch.float32)
    inputs = {name: list(value) if isinstance(value, Pair) else [value] for name, value in arguments.items()}
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: [None if name == "first" else {2: length} for _ in value] for name, value in inputs.items()}
    program = torch.export.export(Mix(), (inputs,), dynamic_shapes=(shapes,))
    assert "trix.resolvent_mix" in str(program.graph)
    longer = random_input(70, state, torch.float32)
    inputs = {name: list(value) if isinstance(value, Pair) else [value] for name, value in longer.items()}
    expected = mix(inputs, "chunk")
    for run in (program.module(), torch.compile(Mix(), fullgraph=True, backend="aot_eager")):
        for found, value in zip(run(inputs), expected, strict=True):
            assert torch.equal(found, value)
