"""Routing among many tiles: clusters of signatures first, then the tiles of those that matter."""

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from trix.functional.autocast import without_autocast
from trix.functional.gates import Gate
from trix.functional.signatures import inverse_sqrt_active
from trix.functional.two_level_search import two_level_search
from trix.outputs import RoutingDecision
from trix.routing.clusters import cluster_members, members_of
from trix.routing.facts import Fact
from trix.routing.router import SignatureRouter


class HierarchicalRouter(SignatureRouter):
    """SignatureRouter with a two-level search: the same choice, without scoring every tile where the clusters allow it.

    The choice is exact by default, however stale the clusters: bounds are taken from the signatures in force
    (:func:`~trix.functional.two_level_search.two_level_search`). With ``num_probes`` it is approximate: each token scores the
    tiles of that many clusters only, and :meth:`recall` says how often that finds the best tile.

    Two things differ from the flat router, because most scores are never computed: the weight is
    sigmoid(score of the chosen tile), and the scores of a decision are those of the best top_k + 1 tiles, -inf elsewhere.

    Packed, it routes by ``trix::signature_route``, which scores every tile and gives the exact choice.

    Args:
        tiles_per_cluster: E tiles make ceil(E / tiles_per_cluster) clusters, whose sizes differ by one at most. Default:
            ceil(sqrt(E)).
        num_probes: clusters to visit; None for the exact search.

    Raises:
        ValueError: tiles_per_cluster outside [1, num_tiles]; num_probes outside [1, number of clusters], or so few that they
            may hold fewer than top_k tiles; by load_state_dict, clusters that do not hold each tile once; and as
            SignatureRouter.
    """

    members_CM = Fact[Tensor]()

    def __init__(
        self,
        d_model: int,
        num_tiles: int,
        top_k: int = 1,
        balance_rate: float = 0.01,
        source: Literal["explicit", "emergent"] = "explicit",
        tiles_per_cluster: int | None = None,
        num_probes: int | None = None,
    ) -> None:
        super().__init__(d_model, num_tiles, top_k, balance_rate, source)
        if tiles_per_cluster is None:
            tiles_per_cluster = math.isqrt(num_tiles - 1) + 1
        if not 1 <= tiles_per_cluster <= num_tiles:
            raise ValueError(f"tiles_per_cluster ({tiles_per_cluster}) must be >= 1 and <= num_tiles ({num_tiles})")
        self.num_clusters = -(-num_tiles // tiles_per_cluster)
        smallest = num_tiles // self.num_clusters
        if num_probes is not None:
            if not 1 <= num_probes <= self.num_clusters:
                raise ValueError(f"num_probes ({num_probes}) must be >= 1 and <= the number of clusters ({self.num_clusters})")
            if num_probes * smallest < top_k:
                raise ValueError(f"num_probes ({num_probes}) clusters of {smallest} tiles must hold top_k ({top_k}) tiles")
        self.num_probes = num_probes
        self.num_in_reach = num_tiles if num_probes is None else num_probes * smallest
        self.hold("members_CM", self._first_members())

    def _first_members(self) -> Tensor:
        return members_of(torch.arange(self.num_tiles) % self.num_clusters, self.num_clusters)

    @property
    def num_best(self) -> int:
        # One more than is chosen, so that the confidence can be told.
        return min(self.top_k + 1, self.num_in_reach)

    def _k_limit(self, is_free_E: Tensor) -> int:
        return min(super()._k_limit(is_free_E), self.num_in_reach)  # among those that the probes reach

    @torch.no_grad()
    def recluster(self, emergent_ED: Tensor | None = None) -> None:
        """Cluster the signatures in force anew. Old clusters stay correct, they only cost more (exact) or recall (probes)."""
        if self.members_CM.is_meta:
            return  # there are no values
        signature_ED = self.signatures(emergent_ED)
        unit_ED = signature_ED * inverse_sqrt_active(signature_ED).unsqueeze(-1)
        self.members_CM.copy_(cluster_members(unit_ED, self.num_clusters))
        self.note_change()

    def select(self, x_TD: Tensor, emergent_ED: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The choice without the gate: tile_idx int64 [T, K], and score [T, E], -inf for tiles beyond the best top_k + 1."""
        if self.packed_signatures is not None:
            return super().select(x_TD, emergent_ED)
        signature_ED = self.signatures(emergent_ED)
        best_TN, _ = self._search(x_TD, signature_ED)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        signature_ED = signature_ED.to(x_TD.dtype)
        with without_autocast(x_TD):
            scale_TN = inverse_sqrt_active(signature_ED)[best_TN]
            score_TN = torch.einsum("td,tnd->tn", x_TD, signature_ED[best_TN]) * scale_TN
        score_TE = score_TN.new_full((x_TD.shape[0], self.num_tiles), -torch.inf).scatter(-1, best_TN, score_TN)
        score_TE = score_TE.masked_fill(self.is_free_E, -torch.inf)
        return best_TN[:, : self.top_k], score_TE

    def _search(self, x_TD: Tensor, signature_ED: Tensor) -> tuple[Tensor, Tensor]:
        self._check_width(x_TD)
        x_TD = x_TD.detach().to(torch.promote_types(x_TD.dtype, torch.float32))
        signature_ED = signature_ED.detach().to(x_TD.dtype)
        bias_E = self.balance_bias.masked_fill(self.is_free_E, -torch.inf)
        with without_autocast(x_TD):
            return two_level_search(x_TD, signature_ED, bias_E, self.members_CM, self.num_best, self.num_probes or 0)

    @property
    def _packed_gate(self) -> Gate:
        return Gate.SIGMOID

    def _decide(self, score_TE: Tensor, tile_idx_TK: Tensor | None = None) -> RoutingDecision:
        assert tile_idx_TK is not None
        return RoutingDecision(tile_idx_TK, score_TE.gather(-1, tile_idx_TK).sigmoid(), score_TE)

    @torch.no_grad()
    def recall(self, x_TD: Tensor, emergent_ED: Tensor | None = None) -> float:
        """Share of the flat router's choices that the search finds; 1 for no tokens."""
        flat_TK, _ = super().select(x_TD, emergent_ED)
        found_TK, _ = self.select(x_TD, emergent_ED)
        is_found_TK = (flat_TK.unsqueeze(-1) == found_TK.unsqueeze(-2)).any(dim=-1)
        return float(is_found_TK.float().mean()) if is_found_TK.numel() else 1.0

    @torch.no_grad()
    def scored_share(self, x_TD: Tensor, emergent_ED: Tensor | None = None) -> float:
        """How many scores the search computes, as a share of all; 0 for no tokens."""
        _, num_scored = self._search(x_TD, self.signatures(emergent_ED))
        return int(num_scored) / max(x_TD.shape[0] * self.num_tiles, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.members_CM.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.members_CM.is_meta:  # zeros are no clusters
            self.members_CM.copy_(self._first_members())
        return self

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        checked = super()._checked(name, value)
        if name == "members_CM":
            tile_idx = value[value != -1].sort().values
            if not torch.equal(tile_idx, torch.arange(self.num_tiles, dtype=value.dtype, device=value.device)):
                raise ValueError(f"members_CM ({tile_idx.tolist()}) must hold each of the {self.num_tiles} tiles once")
        return checked

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_clusters={self.num_clusters}, num_probes={self.num_probes}"
