"""Signatures and latents that point the same way, against signatures with permuted signs."""

import pytest
import torch

from trix.superposition.backends import Site
from trix.superposition.tiles import signature_alignment

SITE = Site(1, "router_in")


def signatures(num_tiles: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (num_tiles, width), generator=draw).float()


def test_planted_rows_are_found_and_random_ones_are_not() -> None:
    signature_ED = signatures(20)
    row_KD = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    row_KD[40:50] = signature_ED[:10] + 0.5 * row_KD[40:50]
    found = signature_alignment(signature_ED, row_KD, SITE)
    assert found.latent_E[:10].tolist() == list(range(40, 50))
    assert found.q_E[:10].max() <= 0.05
    assert found.num_aligned <= 11
    assert (found.cosine_E[:10] > found.null_cosine_E[:10] + 0.2).all()


def test_under_the_null_the_p_values_are_uniform() -> None:
    row_KD = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    p_E = signature_alignment(signatures(200), row_KD, SITE, num_permutations=99).p_E
    assert p_E.min() >= 0.01
    for level in (0.1, 0.5):
        assert (p_E <= level).mean() == pytest.approx(level, abs=0.08)


def test_the_cosine_is_that_of_the_best_row_and_a_signature_of_zeros_has_none() -> None:
    signature_ED = signatures(5)
    signature_ED[3] = 0
    row_KD = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    row_KD[8] = 0
    found = signature_alignment(signature_ED, row_KD, SITE, num_permutations=9)
    cosine_EK = torch.nn.functional.cosine_similarity(signature_ED[:, None], row_KD[None], dim=-1)
    for tile in (0, 1, 2, 4):
        assert found.latent_E[tile] == int(cosine_EK[tile].argmax())
        assert found.cosine_E[tile] == pytest.approx(float(cosine_EK[tile].max()), abs=1e-6)
    assert (found.latent_E[3], found.p_E[3]) == (-1, 1)


def test_given_latents_are_compared_each_with_its_own_signature() -> None:
    signature_ED = signatures(4)
    row_KD = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    row_KD[5] = signature_ED[1] + row_KD[5]
    found = signature_alignment(signature_ED, row_KD, SITE, [0, 5, 2, -1])
    assert found.latent_E.tolist() == [0, 5, 2, -1]
    for tile, latent in enumerate([0, 5, 2]):
        expected = torch.nn.functional.cosine_similarity(signature_ED[tile], row_KD[latent], dim=0)
        assert found.cosine_E[tile] == pytest.approx(float(expected), abs=1e-6)
    assert found.p_E[1] <= 0.01
    assert (found.p_E[3], found.cosine_E[3], found.num_compared) == (1, 0, 3)
    assert found.cosine == pytest.approx(found.cosine_E[:3].mean())
    assert found.null_cosine == pytest.approx(found.null_cosine_E[:3].mean())
    assert abs(found.null_cosine_E).max() < 0.15 < found.cosine_E[1] - 0.3


def test_density_alone_is_no_alignment() -> None:
    """A signature with signs all alike has no other order, and is never better than its null."""
    row_KD = torch.rand(10, 64, generator=torch.Generator().manual_seed(3))
    found = signature_alignment(torch.ones(3, 64), row_KD, SITE, num_permutations=19)
    assert found.cosine_E.min() > 0.8
    assert found.p_E.tolist() == [1, 1, 1]


def test_another_site_and_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"site \(resid_mid\.1\) must be router_in\.1"):
        signature_alignment(signatures(2), torch.randn(3, 64), Site(1, "resid_mid"))
    with pytest.raises(ValueError, match=r"width of the signatures \(64\) must be that of the rows \(32\)"):
        signature_alignment(signatures(2), torch.randn(3, 32), SITE)
    with pytest.raises(ValueError, match=r"num_permutations \(0\) must be >= 1"):
        signature_alignment(signatures(2), torch.randn(3, 64), SITE, num_permutations=0)
    with pytest.raises(ValueError, match=r"latents \(1\) must be as many as signatures \(2\)"):
        signature_alignment(signatures(2), torch.randn(3, 64), SITE, [0])
