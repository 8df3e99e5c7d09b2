"""TriXFFN for many tiles: routed by a search over clusters of signatures."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trix.nn.ffn import TriXFFN
from trix.routing.hierarchical_router import HierarchicalRouter


class HierarchicalTriXFFN(TriXFFN):
    """TriXFFN whose router visits clusters of tiles: exact by default, approximate with ``num_probes``.

    The weight of a chosen tile is sigmoid(score), not a softmax over all scores: see
    :class:`~trix.routing.hierarchical_router.HierarchicalRouter`. Clusters are part of the state_dict; :meth:`recluster` renews
    them as training moves the signatures, say every hundred steps.

    Args:
        tiles_per_cluster: default ceil(sqrt(num_tiles)); num_tiles need not divide by it. num_probes: clusters to visit per
            token; None for the exact search. Others: see :class:`~trix.nn.ffn.TriXFFN`.

    Shape and errors: as TriXFFN and HierarchicalRouter.
    """

    router: HierarchicalRouter

    def __init__(
        self,
        d_model: int = 512,
        num_tiles: int = 64,
        d_ff: int | None = None,
        top_k: int = 1,
        routing: Literal["explicit", "emergent"] = "explicit",
        *,
        tiles_per_cluster: int | None = None,
        num_probes: int | None = None,
        balance_weight: float = 0.01,
        balance_rate: float = 0.01,
        diversity_weight: float = 0.0,
        target_diversity: float = 0.5,
        tiles: str = "ternary",
        tiles_args: Mapping[str, Any] | None = None,
    ) -> None:
        if routing not in ("explicit", "emergent"):
            raise ValueError(f"routing ({routing!r}) must be 'explicit' or 'emergent' in a hierarchical layer")
        super().__init__(
            d_model,
            num_tiles,
            d_ff,
            top_k,
            routing,
            balance_weight=balance_weight,
            balance_rate=balance_rate,
            diversity_weight=diversity_weight,
            target_diversity=target_diversity,
            routing_args={"tiles_per_cluster": tiles_per_cluster, "num_probes": num_probes},
            tiles=tiles,
            tiles_args=tiles_args,
        )
        self.recluster()

    def _make_router(self, routing: str, arguments: Mapping[str, Any], **settings: Any) -> HierarchicalRouter:
        source: Literal["explicit", "emergent"] = "emergent" if routing == "emergent" else "explicit"
        kept = {name: settings[name] for name in ("top_k", "balance_rate")}
        return HierarchicalRouter(self.d_model, self.num_tiles, source=source, **kept, **arguments)

    def recluster(self) -> None:
        """Cluster the present signatures anew. The exact choice never depends on it; its cost does, and recall with probes."""
        if not self.router.members_CM.is_meta:  # on the meta device there are no signatures to compare
            self.router.recluster(self.emergent_signatures())

    def insert_signature(self, tile_idx: int, signature: Tensor, freeze: bool = True, tag: str = "") -> None:
        """As in every layer; then clusters anew, for probes would look for the new signature where the old one was."""
        super().insert_signature(tile_idx, signature, freeze, tag)
        self.recluster()

    @torch.no_grad()
    def get_routing_stats(
        self, x: Tensor, token_idx: Tensor | None = None, phase: Tensor | None = None
    ) -> dict[str, float | int | list[float]]:
        """As :meth:`TriXFFN.get_routing_stats`, with recall: the share of the exact choices that the search finds (1 when it is
        exact), and scored_share: the scores it computes, as a share of all.
        """
        stats = super().get_routing_stats(x, token_idx, phase)
        x_TD, emergent_ED = x.reshape(-1, x.shape[-1]), self.emergent_signatures()
        stats["recall"] = self.router.recall(x_TD, emergent_ED)
        stats["scored_share"] = self.router.scored_share(x_TD, emergent_ED)
        return stats
