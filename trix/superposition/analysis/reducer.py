"""Maps of latents or documents in a few dimensions.

Legend: N rows, K columns, C components.
"""

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt


class _Reducer:
    """A transformer of scikit-learn's kind, with checked input and float64 output [N, C]."""

    def __init__(self, transformer: Any, n_components: int) -> None:
        self.n_components = n_components
        self._transformer = transformer

    def fit(self, X: npt.ArrayLike) -> Self:
        """Learn the map from rows [N, K].

        Raises:
            ValueError: rows that are not finite, or fewer rows or columns than components.
        """
        self._transformer.fit(self._checked(X))
        return self

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points [N, C] of rows [N, K]; fit comes first."""
        points: npt.NDArray[np.float64] = np.asarray(self._transformer.transform(np.asarray(X)), dtype=np.float64)
        return points

    def fit_transform(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points [N, C] of the rows that the map is learnt from. Raises: as :meth:`fit`."""
        points: npt.NDArray[np.float64] = np.asarray(self._transformer.fit_transform(self._checked(X)), dtype=np.float64)
        return points

    def _checked(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        rows_NK = np.asarray(X)
        if rows_NK.ndim != 2 or min(rows_NK.shape) < self.n_components:
            raise ValueError(f"n_components ({self.n_components}) must be <= rows and columns of X {rows_NK.shape}")
        if not np.isfinite(rows_NK).all():
            raise ValueError(f"X ({np.count_nonzero(~np.isfinite(rows_NK))} values that are not) must be finite")
        return rows_NK


class PCAReducer(_Reducer):
    """Principal components (scikit-learn); signs and order are the same at every fit."""

    def __init__(self, n_components: int = 2, random_state: int | None = 42) -> None:
        from sklearn.decomposition import PCA

        super().__init__(PCA(n_components=n_components, random_state=random_state), n_components)


class UMAPReducer(_Reducer):
    """UMAP (McInnes et al., 2018, arXiv:1802.03426) by umap-learn, which is optional.

    Raises:
        ImportError: umap-learn is not installed.
    """

    def __init__(
        self,
        n_components: int = 2,
        random_state: int | None = 42,
        n_neighbors: int = 25,
        min_dist: float = 0.1,
        metric: str = "cosine",
    ) -> None:
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError("UMAPReducer needs umap-learn: pip install umap-learn") from error
        transformer = UMAP(
            n_components=n_components, random_state=random_state, n_neighbors=n_neighbors, min_dist=min_dist, metric=metric
        )
        super().__init__(transformer, n_components)


_REDUCERS: dict[str, type[_Reducer]] = {"pca": PCAReducer, "umap": UMAPReducer}


def create_reducer(method: Literal["pca", "umap"] = "pca", **arguments: Any) -> PCAReducer | UMAPReducer:
    """A reducer by name, with the arguments of its class.

    Raises:
        ValueError: another name. TypeError: an argument that the class does not have.
    """
    if method not in _REDUCERS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(_REDUCERS)}")
    return _REDUCERS[method](**arguments)  # type: ignore[return-value]
