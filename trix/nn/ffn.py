"""TriXFFN: a feed-forward layer of tiles, routed by signatures."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from trix.functional.signatures import check_target_diversity, signature_diversity_loss
from trix.functional.ternary import threshold_ternary
from trix.nn.tile_kinds import TILES
from trix.outputs import AuxLosses, LayerOutput, RoutingDecision, RoutingInfo, RowContext, TokenContext
from trix.routing.balance import balance_loss, check_weights, tile_load
from trix.routing.base_router import Router
from trix.routing.confidence import routing_confidence
from trix.routing.diversity import collapsed_tiles, reseeded
from trix.routing.router import SIGNATURE_THRESHOLD, SignatureRouter
from trix.routing.routers import ROUTERS
from trix.routing.surgery import SignatureSurgery


class TriXFFN(SignatureSurgery):
    """Each token is computed by the top_k tiles whose signatures agree with it most.

    y[t] = sum_k weight[t, k] * tile_{tile_idx[t, k]}(x[t]); the tiles are :class:`~trix.nn.tiles.TernaryTiles`, the routing
    is :class:`~trix.routing.router.SignatureRouter`, or :class:`~trix.routing.scattering_router.ScatteringRouter`, or a learned
    gate or a hash of the token's id as controls; or either is a class of the user's.

    Args:
        d_model: width of input and output.
        num_tiles: number of tiles E.
        d_ff: hidden width of all tiles together; each gets d_ff / num_tiles. Default: d_model // top_k for each tile, so that a
            token meets the same width whatever top_k is.
        top_k: tiles per token.
        routing: ``emergent`` reads signatures from the up weights, which the gate's gradient moves, too: +1 or -1 where most of
            a tile's rows agree, 0 where their votes nearly cancel; ``explicit`` learns them apart; ``scattering`` goes by the
            phase that the mixer gives; ``learned`` is a float gate, ``hash`` looks at the token's id alone. Or the import path
            of a :class:`~trix.routing.base_router.Router`.
        balance_weight: weight of the balance loss. balance_rate: step of the balance bias, per training batch: whole for the
            first 100 batches, then falling, and 0 from batch 200 on, where the bias rests and the balance loss holds the load
            alone; a task multiplies it by the learning rate's share of its peak.
        max_k: adaptive k: one tile where the confidence exceeds ``confidence_threshold``, else more, up to max_k.
            adaptive_k: the same with a max_k of 2 by default.
        diversity_weight: weight of relu(target_diversity - diversity of the signatures). Where routing has none (``learned``,
            ``hash``, ``scattering``), of those that :meth:`get_tile_signatures` reads from the tiles.
        tiles: ``ternary``, or the import path of a :class:`~trix.nn.tiles.Tiles`.
        routing_args, tiles_args: what the router and the tiles are made with besides.

    Shape:
        x: float [B, D] or [B, T, D] (any leading dimensions) -> the same shape and dtype. token_idx: int64, the shape of x less
        its last dimension, the ids of the tokens, for routers that read them, as ``hash``. phase: float of that shape, what a
        mixer says of each token, for routers that read it. mask: bool of that shape, False for padding: it is
        routed, but with weight 0, so it is neither computed (y = 0) nor counted in the balance. routing_x: float, the shape of
        x: what the signatures are compared with instead of x.

    Raises:
        ValueError: d_ff not divisible by num_tiles, top_k or max_k > num_tiles, a weight or rate that is negative, infinite or
            NaN, target_diversity outside [0, 1], a wrong last dimension of x, a mask or routing_x that does not fit, or
            ``hash`` without token ids or with more than one tile per token, or ``scattering`` without phases.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_tiles: int = 4,
        d_ff: int | None = None,
        top_k: int = 1,
        routing: str = "emergent",
        *,
        balance_weight: float = 0.01,
        balance_rate: float = 0.01,
        max_k: int | None = None,
        confidence_threshold: float = 0.3,
        diversity_weight: float = 0.0,
        target_diversity: float = 0.5,
        adaptive_k: bool = False,
        tiles: str = "ternary",
        routing_args: Mapping[str, Any] | None = None,
        tiles_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_tiles)
        d_ff = num_tiles * max(d_model // max(top_k, 1), 1) if d_ff is None else d_ff
        if num_tiles < 1:
            raise ValueError(f"num_tiles ({num_tiles}) must be >= 1")
        if d_ff < 1 or d_ff % num_tiles:
            raise ValueError(f"d_ff ({d_ff}) must be divisible by num_tiles ({num_tiles}), and >= 1")
        check_weights(balance_weight=balance_weight, diversity_weight=diversity_weight)
        check_target_diversity(target_diversity)
        self.d_model, self.num_tiles, self.balance_weight = d_model, num_tiles, balance_weight
        self.diversity_weight, self.target_diversity = diversity_weight, target_diversity
        if adaptive_k and max_k is None:
            max_k = min(2, num_tiles)
        self.router = self._make_router(
            routing,
            routing_args or {},
            top_k=top_k,
            balance_rate=balance_rate,
            max_k=max_k,
            confidence_threshold=confidence_threshold,
        )
        self.tiles = TILES.make(tiles, d_model, num_tiles, d_ff // num_tiles, arguments=tiles_args or {})

    def _make_router(self, routing: str, arguments: Mapping[str, Any], **settings: Any) -> Router:
        return ROUTERS.make(routing, self.d_model, self.num_tiles, arguments=arguments, **settings)

    @overload
    def forward(
        self,
        x: Tensor,
        return_routing: Literal[False] = ...,
        token_idx: Tensor | None = ...,
        mask: Tensor | None = ...,
        routing_x: Tensor | None = ...,
        phase: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        return_routing: Literal[True],
        token_idx: Tensor | None = ...,
        mask: Tensor | None = ...,
        routing_x: Tensor | None = ...,
        phase: Tensor | None = ...,
    ) -> tuple[Tensor, RoutingInfo, AuxLosses]: ...
    def forward(
        self,
        x: Tensor,
        return_routing: bool = False,
        token_idx: Tensor | None = None,
        mask: Tensor | None = None,
        routing_x: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RoutingInfo, AuxLosses]:
        x_TD = x.reshape(-1, x.shape[-1])
        if routing_x is not None and routing_x.shape != x.shape:
            raise ValueError(f"routing_x {tuple(routing_x.shape)} must have the shape of x {tuple(x.shape)}")
        if self.training:
            self._begin_forward()
        context = RowContext(_row(token_idx), _row(phase))
        decision = self._route(x_TD if routing_x is None else routing_x.reshape(x_TD.shape), context)
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

    def layer_output(self, x_BTD: Tensor, context: TokenContext) -> LayerOutput:
        """The answer with its routing, for a block; the router reads ``context.embedding_BTD`` where there is one."""
        y_BTD, info, aux = self(
            x_BTD,
            return_routing=True,
            token_idx=context.token_BT,
            mask=context.mask_BT,
            routing_x=context.embedding_BTD,
            phase=context.phase_BT,
        )
        return LayerOutput(y_BTD, info, aux)

    def _route(self, x_TD: Tensor, context: RowContext = RowContext()) -> RoutingDecision:
        return self.router(x_TD, context, self.emergent_signatures())

    def emergent_signatures(self) -> Tensor | None:
        return self.tiles.votes() if self.router.needs_votes else None

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
        return self.router.diversity_loss(self.target_diversity, self.emergent_signatures())

    def get_tile_signatures(self) -> Tensor:
        """Signatures in force: [E, D] in {-1, 0, +1}. Under a control's routing, those that the tiles' weights would give."""
        if not isinstance(self.router, SignatureRouter):
            return threshold_ternary(self.tiles.votes().detach(), SIGNATURE_THRESHOLD)
        return super().get_tile_signatures()

    @torch.no_grad()
    def get_routing_stats(
        self, x: Tensor, token_idx: Tensor | None = None, phase: Tensor | None = None
    ) -> dict[str, float | int | list[float]]:
        """Where the tokens of x go.

        Returns:
            usage: share of assignments per tile; balance: min / max of usage; entropy: of usage, in nats; dominant_tile;
            confidence: mean gap between the best two scores (0 with a single tile), and its quartiles in
            confidence_quartiles; mean_k: tiles per token that carry weight. An empty x gives zeros.
        """
        decision = self._route(x.reshape(-1, x.shape[-1]), RowContext(_row(token_idx), _row(phase)))
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
        """Draw anew what the signatures of collapsed tiles come from: the signatures (explicit) or the weights that the votes
        are read from (emergent).

        Collapsed is what :func:`~trix.routing.diversity.collapsed_tiles` says; a frozen signature and a free slot never are. An
        optimizer's momentum for these values is the caller's to reset.

        Returns:
            The tiles drawn anew; each is in the surgery history as "reseed".

        Raises:
            ValueError: routing without signatures, a packed layer, or min_difference outside [0, 1).
        """
        router = self._signature_router()
        if router.packed_signatures is not None:
            raise ValueError("the layer is packed: unpack it before changing its signatures")
        in_use = (~router.is_free_E).nonzero().flatten()
        is_collapsed_E = torch.zeros_like(router.is_free_E)
        is_collapsed_E[in_use] = collapsed_tiles(self.get_tile_signatures()[in_use], min_difference, router.is_frozen_E[in_use])
        if router.raw_signatures is None:
            self.tiles.redraw(is_collapsed_E, votes_only=True)
        else:
            fresh_ED = router.draw().to(router.raw_signatures.device)
            router.raw_signatures.copy_(reseeded(router.raw_signatures, is_collapsed_E, fresh_ED))
        collapsed: list[int] = is_collapsed_E.nonzero().flatten().tolist()
        for tile_idx in collapsed:
            self.surgery_log.record("reseed", tile_idx, tag)
        return collapsed

    def pack(self) -> None:
        """Replace float weights and signatures by their 2-bit form; inference only afterwards. Idempotent."""
        self.router.pack_signatures(self.emergent_signatures())
        self.tiles.pack()

    def unpack(self) -> None:
        """Undo :meth:`pack`: float weights with the same ternary form."""
        self.router.unpack_signatures()
        self.tiles.unpack()


def _row(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.reshape(-1)


def _like(x: Tensor, value_TK: Tensor) -> Tensor:
    """[T, K] in the leading dimensions of x."""
    return value_TK.reshape(*x.shape[:-1], value_TK.shape[-1])


def _without_padding(decision: RoutingDecision, mask: Tensor, x: Tensor) -> RoutingDecision:
    """The decision with weight 0 for all tiles of padding."""
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must have shape {tuple(x.shape[:-1])} torch.bool")
    return decision._replace(weight=decision.weight * mask.reshape(-1, 1).to(decision.weight.dtype))
