import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trix.superposition.analysis import PCAReducer, UMAPReducer, create_reducer


def test_pca_gives_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    rows_NK = rng.normal(size=(60, 5)) * [9, 5, 2, 1, 0.5] + 100
    points_NC = PCAReducer().fit_transform(rows_NK)
    centred_NK = rows_NK - rows_NK.mean(axis=0)
    _, _, basis_KK = np.linalg.svd(centred_NK, full_matrices=False)
    np.testing.assert_allclose(np.abs(points_NC), np.abs(centred_NK @ basis_KK[:2].T), atol=1e-9)
    np.testing.assert_array_equal(points_NC, PCAReducer().fit(rows_NK).transform(rows_NK))


def test_reducers_are_made_by_name() -> None:
    reducer = create_reducer(n_components=3)
    assert isinstance(reducer, PCAReducer)
    assert reducer.fit_transform(np.random.default_rng(0).normal(size=(9, 4))).shape == (9, 3)
    with pytest.raises(ValueError, match=r"method \('tsne'\) must be one of pca, umap"):
        create_reducer("tsne")  # type: ignore[arg-type]


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match=r"n_components \(2\) must be <= rows and columns of X \(5, 1\)"):
        PCAReducer().fit(np.zeros((5, 1)))
    with pytest.raises(ValueError, match=r"X \(1 values that are not\) must be finite"):
        PCAReducer().fit_transform([[0.0, 1.0], [np.inf, 2.0]])


def test_without_umap_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="UMAPReducer needs umap-learn: pip install umap-learn"):
        create_reducer("umap")


def test_umap_gets_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeUMAP:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def fit_transform(self, rows_NK: Any) -> Any:
            return np.full((len(rows_NK), self.settings["n_components"]), self.settings["n_neighbors"], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP))
    reducer = create_reducer("umap", n_neighbors=7)
    assert isinstance(reducer, UMAPReducer)
    points_NC = reducer.fit_transform(np.zeros((6, 4)))
    assert points_NC.dtype == np.float64
    np.testing.assert_array_equal(points_NC, np.full((6, 2), 7.0))
    made = reducer._transformer.settings
    assert made == {"n_components": 2, "random_state": 42, "n_neighbors": 7, "min_dist": 0.1, "metric": "cosine"}
