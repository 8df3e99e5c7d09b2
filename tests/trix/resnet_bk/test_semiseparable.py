from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trix.resnet_bk import SemiseparableMatrix


def exact(n_seq: int, rank: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    T = torch.randn(n_seq, n_seq, dtype=torch.float64).tril(1).triu(-1)
    return T + torch.randn(n_seq, rank, dtype=torch.float64) @ torch.randn(rank, n_seq, dtype=torch.float64)


def factorized(H: Tensor, rank: int | None = None) -> SemiseparableMatrix:
    matrix = SemiseparableMatrix(len(H), rank)
    matrix.factorize(H)
    return matrix


@pytest.mark.parametrize("rank", [5, 7, None])
def test_an_exact_matrix_is_found_also_where_more_rank_is_asked_for(rank: int | None) -> None:
    H = exact(128, 5)
    matrix = SemiseparableMatrix(128, rank)
    T, U, V = matrix.factorize(H)
    assert U.shape == V.shape == (128, rank or 7)
    assert torch.equal(T, T.tril(1).triu(-1))
    assert (H - T - U @ V.mT).norm() / H.norm() < 1e-12
    assert matrix.relative_error < 1e-12
    assert 5 < matrix.num_sweeps < 60


def test_a_plain_svd_of_what_is_off_the_band_does_not_find_it() -> None:
    H = exact(128, 5)
    left, value, right = torch.linalg.svd(H - H.tril(1).triu(-1))
    rest = H - (left[:, :5] * value[:5]) @ right[:5]
    assert (rest - rest.tril(1).triu(-1)).norm() / H.norm() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(("n_seq", "rank", "error"), [(128, 7, 0.89), (512, None, 0.96)])
def test_random_matrices_do_not_compress(n_seq: int, rank: int | None, error: float) -> None:
    torch.manual_seed(0)
    matrix = factorized(torch.randn(n_seq, n_seq), rank)
    assert matrix.relative_error == pytest.approx(error, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(0, 3), st.integers(0, 99))
def test_the_error_that_it_tells_is_that_of_its_product(n_seq: int, rank: int, seed: int) -> None:
    H = exact(n_seq, rank, seed)
    matrix = SemiseparableMatrix(n_seq)
    T, U, V = matrix.factorize(H)
    found = matrix.matvec(torch.eye(n_seq, dtype=torch.float64)).mT
    torch.testing.assert_close(found, T + U @ V.mT)
    assert float((H - found).norm() / H.norm()) == pytest.approx(matrix.relative_error, abs=1e-14)


def test_a_single_entry_next_to_the_band_is_found_too() -> None:
    H = torch.zeros(4, 4, dtype=torch.float64)
    H[2, 0] = 1.0  # in no corner
    assert factorized(H).relative_error < 1e-12


def test_a_tridiagonal_matrix_needs_no_low_rank_part() -> None:
    H = exact(16, 0)
    T, U, V = SemiseparableMatrix(16, 3).factorize(H)
    assert torch.equal(T, H)
    assert U.count_nonzero() == V.count_nonzero() == 0


def test_the_product_is_batched_linear_and_differentiable() -> None:
    H = exact(32, 2)
    matrix, x = factorized(H, 2), torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(matrix.matvec(x), x @ H.mT)
    assert torch.autograd.gradcheck(matrix.matvec, (x[:1, :1],))


def test_nothing_of_size_n_squared_is_kept() -> None:
    matrix = factorized(exact(200, 2), 2)
    kept = sum(value.untyped_storage().nbytes() for value in matrix._factors)
    assert kept <= 8 * 200 * (3 + 2 * 2)


@pytest.mark.parametrize("z", [1j, 0.3 + 0.1j, -2.0 + 1e-3j])
def test_the_diagonal_of_the_inverse(z: complex) -> None:
    for H, rank in ((exact(64, 3), 3), (exact(1, 0), 1), (exact(2, 0), 1)):
        found = factorized(H, rank).inverse_diagonal(z)
        expected = torch.linalg.inv(H - z * torch.eye(len(H), dtype=torch.float64)).diagonal()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What the graph of a result keeps for the backward pass."""
    storages: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with saved_tensors_hooks(note, lambda value: value):
        run()
    return sum(storages.values())


def test_segments_are_recomputed_with_the_same_gradient_and_less_kept() -> None:
    torch.manual_seed(0)
    matrix, x = factorized(exact(64, 2).float(), 2), torch.randn(2, 64, 16, requires_grad=True)
    network, calls = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), []

    def function(part: Tensor) -> Tensor:
        calls.append(part.shape[1])
        return network(part)

    def plain() -> Tensor:
        return network(matrix.matvec(x.mT).mT)

    y = matrix.checkpoint_recompute(x, 8, function=function)
    torch.testing.assert_close(y, plain())
    assert calls == [8] * 8
    grad = torch.autograd.grad(y.square().sum(), (x, *network.parameters()))
    assert calls == [8] * 16
    for found, expected in zip(grad, torch.autograd.grad(plain().square().sum(), (x, *network.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    weights = sum(value.numel() * 4 for value in network.parameters())
    assert kept_bytes(lambda: matrix.checkpoint_recompute(x, function=network)) < (kept_bytes(plain) - weights) / 3


def test_without_a_function_it_is_the_product() -> None:
    matrix, x = factorized(exact(16, 1), 1), torch.randn(2, 16, 3, dtype=torch.float64)
    torch.testing.assert_close(matrix.checkpoint_recompute(x), torch.einsum("ij,bjd->bid", exact(16, 1), x))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n_seq \(0\) must be >= 1"):
        SemiseparableMatrix(0)
    with pytest.raises(ValueError, match=r"rank \(9\) must be >= 1 and <= n_seq \(8\)"):
        SemiseparableMatrix(8, 9)
    matrix = SemiseparableMatrix(8)
    with pytest.raises(ValueError, match="factorize must be called before matvec"):
        matrix.matvec(torch.zeros(8))
    with pytest.raises(ValueError, match=r"H \(8, 7\) torch.float32 must be float \(8, 8\)"):
        matrix.factorize(torch.zeros(8, 7))
    with pytest.raises(ValueError, match=r"H \(nan\) must be finite"):
        matrix.factorize(torch.full((8, 8), torch.nan))
    matrix.factorize(torch.eye(8))
    with pytest.raises(ValueError, match=r"sequence of x \(3, 7\) must be n_seq \(8\)"):
        matrix.matvec(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"Im z \(0.0\) must be > 0"):
        matrix.inverse_diagonal(1.0 + 0j)
    with pytest.raises(ValueError, match=r"k \(0\) must be >= 1"):
        matrix.checkpoint_recompute(torch.zeros(1, 8, 2), 0)
    with pytest.raises(ValueError, match=r"x \(8, 2\) must be \[batch, sequence, width\]"):
        matrix.checkpoint_recompute(torch.zeros(8, 2))
