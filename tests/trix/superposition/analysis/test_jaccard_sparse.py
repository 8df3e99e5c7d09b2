import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from trix.superposition.analysis import combine_similarity, jaccard_from_sets

index_sets = st.lists(st.sets(st.integers(0, 12), max_size=8), max_size=8)


@settings(deadline=None)
@given(index_sets)
def test_jaccard_is_that_of_the_sets(sets: list[set[int]]) -> None:
    found = jaccard_from_sets(sets, len(sets))
    assert sparse.isspmatrix_csr(found)
    expected = [[len(a & b) / len(a | b) if a | b else 0.0 for b in sets] for a in sets]
    np.testing.assert_allclose(found.toarray(), np.array(expected).reshape(found.shape))
    assert found.nnz == np.count_nonzero(expected), "pairs that share nothing must not be stored"


def test_a_member_named_twice_counts_once() -> None:
    np.testing.assert_array_equal(jaccard_from_sets([[1, 1, 2], [2, 3]], 2).toarray(), [[1, 1 / 3], [1 / 3, 1]])


def test_the_number_of_sets_is_checked() -> None:
    with pytest.raises(ValueError, match=r"top_idx \(2 sets\) must hold K \(3\)"):
        jaccard_from_sets([{1}, {2}], 3)


def test_similarities_are_weighted() -> None:
    cosine, correlation = np.array([[1.0, -0.5], [-0.5, 1.0]]), sparse.csr_matrix(np.eye(2))
    jaccard = jaccard_from_sets([{1, 2}, {2}], 2)
    found = combine_similarity(cosine, correlation, jaccard)
    assert sparse.isspmatrix_csr(found)
    np.testing.assert_allclose(found.toarray(), 0.5 * cosine + 0.4 * np.eye(2) + 0.1 * jaccard.toarray())
    weighted = combine_similarity(cosine, correlation, jaccard, alpha=0.0, beta=0.0, gamma=2.0)
    np.testing.assert_allclose(weighted.toarray(), 2 * jaccard.toarray())


def test_similarities_must_be_finite_and_of_one_shape() -> None:
    with pytest.raises(ValueError, match=r"corr \(1 values that are not\) must be finite"):
        combine_similarity(np.eye(2), np.diag([1, np.nan]), np.eye(2))
    with pytest.raises(ValueError, match=r"J \(3, 3\) must have the shape of cosW \(2, 2\)"):
        combine_similarity(np.eye(2), np.eye(2), np.eye(3))
