"""What arrays mean between the parts, and what a reducer is.

N tokens or documents, D width, K latents, M merged latents.
"""

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

ActivationShard: TypeAlias = NDArray[np.floating]  # [N, D]: activations of N tokens
Latents: TypeAlias = NDArray[np.floating]  # [N, K]: activations of the latents, >= 0
MergeMatrix: TypeAlias = NDArray[np.floating]  # [K, M]: 1 where latent k belongs to merged latent m


class Reducer2D(Protocol):
    """Maps rows to points of a plane; the methods are those of scikit-learn's transformers."""

    def fit(self, X: NDArray[np.floating]) -> "Reducer2D":
        """Learn the map from rows [N, K]."""
        ...

    def transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        """Points [N, 2] of rows [N, K]."""
        ...

    def fit_transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        """Both at once."""
        ...
