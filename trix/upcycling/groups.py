"""Which neurons of a layer make a tile together.

Legend: T tokens, F neurons, E tiles, H = F / E neurons of a tile.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROUNDS = 20


def coactive_groups(hidden_TF: Tensor, num_tiles: int, seed: int = 0) -> Tensor:
    """Groups of equal size, of neurons that are active on the same tokens: int64 [E, H], the neurons of each group ascending.

    Balanced k-means of the neurons. A neuron is described by relu(up x), the root of its activation, on each token, scaled to
    length 1. scikit-learn's k-means gives the first centres. Then the neurons are assigned to E * H places, H of each centre,
    at the least sum of squared distances (scipy's assignment), and the centres move to the means of their neurons, until
    nothing changes. Balanced k-means on the neurons of a dense layer is the idea of MoEfication (Zhang et al., 2022,
    arXiv:2110.01786), which clusters their weights.

    Raises:
        ValueError: num_tiles does not divide F.
    """
    size = _group_size(hidden_TF.shape[1], num_tiles)
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    neuron_FT = F.normalize(hidden_TF.T.float().sqrt(), dim=1).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # neurons that never fire are all alike
        centre_ET = KMeans(num_tiles, n_init=4, random_state=seed).fit(neuron_FT).cluster_centers_
    group_F = np.full(len(neuron_FT), -1)
    for _ in range(MAX_ROUNDS):
        distance_FE = np.square(centre_ET).sum(axis=1) - 2 * neuron_FT @ centre_ET.T
        _, place_F = linear_sum_assignment(distance_FE.repeat(size, axis=1))
        if np.array_equal(place_F // size, group_F):
            break
        group_F = place_F // size
        centre_ET = np.stack([neuron_FT[group_F == group].mean(axis=0) for group in range(num_tiles)])
    return torch.from_numpy(np.argsort(group_F, kind="stable").reshape(num_tiles, size))


def random_groups(num_neurons: int, num_tiles: int, seed: int = 0) -> Tensor:
    """The control: groups of equal size, drawn: int64 [E, H].

    Raises:
        ValueError: num_tiles does not divide the number of neurons.
    """
    size = _group_size(num_neurons, num_tiles)
    order_F = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return order_F.reshape(num_tiles, size).sort(dim=1).values


def _group_size(num_neurons: int, num_tiles: int) -> int:
    if num_tiles < 1 or num_neurons % num_tiles:
        raise ValueError(f"num_tiles ({num_tiles}) must be >= 1 and divide the neurons of the layer ({num_neurons})")
    return num_neurons // num_tiles
