"""A signature for n-grams of one's choice, and what it will claim, before it is inserted.

Shape suffixes as in :mod:`trix.introspection.ngrams`; C changes of a signature in one dimension.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from trix.introspection.ngrams import NgramClaims, NgramReader, Ngrams, joined, places_among
from trix.routing.router import SignatureRouter

WANTED_MARGIN, OTHER_MARGIN = 0.25, 0.1  # of scores, in standard deviations of a code's values
WEIGHTS = (0.3, 1.0, 3.0, 10.0)  # of the wanted n-grams against all others
NO_RIVAL = -100.0  # the score of other tiles where there are not enough of them
START_SHARES = (0.5, 1.0)  # of the dimensions that are active at first
MAX_NGRAMS, MAX_CHANGES = 4096, 400


@dataclass(frozen=True)
class Forecast:
    """What a layer makes of n-grams before and after one of its tiles gets another signature.

    wanted_M: places of the wanted n-grams among those of the claims.
    """

    tile_idx: int
    wanted_M: Tensor
    before: NgramClaims
    after: NgramClaims

    def claims_wanted(self) -> Tensor:
        """Which of the wanted n-grams the tile will claim: bool [M]."""
        return self.after.is_claimed(self.tile_idx)[self.wanted_M]

    def others(self) -> list[tuple[list[int], float]]:
        """What else it will claim: n-grams and the share of the text that each takes, the largest first."""
        wanted = {tuple(ids) for ids in self.after.ngrams.id_NJ[self.wanted_M].tolist()}
        return [(ids, share) for ids, share in self.after.of_tile(self.tile_idx) if tuple(ids) not in wanted]

    def given_up(self) -> float:
        """The share of the text that the tile had and will not have."""
        lost_N = self.before.is_claimed(self.tile_idx) & ~self.after.is_claimed(self.tile_idx)
        return float(self.before.shares()[lost_N].sum())

    def taken_from(self) -> list[tuple[int, float]]:
        """The tiles that n-grams now claimed come from, and the share of the text taken from each; the largest first."""
        moved_N = self.after.is_claimed(self.tile_idx) & ~self.before.is_claimed(self.tile_idx)
        first_N, share_N = self.before.decision.tile_idx[:, 0], self.before.shares()
        share_E = torch.zeros(self.before.num_tiles, dtype=torch.float64).index_add_(0, first_N[moved_N], share_N[moved_N])
        met_E = torch.zeros(self.before.num_tiles, dtype=torch.bool)
        met_E[first_N[moved_N]] = True
        order = share_E.argsort(descending=True, stable=True)
        return [(tile, float(share_E[tile])) for tile in order.tolist() if met_E[tile]]


def forecast(reader: NgramReader, layer: int, tile_idx: int, signature_D: Tensor, wanted_MJ: Tensor, text: Ngrams) -> Forecast:
    """What would be claimed if the tile had this signature, frozen: asked of a copy of the layer.

    Args:
        text: n-grams with their counts; wanted ones that do not occur in it are added with a count of 0.

    Raises:
        ValueError: as :meth:`~trix.routing.surgery.SignatureSurgery.insert_signature`.
    """
    ngrams, wanted_M = _with_wanted(text, wanted_MJ)
    edited = copy.deepcopy(reader.layers[layer])
    edited.insert_signature(tile_idx, signature_D)
    after = NgramClaims(ngrams, reader.decide_in(edited, ngrams.id_NJ), edited.num_tiles)
    return Forecast(tile_idx, wanted_M, reader.claims(ngrams, layer), after)


@torch.no_grad()
def design_signature(reader: NgramReader, layer: int, tile_idx: int, wanted_MJ: Tensor, text: Ngrams) -> Tensor:
    """A ternary signature with which the tile claims the wanted n-grams and few others of the text: int8 [D].

    It begins as the signs of (mean code of the wanted n-grams - mean code of the text), and changes one dimension at a time as
    long as this falls, margin_n being the score of n-gram n less that of the k-th best other tile, each with its bias (k =
    top_k; with adaptive k 1, as only the best tile is sure to be used):

        weight * mean_wanted relu(0.25 - margin_n) + sum_others share_n relu(0.1 + margin_n)

    Of several weights and beginnings the one that claims most of the wanted n-grams is taken, and of those the one that claims
    least of the rest of the text.

    Raises:
        ValueError: a tile that does not exist, or a layer without signatures.
    """
    routed = reader.layers[layer]
    router = routed.router
    if not isinstance(router, SignatureRouter):
        raise ValueError(f"a router of type {type(router).__name__} has no signatures to design")
    router.check_tile(tile_idx)
    # The most frequent; of equally frequent ones any.
    any_N = torch.randperm(len(text.count_N), generator=torch.Generator().manual_seed(0))
    most_N = any_N[text.count_N[any_N].argsort(descending=True, stable=True)[:MAX_NGRAMS]]
    ngrams, wanted_M = _with_wanted(Ngrams(text.id_NJ[most_N], text.count_N[most_N]), wanted_MJ)
    is_wanted_N = torch.zeros(len(ngrams.count_N), dtype=torch.bool)
    is_wanted_N[wanted_M] = True
    code_ND = reader.codes(ngrams.id_NJ).float()
    directions = router.explain(routed.emergent_signatures())
    score_NE = code_ND @ directions.direction_ED.float().cpu().T + directions.bias_E.float().cpu()
    score_NE[:, tile_idx] = -torch.inf
    # What an inserted signature starts with is the mean bias of the tiles in use.
    bias = float(router.balance_bias[~router.is_free_E].mean())
    k = 1 if router.is_adaptive else router.top_k
    rival_N = score_NE.topk(k, dim=-1).values[:, -1].clamp_min(NO_RIVAL) - bias
    share_N = ngrams.count_N.double().masked_fill(is_wanted_N, 0.0)
    share_N = (share_N / share_N.sum().clamp_min(1)).float()
    search = _Search(code_ND, rival_N, share_N, is_wanted_N)
    contrast_D = code_ND[is_wanted_N].mean(dim=0) - (share_N.unsqueeze(-1) * code_ND).sum(dim=0)
    found = [search.run(_strongest(contrast_D, share), weight) for share in START_SHARES for weight in WEIGHTS]
    return max(found, key=search.worth).to(torch.int8)


def _with_wanted(text: Ngrams, wanted_MJ: Tensor) -> tuple[Ngrams, Tensor]:
    """The n-grams of the text and the wanted ones, and the places of these."""
    ngrams = joined([text, Ngrams(wanted_MJ, torch.zeros(len(wanted_MJ), dtype=torch.int64))])
    return ngrams, places_among(wanted_MJ, ngrams.id_NJ)


def _strongest(value_D: Tensor, share: float) -> Tensor:
    """The signs of the largest values, 0 elsewhere."""
    kept_D = value_D.abs().argsort(descending=True, stable=True)[: max(round(share * len(value_D)), 1)]
    return torch.zeros_like(value_D).index_copy_(0, kept_D, value_D[kept_D].sign())


@dataclass(frozen=True)
class _Search:
    """rival_N: what a score must exceed. share_N: the shares of the text, 0 for wanted n-grams."""

    code_ND: Tensor
    rival_N: Tensor
    share_N: Tensor
    is_wanted_N: Tensor

    def run(self, signature_D: Tensor, weight: float) -> Tensor:
        """The best change in one dimension, again and again, until none is for the better."""
        signature_D = signature_D.clone()
        width = len(signature_D)
        best = float(self._loss(self._margin((self.code_ND @ signature_D)[:, None], signature_D.abs().sum()), weight))
        for _ in range(MAX_CHANGES):
            # Each dimension can take either of the two values that it does not have.
            value_C = torch.cat([(signature_D + 2) % 3 - 1, signature_D % 3 - 1])
            dim_C = torch.arange(width).repeat(2)
            step_C = value_C - signature_D[dim_C]
            dot_NC = (self.code_ND @ signature_D).unsqueeze(-1) + self.code_ND[:, dim_C] * step_C
            active_C = signature_D.abs().sum() + value_C.abs() - signature_D[dim_C].abs()
            loss_C = self._loss(self._margin(dot_NC, active_C), weight)
            change = int(loss_C.argmin())
            if float(loss_C[change]) >= best - 1e-6:
                break
            best = float(loss_C[change])
            signature_D[dim_C[change]] = value_C[change]
        return signature_D

    def worth(self, signature_D: Tensor) -> tuple[int, float, float]:
        """How many of the wanted n-grams it claims, how little of the rest, by how much."""
        margin_N = self._margin(self.code_ND @ signature_D, signature_D.abs().sum(), self.rival_N)
        is_claimed_N = margin_N > 0
        num_wanted = int((is_claimed_N & self.is_wanted_N).sum())
        return num_wanted, -float(self.share_N[is_claimed_N].sum()), float(margin_N[self.is_wanted_N].min())

    def _margin(self, dot: Tensor, active: Tensor, rival: Tensor | None = None) -> Tensor:
        return dot * active.clamp_min(1).rsqrt() - (self.rival_N.unsqueeze(-1) if rival is None else rival)

    def _loss(self, margin_NC: Tensor, weight: float) -> Tensor:
        missed_C = (WANTED_MARGIN - margin_NC[self.is_wanted_N]).clamp_min(0).mean(dim=0)
        return weight * missed_C + self.share_N @ (OTHER_MARGIN + margin_NC).clamp_min(0)
