"""SparseLookupFFN: a feed-forward layer without matrix products inside the tiles. Each token looks up directions."""

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from trix.functional.dropout import dropout_mask
from trix.functional.lookup import add_rows, sparse_lookup
from trix.functional.ternary import straight_through
from trix.nn.attention import RotaryAttention
from trix.nn.magnitudes import GridSplines, HingeSplines
from trix.nn.residual import MixerResidual, make_dropout
from trix.outputs import AuxLosses, LayerOutput, LookupInfo, RoutingInfo, TokenContext
from trix.routing.balance import balance_loss, check_weights, summed_over_processes
from trix.routing.claims import ClaimMatrix
from trix.routing.facts import Fact, check_counts
from trix.routing.pending import is_in_backward
from trix.routing.router import SignatureRouter
from trix.routing.surgery import SignatureSurgery


class LookupStats(TypedDict):
    """Usage since the last reset.

    active_tiles: those that got a token. usage_mean, usage_std: mean and deviation of the tiles' shares.
    """

    num_tiles: int
    num_clusters: int
    active_tiles: int
    frozen_tiles: int
    usage_mean: float
    usage_std: float


class SparseLookupFFN(SignatureSurgery):
    """The winning tile adds its direction to the token, as far as its spline says.

    h = LayerNorm(x);  e = argmax_e <h, s_e> / sqrt(nnz(s_e)), s_e = sign(direction_e);
    p = tanh(W_2 gelu(W_1 h)), a point in the plane;  y = x + dropout(spline_e(p) * direction_e * output_scale).

    With ``top_k`` > 1, so do the top_k tiles of the best scores: y = x + dropout(sum_k ...).

    The signatures' gradient passes straight through the sign to the directions (from the balance loss; the task reaches the
    directions themselves). All tiles' parameters are stacked and each token reads one tile's, so the cost of a token does not
    depend on the number of tiles, apart from the scores.

    Args:
        d_model, num_tiles: D, E.
        tiles_per_cluster: tiles in a cluster of a two-level search; as routing is exact, it changes no result.
        grid_size: cells of a spline along each axis. compress_hidden: rows of W_1; default d_model // 4, at least 1.
        ternary_splines: splines with ternary corner values and one scale per tile, instead of float ones.
        balance_weight: weight of the balance loss. balance_rate: step of the router's balance bias, per training batch, as in
            :class:`~trix.nn.TriXFFN`; 0, the default, leaves the choice to the signatures alone.
        num_classes: number of label classes; by default the claims grow to the largest label seen.
        top_k: tiles per token.

    Shape:
        x: float [B, D] or [B, T, D] (any leading dimensions). routing_x: float, the shape of x: what the signatures are
        compared with instead of h. labels: int64, one for each token or for each entry of the first dimension; -100 is
        ignored. mask: bool, one for each token, False for padding: computed like the others, but counted neither in losses
        nor in statistics. Returns (output, LookupInfo, AuxLosses), output in the shape and dtype of x.

    Forward in training counts steps and usage, and with labels, in any mode, claims; otherwise it is pure. Labels are read on
    the host: leave them out under torch.compile and export.

    Raises:
        ValueError: a size below 1, top_k > num_tiles, a negative weight, a wrong last dimension of x, or a mask, labels or
            routing_x that do not fit.
    """

    router: SignatureRouter
    usage_E = Fact[Tensor]()
    claims = Fact[ClaimMatrix]()

    def __init__(
        self,
        d_model: int = 128,
        num_tiles: int = 64,
        tiles_per_cluster: int = 8,
        grid_size: int = 16,
        *,
        compress_hidden: int | None = None,
        dropout: float = 0.1,
        ternary_splines: bool = True,
        balance_weight: float = 0.01,
        balance_rate: float = 0.0,
        num_classes: int | None = None,
        top_k: int = 1,
    ) -> None:
        super().__init__(num_tiles)
        compress_hidden = max(d_model // 4, 1) if compress_hidden is None else compress_hidden
        if compress_hidden < 1 or tiles_per_cluster < 1:
            raise ValueError(f"compress_hidden ({compress_hidden}) and tiles_per_cluster ({tiles_per_cluster}) must be >= 1")
        check_weights(balance_weight=balance_weight)
        self.d_model, self.num_tiles, self.tiles_per_cluster = d_model, num_tiles, tiles_per_cluster
        self.balance_weight = balance_weight
        self.router = self._make_router(balance_rate, top_k)
        self.magnitude = self._make_magnitude(grid_size, ternary_splines)
        self.norm = nn.LayerNorm(d_model)
        self.compress = nn.Sequential(nn.Linear(d_model, compress_hidden), nn.GELU(), nn.Linear(compress_hidden, 2), nn.Tanh())
        self.direction_ED = nn.Parameter(torch.randn(num_tiles, d_model) / d_model**0.5)
        self.output_scale = nn.Parameter(torch.ones(()))
        self.dropout = make_dropout(dropout)
        self.hold("usage_E", torch.zeros(num_tiles, dtype=torch.int64))
        self._set_claims(ClaimMatrix(num_tiles, num_classes, is_persistent=True))

    def _set_claims(self, claims: ClaimMatrix) -> None:
        self._modules["claims"] = claims
        self.hold("claims", claims)

    def _take_over(self, values: dict[str, Any]) -> None:
        super()._take_over(values)
        self._set_claims(self._held.values["claims"].to(self.mark.device))

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        checked = super()._checked(name, value)
        check_counts(name, checked)
        return checked

    def _make_router(self, balance_rate: float, top_k: int) -> SignatureRouter:
        return SignatureRouter(self.d_model, self.num_tiles, top_k, balance_rate, "emergent")

    def _make_magnitude(self, grid_size: int, ternary_splines: bool) -> GridSplines | HingeSplines:
        return GridSplines(self.num_tiles, grid_size, ternary_splines)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, routing_x: Tensor | None = None
    ) -> tuple[Tensor, LookupInfo, AuxLosses]:
        if x.shape[-1] != self.d_model:
            raise ValueError(f"last dimension of x ({x.shape[-1]}) must equal d_model ({self.d_model})")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must have shape {tuple(x.shape[:-1])} torch.bool")
        if routing_x is not None and routing_x.shape != x.shape:
            raise ValueError(f"routing_x {tuple(routing_x.shape)} must have the shape of x {tuple(x.shape)}")
        if self.training:
            self._begin_forward()
        x_TD = x.reshape(-1, self.d_model)
        routing_TD = None if routing_x is None else routing_x.reshape(x_TD.shape)
        packed = self.router.packed_signatures
        if packed is not None and not self.training:
            y_TD, tile_idx_TK, score_TE, point_T2 = self._look_up(x_TD, routing_TD, packed)
            gate_TK = self._gate(score_TE.gather(-1, tile_idx_TK))
        else:
            h_TD = self.norm(x_TD)
            tile_idx_TK, score_TE = self.router.select(h_TD if routing_TD is None else routing_TD, self.emergent_signatures())
            gate_TK = self._gate(score_TE.gather(-1, tile_idx_TK))
            point_T2 = self.compress(h_TD)
            y_TD = self._add_directions(x_TD, point_T2, tile_idx_TK, gate_TK)
        self._count(tile_idx_TK, labels, mask, x.shape[:-1])
        choice_shape = x.shape[:-1] if self.router.top_k == 1 else (*x.shape[:-1], self.router.top_k)
        info: LookupInfo = {
            "tile_idx": tile_idx_TK.reshape(choice_shape),
            "weight": gate_TK.reshape(choice_shape),
            "compressed": point_T2.reshape(*x.shape[:-1], 2),
            "scores": score_TE.reshape(*x.shape[:-1], self.num_tiles),
        }
        y = y_TD.reshape(x.shape)
        if self.training:
            self._end_forward(y)
        return y, info, self._aux_losses(score_TE, tile_idx_TK, mask)

    def layer_output(self, x_BTD: Tensor, context: TokenContext) -> LayerOutput:
        """The answer with its routing, for a block; the router reads ``context.embedding_BTD`` where there is one."""
        y_BTD, lookup, aux = self(x_BTD, mask=context.mask_BT, routing_x=context.embedding_BTD)
        choice_shape = (*x_BTD.shape[:-1], self.router.top_k)
        info: RoutingInfo = {
            "tile_idx": lookup["tile_idx"].reshape(choice_shape),
            "weight": lookup["weight"].reshape(choice_shape),
            "scores": lookup["scores"],
        }
        return LayerOutput(y_BTD, info, aux)

    def _add_directions(self, x_TD: Tensor, point_T2: Tensor, tile_idx_TK: Tensor, gate_TK: Tensor) -> Tensor:
        mask_TD, factor = None, 1.0
        if self.training and self.dropout.p > 0:
            mask_TD, factor = dropout_mask(x_TD.shape, self.dropout.p, x_TD.device)
        y_TD = x_TD
        for gate_T, tile_idx_T in zip(gate_TK.unbind(-1), tile_idx_TK.unbind(-1), strict=True):
            size_T = gate_T * self.magnitude(point_T2, tile_idx_T) * (self.output_scale * factor)
            y_TD = add_rows(y_TD, size_T, self.direction_ED, tile_idx_T, mask_TD)
        return y_TD

    def _look_up(self, x_TD: Tensor, routing_TD: Tensor | None, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y [T, D], tile_idx [T, K], score [T, E] and the points [T, 2] by one operator, for inference."""
        to_hidden, to_point = self.compress[0], self.compress[2]
        assert isinstance(to_hidden, nn.Linear)
        assert isinstance(to_point, nn.Linear)
        y_TD, tile_idx_TK, score_TE, point_T2 = sparse_lookup(
            x_TD,
            x_TD if routing_TD is None else routing_TD,
            self.norm.weight,
            self.norm.bias,
            packed,
            self.router.balance_bias + self.router.exclusion_E,
            self._gate_curve() * self.output_scale,
            to_hidden.weight.mT,
            to_hidden.bias,
            to_point.weight,
            to_point.bias,
            self.magnitude.values(),
            self.direction_ED,
            self.router.top_k,
            self.magnitude.grid_size,
            isinstance(self.magnitude, HingeSplines),
            routing_TD is None,
            self.norm.eps,
        )
        return y_TD, tile_idx_TK, score_TE + self.router.exclusion_E, point_T2

    def emergent_signatures(self) -> Tensor | None:
        if self.router.packed_signatures is not None:
            return None
        return straight_through(self.direction_ED.detach().sign(), self.direction_ED)

    def _gate(self, score_TK: Tensor) -> Tensor:
        """The factor on the chosen tiles' output, by their scores."""
        return torch.ones_like(score_TK)

    def _gate_curve(self) -> Tensor:
        """The same as values at equal steps of sigmoid(score), from 0 to 1, with straight lines between them; in at
        least float32."""
        return self.output_scale.new_ones(2, dtype=torch.promote_types(self.output_scale.dtype, torch.float32))

    def _count(self, tile_idx_TK: Tensor, labels: Tensor | None, mask: Tensor | None, shape: torch.Size) -> None:
        if not torch.compiler.is_compiling() and is_in_backward():
            return  # counted before
        if self.training:
            with torch.no_grad():
                is_real_TK = torch.ones_like(tile_idx_TK) if mask is None else _like_choice(mask, tile_idx_TK).to(torch.int64)
                count_E = torch.zeros_like(self.usage_E).scatter_add_(0, tile_idx_TK.flatten(), is_real_TK.flatten())
                self.usage_E.add_(summed_over_processes(count_E))
            self._count_batch(tile_idx_TK, None if mask is None else _like_choice(mask, tile_idx_TK))
            self.note_change()
        if labels is not None:
            self.claims.update(tile_idx_TK.reshape(*shape, self.router.top_k), labels, mask)
            self.note_change()

    def _aux_losses(self, score_TE: Tensor, tile_idx_TK: Tensor, mask: Tensor | None) -> AuxLosses:
        zero = score_TE.new_zeros(())
        balance = zero
        if self.training and self.balance_weight > 0:
            weight_TK = None if mask is None else _like_choice(mask, tile_idx_TK)
            balance = self.balance_weight * balance_loss(score_TE, tile_idx_TK, weight_TK)
        return {"balance": balance, "ternary": zero, "sparsity": zero, "diversity": zero, "total_aux": balance}

    @torch.no_grad()
    def get_claim_rate(self, tile_idx: int, target_class: int) -> float:
        """Share of the labelled tokens of target_class that went to the tile; 0.0 for a class never seen. All ranks together.

        Raises:
            ValueError: a tile that does not exist, or target_class < 0.
        """
        self.router.check_tile(tile_idx)
        if target_class < 0:
            raise ValueError(f"target_class ({target_class}) must be >= 0")
        with self.claims.sync_context():
            count_EC = self.claims.count_EC
            if target_class >= count_EC.shape[1]:
                return 0.0
            return int(count_EC[tile_idx, target_class]) / max(int(count_EC[:, target_class].sum()), 1)

    @torch.no_grad()
    def get_tile_purity(self, tile_idx: int) -> tuple[int, float]:
        """(dominant class, its share of the tile's labelled tokens); (-1, 0.0) for a tile that got none. All ranks together.

        Raises:
            ValueError: a tile that does not exist.
        """
        self.router.check_tile(tile_idx)
        with self.claims.sync_context():
            return int(self.claims.dominant_class()[tile_idx]), float(self.claims.purity()[tile_idx])

    def reset_claim_tracking(self) -> None:
        self.claims.reset()
        self.note_change()

    def get_routing_stats(self) -> LookupStats:
        """How the tokens of the training batches were spread over the tiles, those of all processes together."""
        share_E = self.usage_E.float() / self.usage_E.sum().clamp_min(1)
        return {
            "num_tiles": self.num_tiles,
            "num_clusters": -(-self.num_tiles // self.tiles_per_cluster),
            "active_tiles": int((self.usage_E > 0).sum()),
            "frozen_tiles": int(self.router.is_frozen_E.sum()),
            "usage_mean": float(share_E.mean()),
            "usage_std": float(share_E.std(correction=0)),
        }

    def reset_stats(self) -> None:
        """Forget usage and claims; the surgery history and its step counter stay."""
        self.usage_E.zero_()
        self.reset_claim_tracking()
        self.note_change()

    def pack(self) -> None:
        """Hold the signatures as 2-bit codes; in evaluation mode compute by ``trix::sparse_lookup``. Inference only afterwards.
        Idempotent.
        """
        self.router.pack_signatures(self.emergent_signatures())

    def unpack(self) -> None:
        """Undo :meth:`pack`."""
        self.router.unpack_signatures()


def _like_choice(mask: Tensor, tile_idx_TK: Tensor) -> Tensor:
    """The mask of tokens for each tile that they chose: [T, K]."""
    return mask.reshape(-1, 1).expand_as(tile_idx_TK)


class LookupBlock(nn.Module):
    """x + attention(norm(x)), then a sparse lookup layer, which has a norm and a residual of its own.

    Shape:
        x_BTD: float; labels and mask as in SparseLookupFFN, and no token looks at padding -> (x [B, T, D], LookupInfo,
        AuxLosses).

    Raises:
        ValueError: as RotaryAttention and SparseLookupFFN.
    """

    def __init__(self, ffn: SparseLookupFFN, n_heads: int, dropout: float, context_length: int) -> None:
        super().__init__()
        attention = RotaryAttention(ffn.d_model, n_heads, context_length, dropout=dropout)
        self.mixer = MixerResidual(nn.LayerNorm(ffn.d_model), attention, dropout)
        self.ffn = ffn

    def forward(
        self, x_BTD: Tensor, is_causal: bool = True, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LookupInfo, AuxLosses]:
        x_BTD, _, _ = self.mixer(x_BTD, TokenContext(mask_BT=mask, is_causal=is_causal))
        return self.ffn(x_BTD, labels, mask)


class SparseLookupBlock(LookupBlock):
    """A LookupBlock with :class:`SparseLookupFFN`; n_heads and context_length: see RotaryAttention, all others there."""

    def __init__(
        self,
        d_model: int = 128,
        n_heads: int = 4,
        num_tiles: int = 64,
        *,
        dropout: float = 0.1,
        context_length: int = 1024,
        **ffn: Any,
    ) -> None:
        super().__init__(SparseLookupFFN(d_model, num_tiles, dropout=dropout, **ffn), n_heads, dropout, context_length)
