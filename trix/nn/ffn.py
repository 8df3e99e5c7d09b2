"""TriXFFN: a feed-forward layer of ternary tiles, routed by signatures. And its dense control."""

from dataclasses import dataclass, fields
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.signatures import check_target_diversity, signature_diversity_loss
from trix.functional.ternary import threshold_ternary
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.nn.sparse_lookup_v2 import SparseLookupFFNv2
from trix.nn.tiles import TernaryTiles
from trix.outputs import AuxLosses, RoutingDecision, RoutingInfo
from trix.routing.balance import balance_loss, check_weights, tile_load
from trix.routing.confidence import routing_confidence
from trix.routing.diversity import collapsed_tiles, reseeded
from trix.routing.hash_router import HashRouter
from trix.routing.router import SIGNATURE_THRESHOLD, LearnedRouter, SignatureRouter
from trix.routing.surgery import SignatureSurgery

Routing = Literal["explicit", "emergent", "learned", "hash"]


class TriXFFN(SignatureSurgery):
    """Each token is computed by the top_k tiles whose signatures agree with it most.

    y[t] = sum_k weight[t, k] * tile_{tile_idx[t, k]}(x[t]); the tiles are :class:`~trix.nn.tiles.TernaryTiles`, the routing
    is :class:`~trix.routing.router.SignatureRouter`, or a learned gate or a hash of the token's id as controls.

    Args:
        d_model: width of input and output.
        num_tiles: number of tiles E.
        d_ff: hidden width of all tiles together; each gets d_ff / num_tiles. Default: d_model // top_k for each tile, so that a
            token meets the same width whatever top_k is.
        top_k: tiles per token.
        routing: ``emergent`` reads signatures from the up weights, which the gate's gradient moves, too: +1 or -1 where most of
            a tile's rows agree, 0 where their votes nearly cancel; ``explicit`` learns them apart; ``learned`` is a float gate,
            ``hash`` looks at the token's id alone.
        balance_weight: weight of the balance loss. balance_rate: step of the balance bias, per training batch.
        max_k: adaptive k: one tile where the confidence exceeds ``confidence_threshold``, else more, up to max_k.
        diversity_weight: weight of relu(target_diversity - diversity of the signatures). Where routing has none (``learned``,
            ``hash``), of those that :meth:`get_tile_signatures` reads from the tiles.

    Shape:
        x: float [B, D] or [B, T, D] (any leading dimensions) -> the same shape and dtype. token_idx: int64, the shape of x less
        its last dimension, the ids of the tokens; only ``hash`` reads them. mask: bool of that shape, False for padding: it is
        routed, but with weight 0, so it is neither computed (y = 0) nor counted in the balance. routing_x: float, the shape of
        x: what the signatures are compared with instead of x.

    Raises:
        ValueError: d_ff not divisible by num_tiles, top_k or max_k > num_tiles, a weight or rate that is negative, infinite or
            NaN, target_diversity outside [0, 1], a wrong last dimension of x, a mask or routing_x that does not fit, or
            ``hash`` without token ids or with more than one tile per token.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_tiles: int = 4,
        d_ff: int | None = None,
        top_k: int = 1,
        routing: Routing = "emergent",
        balance_weight: float = 0.01,
        balance_rate: float = 0.01,
        max_k: int | None = None,
        confidence_threshold: float = 0.3,
        diversity_weight: float = 0.0,
        target_diversity: float = 0.5,
    ) -> None:
        super().__init__(num_tiles)
        d_ff = num_tiles * max(d_model // max(top_k, 1), 1) if d_ff is None else d_ff
        if num_tiles < 1 or d_ff < 1 or d_ff % num_tiles:
            raise ValueError(f"d_ff ({d_ff}) must be divisible by num_tiles ({num_tiles}), both >= 1")
        if routing not in ("explicit", "emergent", "learned", "hash"):
            raise ValueError(f"routing ({routing!r}) must be 'explicit', 'emergent', 'learned' or 'hash'")
        check_weights(balance_weight=balance_weight, diversity_weight=diversity_weight)
        check_target_diversity(target_diversity)
        self.d_model, self.num_tiles, self.balance_weight = d_model, num_tiles, balance_weight
        self.diversity_weight, self.target_diversity = diversity_weight, target_diversity
        self.router: SignatureRouter | LearnedRouter | HashRouter
        if routing == "hash":
            if top_k != 1 or max_k is not None:
                raise ValueError(f"top_k ({top_k}) must be 1 and max_k ({max_k}) None under routing ('hash')")
            self.router = HashRouter(d_model, num_tiles)
        elif routing == "learned":
            self.router = LearnedRouter(d_model, num_tiles, top_k, balance_rate, max_k, confidence_threshold)
        else:
            self.router = SignatureRouter(d_model, num_tiles, top_k, balance_rate, routing, max_k, confidence_threshold)
        self.tiles = TernaryTiles(d_model, num_tiles, d_ff // num_tiles)

    @overload
    def forward(
        self,
        x: Tensor,
        return_routing: Literal[False] = ...,
        token_idx: Tensor | None = ...,
        mask: Tensor | None = ...,
        routing_x: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        return_routing: Literal[True],
        token_idx: Tensor | None = ...,
        mask: Tensor | None = ...,
        routing_x: Tensor | None = ...,
    ) -> tuple[Tensor, RoutingInfo, AuxLosses]: ...
    def forward(
        self,
        x: Tensor,
        return_routing: bool = False,
        token_idx: Tensor | None = None,
        mask: Tensor | None = None,
        routing_x: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RoutingInfo, AuxLosses]:
        x_TD = x.reshape(-1, x.shape[-1])
        if routing_x is not None and routing_x.shape != x.shape:
            raise ValueError(f"routing_x {tuple(routing_x.shape)} must have the shape of x {tuple(x.shape)}")
        if self.training:
            self._begin_forward()
        decision = self._route(x_TD if routing_x is None else routing_x.reshape(x_TD.shape), token_idx)
        if mask is not None:
            decision = _without_padding(decision, mask, x)
        if self.training:
            self._count_batch(decision.tile_idx, decision.weight)
        y_TD = self.tiles(x_TD, decision.tile_idx, decision.weight, skip_unused=self.router.is_adaptive or mask is not None)
        y = y_TD.to(x.dtype).reshape(x.shape)
        if self.training:
            self._end_forward(y)
        if not return_routing:
            return y
        info: RoutingInfo = {
            "tile_idx": _like(x, decision.tile_idx),
            "weight": _like(x, decision.weight),
            "scores": _like(x, decision.score),
        }
        return y, info, self._aux_losses(decision)

    def _route(self, x_TD: Tensor, token_idx: Tensor | None = None) -> RoutingDecision:
        if isinstance(self.router, HashRouter):
            return self.router(x_TD, None if token_idx is None else token_idx.reshape(-1))
        if isinstance(self.router, LearnedRouter):
            return self.router(x_TD)
        return self.router(x_TD, self._emergent_signatures())

    def _emergent_signatures(self) -> Tensor | None:
        router = self.router
        if not isinstance(router, SignatureRouter) or router.source == "explicit" or router.packed_signatures is not None:
            return None
        return self.tiles.votes()

    def _aux_losses(self, decision: RoutingDecision) -> AuxLosses:
        balance = diversity = zero = decision.score.new_zeros(())
        if self.training and self.balance_weight > 0:
            balance = self.balance_weight * balance_loss(decision.score, decision.tile_idx, decision.weight)
        if self.training and self.diversity_weight > 0:
            diversity = self.diversity_weight * self._diversity_loss()
        return {
            "balance": balance,
            "ternary": zero,
            "sparsity": zero,
            "diversity": diversity,
            "total_aux": balance + diversity,
        }

    def _diversity_loss(self) -> Tensor:
        if not isinstance(self.router, SignatureRouter):
            return signature_diversity_loss(self.tiles.votes(), SIGNATURE_THRESHOLD, self.target_diversity)
        return self.router.diversity_loss(self.target_diversity, self._emergent_signatures())

    def get_tile_signatures(self) -> Tensor:
        """Signatures in force: [E, D] in {-1, 0, +1}. Under a control's routing, those that the tiles' weights would give."""
        if not isinstance(self.router, SignatureRouter):
            return threshold_ternary(self.tiles.votes().detach(), SIGNATURE_THRESHOLD)
        return super().get_tile_signatures()

    @torch.no_grad()
    def get_routing_stats(self, x: Tensor, token_idx: Tensor | None = None) -> dict[str, float | int | list[float]]:
        """Where the tokens of x go.

        Returns:
            usage: share of assignments per tile; balance: min / max of usage; entropy: of usage, in nats; dominant_tile;
            confidence: mean gap between the best two scores (0 with a single tile), and its quartiles in
            confidence_quartiles; mean_k: tiles per token that carry weight. An empty x gives zeros.
        """
        decision = self._route(x.reshape(-1, x.shape[-1]), token_idx)
        usage = tile_load(decision.tile_idx, self.num_tiles, decision.weight)
        gap = routing_confidence(decision.score.float())
        levels = gap.new_tensor([0.25, 0.5, 0.75])
        return {
            "usage": usage.tolist(),
            "balance": float(usage.min() / usage.max().clamp_min(torch.finfo(usage.dtype).tiny)),
            "entropy": float(torch.special.entr(usage).sum()),
            "dominant_tile": int(usage.argmax()),
            "confidence": float(gap.mean()) if len(gap) else 0.0,
            "confidence_quartiles": gap.quantile(levels).tolist() if len(gap) else [0.0, 0.0, 0.0],
            "mean_k": float((decision.weight != 0).sum() / max(len(gap), 1)),
        }

    @torch.no_grad()
    def reseed_collapsed_tiles(self, min_difference: float = 0.05, tag: str = "") -> list[int]:
        """Draw anew what the signatures of collapsed tiles come from: the signatures (explicit) or the up weights (emergent).

        Collapsed is what :func:`~trix.routing.diversity.collapsed_tiles` says; a frozen signature and a free
        slot never are. An optimizer's
        momentum for these values is the caller's to reset.

        Returns:
            The tiles drawn anew; each is in the surgery history as "reseed".

        Raises:
            ValueError: routing without signatures, a packed layer, or min_difference outside [0, 1).
        """
        router = self._signature_router()
        source = router if router.source == "explicit" else self.tiles.up
        value = router.raw_signatures if router.source == "explicit" else self.tiles.up.weight
        if value is None or router.packed_signatures is not None:
            raise ValueError("the layer is packed: unpack it before changing its signatures")
        in_use = (~router.is_free_E).nonzero().flatten()
        is_collapsed_E = torch.zeros_like(router.is_free_E)
        is_collapsed_E[in_use] = collapsed_tiles(self.get_tile_signatures()[in_use], min_difference, router.is_frozen_E[in_use])
        value.copy_(reseeded(value, is_collapsed_E, source.draw().to(value.device)))
        collapsed: list[int] = is_collapsed_E.nonzero().flatten().tolist()
        for tile_idx in collapsed:
            self.surgery_log.record("reseed", tile_idx, tag)
        return collapsed

    def pack(self) -> None:
        """Replace float weights and signatures by their 2-bit form; inference only afterwards. Idempotent."""
        if isinstance(self.router, SignatureRouter):
            self.router.pack_signatures(self._emergent_signatures())
        self.tiles.up.pack()
        self.tiles.down.pack()

    def unpack(self) -> None:
        """Undo :meth:`pack`: float weights with the same ternary form."""
        if isinstance(self.router, SignatureRouter):
            self.router.unpack_signatures()
        self.tiles.up.unpack()
        self.tiles.down.unpack()


def _like(x: Tensor, value_TK: Tensor) -> Tensor:
    """[T, K] in the leading dimensions of x."""
    return value_TK.reshape(*x.shape[:-1], value_TK.shape[-1])


def _without_padding(decision: RoutingDecision, mask: Tensor, x: Tensor) -> RoutingDecision:
    """The decision with weight 0 for all tiles of padding."""
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must have shape {tuple(x.shape[:-1])} torch.bool")
    return decision._replace(weight=decision.weight * mask.reshape(-1, 1).to(decision.weight.dtype))


class DenseFFN(nn.Module):
    """The dense control: y = W_down relu(W_up x)^2 with float weights. x: float [..., D] -> [..., D]."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


# Fields of FFNConfig that a routed layer of some kind does not have.
OF_OTHERS = ("target_diversity", "tiles_per_cluster", "num_probes")
FOREIGN_ARGUMENTS = {
    "trix": ("tiles_per_cluster", "num_probes"),
    "hierarchical": ("max_k", "confidence_threshold"),
    "sparse_lookup": ("d_ff", "routing", "max_k", "confidence_threshold", "diversity_weight", *OF_OTHERS),
    "sparse_lookup_v2": ("d_ff", "routing", "max_k", "confidence_threshold", *OF_OTHERS),
}


@dataclass(frozen=True)
class FFNConfig:
    """Which feed-forward layer a block holds.

    Args:
        kind: ``trix`` (tiles), ``hierarchical`` (many tiles, found by clusters: :class:`~trix.nn.HierarchicalTriXFFN`),
            ``sparse_lookup`` or ``sparse_lookup_v2`` (:class:`~trix.nn.SparseLookupFFN`, :class:`~trix.nn.SparseLookupFFNv2`),
            or a control: ``dense`` (float, width d_ff) or ``none`` (no feed-forward layer at all).
        route_on: what a block lets the signatures read. ``embedding``: the normalised embedding of the token, in every layer: a
            token goes to the same tiles whatever its context. ``hidden``: the layer's own input, so the context, too.
        tiles_per_cluster, num_probes: of a hierarchical layer alone, which in turn has no max_k.
        All others: see :class:`TriXFFN`; a dense layer reads only d_ff (default 4 * d_model), a sparse lookup num_tiles, top_k,
            route_on, balance_weight, balance_rate and, v2, diversity_weight. ``hash`` needs a model of tokens.
    """

    kind: Literal["trix", "hierarchical", "sparse_lookup", "sparse_lookup_v2", "dense", "none"] = "trix"
    num_tiles: int = 16
    d_ff: int | None = None
    top_k: int = 1
    routing: Routing = "explicit"
    route_on: Literal["embedding", "hidden"] = "embedding"
    balance_weight: float = 0.01
    balance_rate: float = 0.01
    max_k: int | None = None
    confidence_threshold: float = 0.3
    diversity_weight: float = 0.0
    target_diversity: float = 0.5
    tiles_per_cluster: int | None = None
    num_probes: int | None = None

    def build(self, d_model: int, dropout: float = 0.0) -> nn.Module | None:
        """The layer, or None for ``none``. dropout: of a sparse lookup, which adds its update to the residual itself.

        Raises:
            ValueError: another kind, an argument that the kind does not have, and as the layer.
        """
        from trix.nn.hierarchical import HierarchicalTriXFFN  # not above: it derives from TriXFFN

        if self.kind == "none":
            return None
        if self.kind == "dense":
            return DenseFFN(d_model, 4 * d_model if self.d_ff is None else self.d_ff)
        if self.kind not in FOREIGN_ARGUMENTS:
            kinds = "'trix', 'hierarchical', 'sparse_lookup', 'sparse_lookup_v2', 'dense' or 'none'"
            raise ValueError(f"kind ({self.kind!r}) must be {kinds}")
        foreign = FOREIGN_ARGUMENTS[self.kind]
        for name in foreign:
            if getattr(self, name) != getattr(FFNConfig, name):
                default = getattr(FFNConfig, name)
                raise ValueError(f"{name} ({getattr(self, name)}) must be {default} where kind is {self.kind!r}")
        if self.route_on not in ("hidden", "embedding"):
            raise ValueError(f"route_on ({self.route_on!r}) must be 'embedding' or 'hidden'")
        if self.kind == "sparse_lookup":
            return SparseLookupFFN(
                d_model,
                self.num_tiles,
                dropout=dropout,
                balance_weight=self.balance_weight,
                balance_rate=self.balance_rate,
                top_k=self.top_k,
            )
        if self.kind == "sparse_lookup_v2":
            return SparseLookupFFNv2(
                d_model,
                self.num_tiles,
                dropout=dropout,
                diversity_weight=self.diversity_weight,
                balance_weight=self.balance_weight,
                balance_rate=self.balance_rate,
                top_k=self.top_k,
            )
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kind", "route_on")}
        for name in foreign:
            del arguments[name]
        if self.kind == "hierarchical":
            return HierarchicalTriXFFN(d_model, **arguments)
        return TriXFFN(d_model, **arguments)
