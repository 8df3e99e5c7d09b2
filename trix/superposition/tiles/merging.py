"""Merging tiles that answer to the same tokens with the same output.

Legend: T tokens, D width, E tiles, U tiles in use, H hidden width of a tile, M tiles that are left.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trix.evolution import merge_tiles
from trix.functional.ternary import absmean_codes
from trix.nn import TriXFFN
from trix.nn.tiles import TernaryTiles
from trix.outputs import RoutingDecision
from trix.superposition.merge import agglomerative_labels, medoids_from_labels

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIN_GAIN = 1e-6  # relative: less is rounding


class TileMerge(NamedTuple):
    """What was merged.

    cluster_E: int64, the cluster of each tile, -1 for a slot that was free before. kept_M: int64, the tile that stands for each
    cluster; the others are free slots now. refitted: the tiles that got new output weights.
    """

    cluster_E: IntArray
    kept_M: IntArray
    refitted: tuple[int, ...]


@torch.no_grad()
def tile_distances(ffn: TriXFFN, x_TD: Tensor) -> tuple[FloatArray, IntArray]:
    """(distance [U, U], in_use [U]): (1 - cos of two signatures) + (1 - cos of their tiles' outputs), in [0, 4].

    All tiles compute the same tokens x_TD for it, whatever they are routed to; outputs of all tokens are one long vector. A
    signature or output of zeros has cosine 0 with all others.

    Raises:
        ValueError: routing without signatures, or no tokens [T, D].
    """
    if x_TD.ndim != 2 or len(x_TD) == 0:
        raise ValueError(f"tokens {tuple(x_TD.shape)} must be [T, D] with T >= 1")
    in_use = (~ffn.free_slots()).nonzero().flatten()
    output_US = torch.stack([_output(ffn, x_TD, int(tile)).flatten() for tile in in_use])
    distance_UU = sum(
        1 - unit @ unit.T for unit in (F.normalize(ffn.get_tile_signatures()[in_use].double()), F.normalize(output_US.double()))
    )
    assert isinstance(distance_UU, Tensor)
    distance_UU = distance_UU.clamp_(0, 4).fill_diagonal_(0)
    return distance_UU.cpu().numpy(), in_use.cpu().numpy()


@torch.no_grad()
def merge_redundant_tiles(ffn: TriXFFN, x_TD: Tensor, num_tiles: int, l2: float = 1e-3) -> TileMerge:
    """Merge tiles in place until num_tiles are in use: clusters by :func:`tile_distances`, the medoid of each.

    See :func:`merge_into` for what becomes of the others.

    Args:
        x_TD: what the layer reads, float; routing reads the same. num_tiles: tiles that are left. l2: ridge penalty of the
            refit.

    Raises:
        ValueError: num_tiles < 1 or more than are in use, and as :func:`merge_into`.
    """
    distance_UU, in_use = tile_distances(ffn, x_TD)
    if not 1 <= num_tiles <= len(in_use):
        raise ValueError(f"num_tiles ({num_tiles}) must be >= 1 and <= tiles in use ({len(in_use)})")
    label_U = agglomerative_labels(distance_UU, num_tiles)
    cluster_E = np.full(ffn.num_tiles, -1)
    cluster_E[in_use] = label_U
    return merge_into(ffn, x_TD, cluster_E, in_use[medoids_from_labels(distance_UU, label_U)], l2)


@torch.no_grad()
def merge_into(ffn: TriXFFN, x_TD: Tensor, cluster_E: IntArray, kept_M: IntArray, l2: float = 1e-3) -> TileMerge:
    """Merge the tiles of each cluster into one of them (:func:`trix.evolution.merge_tiles`), and refit output weights.

    The refit of tile_e(x) = down_e relu(up_e x)^2: up_e stays. down_e is fitted by ridge regression, on the tokens that go to
    the tile now, to what the layer gave for them before. As it is ternary, there are two candidates: the codes of the ridge
    solution, and the present codes, both with row scales fitted by the same regression. The better one is taken if its squared
    error on these tokens is smaller than that of the present weights. Tiles of another kind than
    :class:`~trix.nn.tiles.TernaryTiles` keep their weights.

    The layer stays an ordinary one: the slots of the others are free, and its state_dict loads as any.

    Args:
        cluster_E: cluster of each tile, 0 to M - 1, -1 for free slots. kept_M: the tile that is kept of each cluster.

    Raises:
        ValueError: a kept tile outside of its cluster, a free slot in a cluster, l2 <= 0, more than one tile per token, routing
            without signatures, packed weights, or a frozen signature among those that are to be dropped: nothing has changed
            then.
    """
    if not l2 > 0:
        raise ValueError(f"l2 ({l2}) must be > 0")
    for cluster, kept in enumerate(kept_M):
        if not 0 <= kept < len(cluster_E) or cluster_E[kept] != cluster:
            raise ValueError(f"tile {kept}, kept of cluster {cluster}, must be a tile of it")
    pairs = [
        (int(kept), int(tile))
        for cluster, kept in enumerate(kept_M)
        for tile in np.flatnonzero(cluster_E == cluster)
        if tile != kept
    ]
    free = [tile for tile in np.flatnonzero(cluster_E >= 0).tolist() if ffn.free_slots()[tile]]
    if free:
        raise ValueError(f"cluster of tile {free[0]} ({cluster_E[free[0]]}) must be -1: its slot is free")
    frozen = [tile for _, tile in pairs if ffn.is_frozen(tile)]
    if frozen:
        raise ValueError(f"the signature of tile {frozen[0]} must not be frozen to be dropped: unfreeze it first")
    before_TD = _gated(ffn, x_TD)[0]
    for kept, tile in pairs:
        merge_tiles(ffn, kept, tile, tag="redundant")
    refitted: list[int] = []
    if pairs and isinstance(ffn.tiles, TernaryTiles):
        _, decision = _gated(ffn, x_TD)
        for kept in map(int, kept_M):
            is_own_T = decision.tile_idx[:, 0] == kept
            if bool(is_own_T.any()) and _refit(
                ffn.tiles, kept, x_TD[is_own_T], before_TD[is_own_T], decision.weight[is_own_T], l2
            ):
                refitted.append(kept)
    return TileMerge(cluster_E, kept_M, tuple(refitted))


def _gated(ffn: TriXFFN, x_TD: Tensor) -> tuple[Tensor, RoutingDecision]:
    """The layer's output, and its decision."""
    decision: RoutingDecision = ffn.router(x_TD, emergent_ED=ffn.emergent_signatures())
    return ffn.tiles(x_TD, decision.tile_idx, decision.weight), decision


def _refit(tiles: TernaryTiles, tile: int, x_TD: Tensor, target_TD: Tensor, gate_T1: Tensor, l2: float) -> bool:
    """Give the tile the output weights of the refit, if they are better."""
    assert tiles.down.weight is not None
    hidden_TH = gate_T1.double() * F.relu(x_TD.double() @ tiles.up.ternary()[tile].double().T).square()
    wanted_TD = target_TD.double()
    old_code_DH, old_scale_D = (value[tile].double() for value in tiles.down.codes_and_scale())
    gram_HH, cross_HD = hidden_TH.T @ hidden_TH, hidden_TH.T @ wanted_TD
    ridge_HH = gram_HH + l2 * torch.eye(len(gram_HH), dtype=gram_HH.dtype, device=gram_HH.device)
    ridge_code_DH = absmean_codes(torch.linalg.solve(ridge_HH, cross_HD).T)[0]
    old_error = (hidden_TH @ (old_code_DH * old_scale_D.unsqueeze(-1)).T - wanted_TD).square().sum()
    found = [_with_scales(code_DH, gram_HH, cross_HD, l2) for code_DH in (old_code_DH, ridge_code_DH)]
    error, new_DH = min(
        (((hidden_TH @ weight_DH.T - wanted_TD).square().sum(), weight_DH) for weight_DH in found),
        key=lambda pair: float(pair[0]),
    )
    if float(error) >= (1 - MIN_GAIN) * float(old_error):
        return False
    # Weights whose mean absolute value is the scale of the row, so that they are quantised to these codes.
    density_D1 = (new_DH != 0).double().mean(dim=-1, keepdim=True).clamp_min(1 / new_DH.shape[-1])
    tiles.down.weight[tile] = (new_DH / density_D1).to(tiles.down.weight.dtype)
    return True


def _with_scales(code_DH: Tensor, gram_HH: Tensor, cross_HD: Tensor, l2: float) -> Tensor:
    """Codes times the best scale of each row, by the same regression in one dimension; one below 0 flips the codes."""
    size_D = ((code_DH @ gram_HH) * code_DH).sum(dim=-1) + l2
    return code_DH * ((code_DH * cross_HD.T).sum(dim=-1) / size_D).unsqueeze(-1)


def _output(ffn: TriXFFN, x_TD: Tensor, tile: int) -> Tensor:
    tile_T1 = torch.full((len(x_TD), 1), tile, device=x_TD.device)
    y_TD: Tensor = ffn.tiles(x_TD, tile_T1, torch.ones(len(x_TD), 1, dtype=x_TD.dtype, device=x_TD.device))
    return y_TD
