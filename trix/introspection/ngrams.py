"""Which tiles n-grams go to, in a model that routes on context: from its codes and routers alone, without running it.

Shape suffixes: N n-grams, J tokens of an n-gram in the order of reading, the token itself last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.introspection.symbols import BEGINNING
from trix.nn.context_code import ContextCode
from trix.nn.routed_layer import RoutedLayer, routed_layers
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import RoutingDecision, RowContext

NO_TOKEN = -1
NOT_AMONG = -1
MAX_ALL = 2**20  # n-grams
_ROWS = 2**14  # n-grams that a router is asked about at a time


class Ngrams(NamedTuple):
    """Distinct n-grams, and at how many tokens of a text each of them ends.

    id_NJ: int64, NO_TOKEN where there is none: before the beginning of a text, and for padding. count_N: int64.
    """

    id_NJ: Tensor
    count_N: Tensor


def ngrams_at(token_BT: Tensor, num_tokens: int, mask_BT: Tensor | None = None) -> Tensor:
    """The n-gram that ends at each token of B texts, one after the other: what a context code reads there, int64 [N, J].

    Args:
        token_BT: int64. num_tokens: J. mask_BT: bool, False for padding, at which no n-gram ends.
    """
    if mask_BT is None:
        mask_BT = torch.ones_like(token_BT, dtype=torch.bool)
    id_BS = F.pad(token_BT.masked_fill(~mask_BT, NO_TOKEN), (num_tokens - 1, 0), value=NO_TOKEN)
    return id_BS.unfold(1, num_tokens, 1)[mask_BT]


def count_ngrams(token_BT: Tensor, num_tokens: int, mask_BT: Tensor | None = None) -> Ngrams:
    """The n-grams of B texts, the shorter ones at their beginnings among them; arguments as :func:`ngrams_at`."""
    id_NJ = ngrams_at(token_BT, num_tokens, mask_BT)
    return joined([Ngrams(id_NJ, torch.ones(len(id_NJ), dtype=torch.int64))])


def joined(parts: Iterable[Ngrams]) -> Ngrams:
    """Each n-gram once, in the order of the ids, with the sum of its counts."""
    all_ids, all_counts = zip(*parts, strict=True)
    id_NJ, place_M = torch.unique(torch.cat(all_ids), dim=0, return_inverse=True)
    return Ngrams(id_NJ, torch.zeros(len(id_NJ), dtype=torch.int64).index_add_(0, place_M, torch.cat(all_counts)))


def places_among(id_MJ: Tensor, among_NJ: Tensor) -> Tensor:
    """Where each n-gram stands among distinct ones: int64 [M], NOT_AMONG where it is none of them."""
    _, group = torch.unique(torch.cat([among_NJ, id_MJ]), dim=0, return_inverse=True)
    place_G = torch.full_like(group, NOT_AMONG)
    place_G[group[: len(among_NJ)]] = torch.arange(len(among_NJ), device=group.device)
    return place_G[group[len(among_NJ) :]]


def is_among(id_MJ: Tensor, among_NJ: Tensor) -> Tensor:
    """Which n-grams are among distinct ones: bool [M]."""
    return places_among(id_MJ, among_NJ) != NOT_AMONG


def all_ngrams(vocab_size: int, num_tokens: int) -> Ngrams:
    """All V^J n-grams of J tokens, once each.

    Raises:
        ValueError: there are more than 2^20.
    """
    if vocab_size**num_tokens > MAX_ALL:
        raise ValueError(f"number of n-grams ({vocab_size}^{num_tokens}) must be <= {MAX_ALL}")
    id_NJ = torch.cartesian_prod(*[torch.arange(vocab_size)] * num_tokens).reshape(-1, num_tokens)
    return Ngrams(id_NJ, torch.ones(len(id_NJ), dtype=torch.int64))


@dataclass(frozen=True)
class CountedText:
    """The n-grams of a text. names: how each id is written. source: what the text is, in words, as "training text"."""

    ngrams: Ngrams
    names: Sequence[str]
    source: str

    def written(self, ids: Sequence[int]) -> str:
        """An n-gram, with a sign instead of each token that is not there."""
        return "".join(BEGINNING if token == NO_TOKEN else self.names[token] for token in ids)


@dataclass(frozen=True)
class NgramClaims:
    """What one layer makes of the n-grams of a text.

    decision: what the router decides about the N n-grams; tile_idx [N, K]. num_tiles: E.
    """

    ngrams: Ngrams
    decision: RoutingDecision
    num_tiles: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return int(self.ngrams.count_N.sum())

    def shares(self) -> Tensor:
        """Share of the text that each n-gram takes, float64 [N]; 0 without a text."""
        return self.ngrams.count_N.double() / max(self.num_tokens, 1)

    def rates(self) -> Tensor:
        """The share of all assignments that each tile will get of such a text, its claim rate: float64 [E], sums to 1."""
        is_used_NK = (self.decision.weight != 0).double()
        count_NK = is_used_NK * self.ngrams.count_N.unsqueeze(-1)
        sum_E = torch.zeros(self.num_tiles, dtype=torch.float64)
        sum_E.index_add_(0, self.decision.tile_idx.flatten(), count_NK.flatten())
        return sum_E / sum_E.sum().clamp_min(1)

    def is_claimed(self, tile_idx: int) -> Tensor:
        """Which n-grams go to a tile: bool [N]."""
        return ((self.decision.tile_idx == tile_idx) & (self.decision.weight != 0)).any(dim=-1)

    def of_tile(self, tile_idx: int, limit: int | None = None) -> list[tuple[list[int], float]]:
        """The n-grams that go to a tile and the share of the text that each takes, the largest first."""
        place_M = self.is_claimed(tile_idx).nonzero().flatten()
        order = self.ngrams.count_N[place_M].argsort(descending=True, stable=True)[:limit]
        ids, shares = self.ngrams.id_NJ[place_M[order]].tolist(), self.shares()[place_M[order]].tolist()
        return list(zip(ids, shares, strict=True))


class NgramReader:
    """Asks the routers of a model that routes on context where n-grams go; changes nothing in it.

    ``layer`` is the index of a routed layer, in the order of the model. What a router decides about an n-gram it decides
    wherever the n-gram ends in a text: the code is the same there. Ids may be on any device; answers are on the CPU.

    Args:
        model: holds a :class:`~trix.nn.ContextCode`, which all of its routed layers read.

    Raises:
        ValueError: it holds none; by the methods, a layer that does not exist, or a router that reads more than codes and ids.
    """

    def __init__(self, model: nn.Module) -> None:
        code = next((module for module in model.modules() if isinstance(module, ContextCode)), None)
        if code is None:
            raise ValueError("the model must route on context (route_on: context) of ids: else no n-grams decide about a tile")
        self.code, self.layers = code, routed_layers(model)

    @property
    def num_tokens(self) -> int:
        """J."""
        return self.code.num_tokens

    @torch.no_grad()
    def codes(self, id_NJ: Tensor) -> Tensor:
        """The code after each n-gram: float [N, D]."""
        return self._codes(id_NJ).cpu()

    def decide(self, id_NJ: Tensor, layer: int = 0) -> RoutingDecision:
        """What the layer's own router decides about each n-gram."""
        return self.decide_in(self._layer(layer), id_NJ)

    @torch.no_grad()
    def decide_in(self, layer: RoutedLayer, id_NJ: Tensor) -> RoutingDecision:
        """As :meth:`decide`, in a layer that need not be the model's, as a copy with another signature."""
        if "phase" in layer.router.reads:
            raise ValueError(f"a {type(layer.router).__name__} must read codes alone: it reads the phase of each token, too")
        parts = [_decide(layer, self._codes(part_NJ), part_NJ[:, -1]) for part_NJ in torch.split(id_NJ, _ROWS)]
        return RoutingDecision(*(torch.cat(of_part).cpu() for of_part in zip(*parts, strict=True)))

    def claims(self, ngrams: Ngrams, layer: int = 0) -> NgramClaims:
        """Which tile claims which n-grams, and how much of the text each tile will get."""
        return NgramClaims(ngrams, self.decide(ngrams.id_NJ, layer), self._layer(layer).num_tiles)

    @torch.no_grad()
    def contributions(self, id_NJ: Tensor, winner_N: Tensor, rival_N: Tensor, layer: int = 0) -> Tensor:
        """How much each token of an n-gram spoke for one tile over another: float [N, J].

        decay^j <roll(R[v], 7 j), direction_winner - direction_rival> / rms of the sum that the code is made of, for token v, j
        places before the last. With the difference of the biases they sum to that of the scores; a token that is not there
        has 0.

        Raises:
            ValueError: a layer in which no directions decide, as under a hash.
        """
        routed = self._layer(layer)
        directions = routed.router.explain(routed.emergent_signatures())
        if directions is None:
            kind = type(routed.router).__name__
            raise ValueError(f"layer ({layer}) is routed by a {kind}, which has no directions to explain a choice by")
        id_NJ, winner_N, rival_N = (ids.to(self.code.table_VD.device) for ids in (id_NJ, winner_N, rival_N))
        basis_DD = torch.eye(directions.direction_ED.shape[1], device=id_NJ.device)
        row_DJV = self.code.affinities(basis_DD).flip(1)  # the oldest first, as in an n-gram
        row_NJD = row_DJV.permute(1, 2, 0)[torch.arange(self.num_tokens), id_NJ.clamp_min(0)]
        row_NJD = row_NJD * (id_NJ != NO_TOKEN).unsqueeze(-1)
        sum_ND = row_NJD.sum(dim=1)
        rms_N = (sum_ND.square().mean(dim=-1) + torch.finfo(sum_ND.dtype).eps).sqrt()
        difference_ND = (directions.direction_ED[winner_N] - directions.direction_ED[rival_N]).to(row_NJD.dtype)
        return (torch.einsum("njd,nd->nj", row_NJD, difference_ND) / rms_N.unsqueeze(-1)).cpu()

    def _codes(self, id_NJ: Tensor) -> Tensor:
        """As :meth:`codes`, on the device of the model."""
        id_NJ = id_NJ.to(self.code.table_VD.device)
        return self.code(id_NJ.clamp_min(0), id_NJ != NO_TOKEN)[0][:, -1]

    def _layer(self, layer: int) -> RoutedLayer:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer ({layer}) must be >= 0 and < number of routed layers ({len(self.layers)})")
        return self.layers[layer]


def routes_on_context(model: nn.Module) -> bool:
    """Whether an :class:`NgramReader` can read the model."""
    return any(isinstance(module, ContextCode) for module in model.modules())


def _decide(layer: RoutedLayer, code_ND: Tensor, id_N: Tensor) -> RoutingDecision:
    emergent_ED = layer.emergent_signatures()
    if isinstance(layer, SparseLookupFFN):  # of the gate, nothing is asked here
        tile_idx_NK, score_NE = layer.router.select(code_ND, emergent_ED)
        return RoutingDecision(tile_idx_NK, torch.ones_like(tile_idx_NK, dtype=score_NE.dtype), score_NE)
    decision: RoutingDecision = layer.router(code_ND, RowContext(token_T=id_N.to(code_ND.device)), emergent_ED)
    return decision
