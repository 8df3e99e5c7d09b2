"""Features that two trainings share: all of a permuted decoder, none of a random one, matched one to one."""

from itertools import permutations

import pytest
import torch

from trix.superposition.evaluation import stability as module
from trix.superposition.evaluation.stability import random_stability, stability


def test_a_permuted_decoder_is_the_same_and_a_random_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 64, generator=generator)
    same = stability(rows, 3 * rows[torch.randperm(200, generator=generator)])
    assert same == pytest.approx((1.0, 1.0, 1.0, 200), abs=1e-5)
    other = random_stability(rows, rows)
    assert other.shared == 0
    assert 0.1 < other.mean_cosine <= other.mean_max_cosine < 0.5
    assert stability(rows, -rows).shared == 0  # a feature has a sign


def test_each_row_has_a_counterpart_of_its_own() -> None:
    """The best of all permutations, not each row's nearest."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    best = max(permutations(range(5)), key=lambda places: float(cosine[range(5), places].sum()))
    found = stability(first, second)
    assert found.mean_cosine == pytest.approx(float(cosine[range(5), best].mean()), abs=1e-6)
    assert found.shared == pytest.approx(float((cosine[range(5), best] > 0.7).double().mean()))
    assert found.mean_max_cosine == pytest.approx(float(cosine.amax(dim=1).mean()), abs=1e-6)
    assert found.mean_max_cosine > found.mean_cosine


def test_of_many_rows_some_are_matched_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MATCHED", 10)
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert stability(rows, rows.flip(0)) == pytest.approx((1.0, 1.0, 1.0, 10), abs=1e-5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoders \(\[4, 3\] and \[5, 3\]\) must be \[K, O\]"):
        stability(torch.ones(4, 3), torch.ones(5, 3))
