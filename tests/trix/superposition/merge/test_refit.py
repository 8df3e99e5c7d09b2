import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from planted_sae import ReLUSAE
from sklearn.linear_model import Ridge
from torch import Tensor

from trix.superposition.merge import (
    agglomerative_labels,
    cosine_dist_from_decoder,
    medoids_from_labels,
    merge_and_refit_decoder,
    merge_matrix_from_labels,
    merge_sae,
    ridge_refit,
    streaming_refit,
)

IntArray = npt.NDArray[np.int64]
LABELS = [0, 1, 1, 2, 0, 2, 2, 1]


def pairs(num_tokens: int = 500, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    """x [N, 6], z [N, 8], which is sparse and never negative."""
    generator = torch.Generator().manual_seed(0)
    z_NK = torch.relu(torch.randn(num_tokens, 8, generator=generator) - 0.5)
    x_ND = z_NK @ torch.randn(8, 6, generator=generator) + 0.1 * torch.randn(num_tokens, 6, generator=generator) + mean
    return x_ND, z_NK


def in_batches(x_ND: Tensor, z_NK: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x_ND, size), torch.split(z_NK, size), strict=True)


@pytest.mark.parametrize("l2", [1e-3, 50.0])
@pytest.mark.parametrize("batch", [1, 37, 500])
def test_the_fit_is_scikit_learns_ridge_whatever_the_batches(l2: float, batch: int) -> None:
    x_ND, z_NK = pairs()
    refit = ridge_refit(lambda: in_batches(x_ND, z_NK, batch), LABELS, l2)
    merged_NM = z_NK.double().numpy() @ merge_matrix_from_labels(LABELS, [0, 1, 3])
    reference = Ridge(alpha=l2).fit(merged_NM, x_ND.double().numpy())
    np.testing.assert_allclose(refit.W_dec_MD.T, reference.coef_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(refit.b_dec_D, reference.intercept_, rtol=1e-5)
    error = x_ND.double().numpy() - reference.predict(merged_NM)
    explained = 1 - (error**2).sum() / ((x_ND - x_ND.mean(dim=0)).double().numpy() ** 2).sum()
    assert refit.explained_variance == pytest.approx(explained, abs=1e-6)
    assert refit.num_tokens == 500


def test_large_means_leave_the_fit_as_it_is() -> None:
    """In sums of squares about 0, variances of 1 and means of 3e6 would cancel."""
    x_ND, z_NK = pairs(mean=0.0)
    near = ridge_refit(lambda: in_batches(x_ND.double(), z_NK, 100), LABELS)
    far = ridge_refit(lambda: in_batches(x_ND.double() + 3e6, z_NK.double() + 3e6, 100), LABELS)
    np.testing.assert_allclose(far.W_dec_MD, near.W_dec_MD, rtol=1e-4, atol=1e-5)
    assert far.explained_variance == pytest.approx(near.explained_variance, abs=1e-6)


def test_rows_keep_their_lengths() -> None:
    x_ND, z_NK = pairs()
    halved = ridge_refit(lambda: in_batches(x_ND, 2 * z_NK, 100), LABELS, l2=1e-9)
    refit = ridge_refit(lambda: in_batches(x_ND, z_NK, 100), LABELS, l2=1e-9)
    torch.testing.assert_close(halved.W_dec_MD, refit.W_dec_MD / 2)


def test_a_merged_latent_that_never_fires_has_no_direction() -> None:
    x_ND, z_NK = pairs()
    z_NK[:, [0, 4]] = 0
    refit = ridge_refit(lambda: in_batches(x_ND, z_NK, 100), LABELS)
    assert (refit.W_dec_MD[0] == 0).all()
    assert refit.W_dec_MD[1:].isfinite().all()


def test_functions_of_the_interface_give_the_decoder_by_columns() -> None:
    x_ND, _ = pairs()
    generator = torch.Generator().manual_seed(1)
    sae = ReLUSAE(torch.randn(6, 8, generator=generator), torch.randn(8, 6, generator=generator))
    with torch.no_grad():
        z_NK = sae.encode(x_ND)
    matrix = merge_matrix_from_labels(LABELS, [0, 1, 3])
    expected = ridge_refit(lambda: in_batches(x_ND, z_NK, 100), matrix, 0.1).W_dec_MD.T
    np.testing.assert_allclose(streaming_refit(lambda: in_batches(x_ND, z_NK, 100), matrix, 0.1), expected)
    found = merge_and_refit_decoder(lambda: torch.split(x_ND, 100), sae, matrix, l2=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (6, 3)


def directions(num_groups: int, copies: int, spread: float, width: int = 128) -> Tensor:
    """Rows of norm 1 [num_groups * copies, D]: `copies` of each group's direction, each moved by `spread`."""
    generator = torch.Generator().manual_seed(4)
    group_GD = torch.nn.functional.normalize(torch.randn(num_groups, width, generator=generator), dim=1)
    moved_KD = torch.nn.functional.normalize(torch.randn(num_groups * copies, width, generator=generator), dim=1)
    return torch.nn.functional.normalize(group_GD.repeat_interleave(copies, dim=0) + spread * moved_KD, dim=1)


def activations_of(W_KD: Tensor, num_tokens: int) -> Tensor:
    """Each row is active on 3 % of the tokens, independently of the others."""
    generator = torch.Generator().manual_seed(3)
    is_active = torch.rand(num_tokens, len(W_KD), generator=generator) < 0.03
    return (is_active * (1 + torch.rand(num_tokens, len(W_KD), generator=generator))) @ W_KD


def test_planted_duplicates_merge_without_a_change_of_the_reconstruction() -> None:
    """Three latents share what a feature says, in shares of 1/2, 1/3 and 1/6, and write it in the same direction."""
    W_FD = directions(24, copies=1, spread=0.0)
    share_K1 = torch.tensor([3.0, 2.0, 1.0]).div(6).repeat(24)[:, None]
    sae = ReLUSAE((share_K1 * torch.linalg.pinv(W_FD).T.repeat_interleave(3, dim=0)).T, W_FD.repeat_interleave(3, dim=0))
    x_ND = activations_of(W_FD, 3000)
    dist = cosine_dist_from_decoder(sae.W_dec.T)
    labels = agglomerative_labels(dist, 24)
    medoids = medoids_from_labels(dist, labels)
    merged = merge_sae(sae, merge_matrix_from_labels(labels, medoids), lambda: torch.split(x_ND, 512))
    with torch.no_grad():
        before_ND, _ = sae(x_ND)
        after_ND, z_NM = merged(x_ND)
        by_medoids_ND = z_NM @ sae.W_dec[medoids]
    assert labels.tolist() == [feature for feature in range(24) for _ in range(3)]
    torch.testing.assert_close(by_medoids_ND, before_ND, rtol=0, atol=1e-5)
    torch.testing.assert_close(after_ND, before_ND, rtol=0, atol=1e-4)


def test_clusters_beat_random_ones_of_equal_number_and_sizes() -> None:
    W_KD = directions(24, copies=4, spread=0.3)
    sae = ReLUSAE(torch.linalg.pinv(W_KD), W_KD)
    x_ND = activations_of(W_KD, 4000)
    train_ND, test_ND = x_ND[:3000], x_ND[3000:]

    def explained(labels: IntArray) -> float:
        merged = merge_sae(sae, labels, lambda: torch.split(train_ND, 512))
        with torch.no_grad():
            error_ND = test_ND - merged(test_ND)[0]
        return 1 - float(error_ND.square().sum() / (test_ND - test_ND.mean(dim=0)).square().sum())

    labels = agglomerative_labels(cosine_dist_from_decoder(sae.W_dec.T), 24)
    rng = np.random.default_rng(0)
    at_random = [explained(rng.permutation(labels)) for _ in range(5)]
    assert explained(labels) > 0.85
    assert max(at_random) < 0.4


def test_errors() -> None:
    x_ND, z_NK = pairs(5)
    for call, message in (
        (lambda: ridge_refit(lambda: [(x_ND, z_NK)], LABELS, 0), "l2 (0) must be > 0"),
        (lambda: ridge_refit(list, LABELS), "tokens to refit to (0) must be at least 1"),
        (lambda: ridge_refit(lambda: [(x_ND, z_NK[1:])], LABELS), "z (4, 8) must be [B (5), K (8)]"),
        (lambda: ridge_refit(lambda: [(x_ND, z_NK[:, 1:])], LABELS), "z (5, 7) must be [B (5), K (8)]"),
        (lambda: ridge_refit(lambda: [(x_ND / 0, z_NK)], LABELS), "activations and latents must be finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match=re.escape("XZ_iter (list) must be a callable without arguments")):
        ridge_refit([(x_ND, z_NK)], LABELS)  # type: ignore[arg-type]
