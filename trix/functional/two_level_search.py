"""The best tiles of each token by a search over clusters of signatures: exact, or over a number of clusters asked for.

Shape suffixes: T tokens, D width, E tiles, C clusters, M members of a cluster, N best tiles, P pairs of token and cluster.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trix.functional.signatures import inverse_sqrt_active
from trix.functional.tile_matmul import group_tokens, grouped_linear

MAX_OPEN_SHARE = 0.25  # of all pairs: with more to visit, one dense product is the quicker way to the same answer
ROUNDING_SLACK = 1e-5  # of |x|: far above the rounding of a float32 product, far below what bounds differ by


@torch.library.custom_op("trix::two_level_search", mutates_args=())
def two_level_search(
    x: Tensor, signatures: Tensor, bias: Tensor, members: Tensor, num_best: int, num_probes: int
) -> tuple[Tensor, Tensor]:
    """The num_best tiles by signature score + bias, best first, ties to the lowest index. No gradient.

    A cluster c of unit vectors u_e = s_e / sqrt(nnz(s_e)) with mean m and radius r = max |u_e - m| bounds the score of all its
    tiles: <x, u_e> <= <x, m> + r |x|. Clusters are visited in the order of that bound. With ``num_probes`` = 0 a token goes on
    until no bound reaches its num_best-th score: exact, whatever the clusters are. Where the bounds leave more than a quarter
    of all pairs open after the first cluster, all scores are computed instead. With ``num_probes`` > 0 a token visits that
    many clusters and may miss its best tile.

    Source: branch and bound over a ball tree for the maximum inner product, Ram and Gray, 2012 (arXiv:1202.6101), here with one
    level of balls and whole batches per visit.

    Args:
        x: float [T, D]. signatures: [E, D] in {-1, 0, +1}, same dtype. bias: float [E].
        members: int64 [C, M], the tiles of each cluster, ascending, then -1; each tile in one cluster.
        num_best: 1 to E, or to the smallest num_probes clusters' tiles. num_probes: 0 to C.

    Exact means up to the rounding of a product: sums of the same terms can differ in the last bit from one matrix shape to the
    other, so that of two tiles with equal signatures either may win. Where sums are exact, so are the ties.

    Returns:
        tile_idx int64 [T, num_best], and the number of scores computed, int64 scalar.
    """
    clusters = _Clusters.of(signatures, bias.to(x.dtype), members)
    x_norm_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    bound_TC = x @ clusters.mean_CD.T + x_norm_T1 * (clusters.radius_C + ROUNDING_SLACK) + clusters.best_bias
    first_TW = bound_TC.topk(max(num_probes, 1), dim=-1).indices
    best = _Best(x.new_full((x.shape[0], num_best), -torch.inf), members.new_zeros(x.shape[0], num_best))
    best, num_scored = _visit(clusters, x, first_TW, torch.ones_like(first_TW, dtype=torch.bool), best)
    if num_probes > 0:
        return best.tile_idx_TN, num_scored
    bound_TC = bound_TC.scatter(1, first_TW, -torch.inf)
    is_open_TC = best.is_reached_by(bound_TC)
    if int(is_open_TC.sum()) > MAX_OPEN_SHARE * is_open_TC.numel():
        return _search_all(x, signatures, bias, num_best), num_scored + x.shape[0] * signatures.shape[0]
    token_R = is_open_TC.any(dim=1).nonzero().squeeze(1)
    better, num_more = _visit_in_order(clusters, x[token_R], bound_TC[token_R], best.of(token_R))
    return best.tile_idx_TN.index_copy(0, token_R, better.tile_idx_TN), num_scored + num_more


@two_level_search.register_fake
def _(
    x: Tensor,
    signatures: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    members: Tensor,
    num_best: int,
    num_probes: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return members.new_empty(x.shape[0], num_best), members.new_empty(())


class _Clusters(NamedTuple):
    """Signatures by cluster; the places of clusters that are not full have a signature of zeros and a bias of -inf."""

    tile_idx_CM: Tensor
    signature_CMD: Tensor
    scale_CM: Tensor
    bias_CM: Tensor
    mean_CD: Tensor
    radius_C: Tensor
    size_C: Tensor

    @classmethod
    def of(cls, signature_ED: Tensor, bias_E: Tensor, member_CM: Tensor) -> "_Clusters":
        is_member_CM = member_CM >= 0
        tile_idx_CM = member_CM.clamp_min(0)
        size_C = is_member_CM.sum(dim=1)
        signature_CMD = signature_ED[tile_idx_CM] * is_member_CM.unsqueeze(-1)
        scale_CM = inverse_sqrt_active(signature_ED)[tile_idx_CM]
        unit_CMD = signature_CMD * scale_CM.unsqueeze(-1)
        mean_CD = unit_CMD.sum(dim=1) / size_C.clamp_min(1).unsqueeze(-1)
        distance_CM = torch.linalg.vector_norm(unit_CMD - mean_CD.unsqueeze(1), dim=-1)
        radius_C = (distance_CM * is_member_CM).amax(dim=1)
        bias_CM = bias_E[tile_idx_CM].masked_fill(~is_member_CM, -torch.inf)
        return cls(tile_idx_CM, signature_CMD, scale_CM, bias_CM, mean_CD, radius_C, size_C)

    @property
    def best_bias(self) -> Tensor:
        return self.bias_CM.amax(dim=1)


class _Best(NamedTuple):
    """The best tiles of each token so far, best first."""

    score_TN: Tensor
    tile_idx_TN: Tensor

    def is_reached_by(self, bound_TW: Tensor) -> Tensor:
        """Which bounds [T, W] reach the last of a token's best; -inf, a cluster already visited, never does."""
        return (bound_TW >= self.score_TN[:, -1:]) & (bound_TW > -torch.inf)

    def of(self, token_R: Tensor) -> "_Best":
        return _Best(self.score_TN[token_R], self.tile_idx_TN[token_R])


def _visit_in_order(clusters: _Clusters, x_RD: Tensor, bound_RC: Tensor, best: _Best) -> tuple[_Best, Tensor]:
    """Visit clusters by falling bound, 1, 2, 4, ... at a time, until no bound reaches a token's best."""
    bound_RC, cluster_RC = bound_RC.sort(dim=1, descending=True)
    num_scored = cluster_RC.new_zeros(())
    start, stop = 0, 1
    while start < bound_RC.shape[1]:
        is_open_RW = best.is_reached_by(bound_RC[:, start:stop])
        if not bool(is_open_RW.any()):
            break
        best, num_visited = _visit(clusters, x_RD, cluster_RC[:, start:stop], is_open_RW, best)
        num_scored = num_scored + num_visited
        start, stop = stop, 2 * stop + 1
    return best, num_scored


def _visit(clusters: _Clusters, x_TD: Tensor, cluster_TW: Tensor, is_open_TW: Tensor, best: _Best) -> tuple[_Best, Tensor]:
    """Score the tiles of the open ones among W clusters of each token; the better best, and how many scores that took."""
    token_P, column_P = is_open_TW.nonzero(as_tuple=True)
    cluster_P = cluster_TW[token_P, column_P]
    groups = group_tokens(cluster_P, clusters.size_C.shape[0])
    product_PM = grouped_linear(x_TD[token_P[groups.order]], clusters.signature_CMD, groups.ends)[groups.inverse]
    score_PM = product_PM * clusters.scale_CM[cluster_P] + clusters.bias_CM[cluster_P]
    num_best = best.score_TN.shape[1]
    num_kept = min(num_best, score_PM.shape[1])
    score_PN, place_PN = _largest(score_PM, num_kept)
    score_TWN = best.score_TN.new_full((*cluster_TW.shape, num_kept), -torch.inf)
    tile_TWN = cluster_TW.new_zeros(score_TWN.shape)
    score_TWN[token_P, column_P] = score_PN
    tile_TWN[token_P, column_P] = clusters.tile_idx_CM[cluster_P].gather(1, place_PN)
    # In the order of tile indices, so that the lowest wins a tie between clusters, too.
    tile_TX, order_TX = torch.sort(torch.cat([best.tile_idx_TN, tile_TWN.flatten(1)], dim=1), dim=1)
    score_TX = torch.cat([best.score_TN, score_TWN.flatten(1)], dim=1).gather(1, order_TX)
    score_TN, place_TN = _largest(score_TX, num_best)
    return _Best(score_TN, tile_TX.gather(1, place_TN)), clusters.size_C[cluster_P].sum()


def _search_all(x_TD: Tensor, signature_ED: Tensor, bias_E: Tensor, num_best: int) -> Tensor:
    score_TE = (x_TD @ signature_ED.T).mul_(inverse_sqrt_active(signature_ED)).add_(bias_E)
    return _largest(score_TE, num_best)[1]


def _largest(score: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Values and places of the num_best largest along the last axis, ties to the lowest place; overwrites ``score``.

    For the two or three that are asked for, a pass each beats a sort.
    """
    values, places = [], []
    for _ in range(num_best):
        place = score.argmax(dim=-1, keepdim=True)
        values.append(score.gather(-1, place))
        places.append(place)
        score.scatter_(-1, place, -torch.inf)
    return torch.cat(values, dim=-1), torch.cat(places, dim=-1)
