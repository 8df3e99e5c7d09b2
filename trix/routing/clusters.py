"""Balanced clusters of signatures: groups of equal size, whatever the number of tiles and the size of a cluster."""

import torch
from torch import Tensor


def cluster_members(value_ED: Tensor, num_clusters: int, num_steps: int = 10) -> Tensor:
    """The tiles of each cluster of :func:`balanced_kmeans`: int64 [C, ceil(E / C)], ascending, -1 in places that stay empty."""
    return members_of(balanced_kmeans(value_ED, num_clusters, num_steps), num_clusters)


def members_of(cluster_idx_E: Tensor, num_clusters: int) -> Tensor:
    """The tiles of each cluster, ascending, then -1: int64 [C, ceil(E / C)], from the cluster of each tile."""
    num_tiles = cluster_idx_E.shape[0]
    order_E = torch.sort(cluster_idx_E, stable=True).indices
    sorted_idx_E = cluster_idx_E[order_E]
    members_CM = cluster_idx_E.new_full((num_clusters, -(-num_tiles // num_clusters)), -1)
    members_CM[sorted_idx_E, _place_in_group(sorted_idx_E)] = order_E
    return members_CM


def balanced_kmeans(value_ED: Tensor, num_clusters: int, num_steps: int = 10) -> Tensor:
    """The cluster of each row: int64 [E]; every cluster gets floor(E / C) or ceil(E / C) rows. Deterministic.

    Lloyd's steps, in which each row goes to the nearest mean that has room: rows ask for it, the nearest are taken, the rest
    ask again. The first means are rows that lie far apart (Gonzalez, 1985). Not for a hot path: it loops over clusters.

    Raises:
        ValueError: num_clusters outside [1, E].
    """
    num_rows = value_ED.shape[0]
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(f"num_clusters ({num_clusters}) must be >= 1 and <= the number of rows ({num_rows})")
    value_ED = value_ED.detach().to(torch.promote_types(value_ED.dtype, torch.float32))
    mean_CD = value_ED[_far_apart(value_ED, num_clusters)]
    cluster_idx_E = torch.full((num_rows,), -1, device=value_ED.device)
    for _ in range(num_steps):
        # |value - mean|^2 up to what is the same for all means, halved and negated.
        nearness_EC = value_ED @ mean_CD.T - 0.5 * mean_CD.square().sum(dim=1)
        previous_E, cluster_idx_E = cluster_idx_E, _assign(nearness_EC)
        if torch.equal(previous_E, cluster_idx_E):
            break
        sum_CD = torch.zeros_like(mean_CD).index_add_(0, cluster_idx_E, value_ED)
        mean_CD = sum_CD / torch.bincount(cluster_idx_E, minlength=num_clusters).unsqueeze(-1)
    return cluster_idx_E


def _far_apart(value_ED: Tensor, num_rows: int) -> Tensor:
    """Indices of rows, each the farthest from those before it."""
    chosen = torch.zeros(num_rows, dtype=torch.int64, device=value_ED.device)
    distance_E = (value_ED - value_ED[0]).square().sum(dim=1)
    for position in range(1, num_rows):
        chosen[position] = distance_E.argmax()
        distance_E = torch.minimum(distance_E, (value_ED - value_ED[chosen[position]]).square().sum(dim=1))
        distance_E[chosen[: position + 1]] = -1.0  # a row is chosen once, even among equals
    return chosen


def _assign(nearness_EC: Tensor) -> Tensor:
    """floor(E / C) rows to every cluster first, then at most one more to each."""
    num_rows, num_clusters = nearness_EC.shape
    cluster_idx_E = torch.full((num_rows,), -1, device=nearness_EC.device)
    for room in (num_rows // num_clusters, 1):
        _fill(cluster_idx_E, nearness_EC, torch.full((num_clusters,), room, device=nearness_EC.device))
    return cluster_idx_E


def _fill(cluster_idx_E: Tensor, nearness_EC: Tensor, room_C: Tensor) -> None:
    """Give rows without a cluster the nearest one with room, until rows or room are used up; in place."""
    # A round ends with a full cluster or with everyone served: at most C + 1 of them.
    while bool((room_C > 0).any()):
        row_R = (cluster_idx_E < 0).nonzero().squeeze(1)
        if row_R.numel() == 0:
            return
        nearness_R, wish_R = nearness_EC[row_R].masked_fill(room_C <= 0, -torch.inf).max(dim=1)
        nearest_first_R = torch.sort(nearness_R, descending=True, stable=True).indices
        order_R = nearest_first_R[torch.sort(wish_R[nearest_first_R], stable=True).indices]
        sorted_wish_R = wish_R[order_R]
        is_taken_R = _place_in_group(sorted_wish_R) < room_C[sorted_wish_R]
        taken_wish = sorted_wish_R[is_taken_R]
        cluster_idx_E[row_R[order_R[is_taken_R]]] = taken_wish
        room_C -= torch.bincount(taken_wish, minlength=room_C.shape[0])


def _place_in_group(sorted_idx: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal values of a sorted tensor."""
    return torch.arange(sorted_idx.shape[0], device=sorted_idx.device) - torch.searchsorted(sorted_idx, sorted_idx)
