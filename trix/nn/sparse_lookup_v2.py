"""SparseLookupFFNv2: SparseLookupFFN with signatures of its own, which are calibrated, regularised and made for surgery."""

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from trix.functional.penalties import SignaturePenalties, signature_penalties
from trix.functional.signatures import pairwise_cosine
from trix.nn.magnitudes import HingeSplines
from trix.nn.sparse_lookup import LookupBlock, SparseLookupFFN
from trix.outputs import AuxLosses
from trix.routing.balance import check_weights
from trix.routing.calibration import ScoreCalibrationSpline
from trix.routing.router import SIGNATURE_THRESHOLD, SignatureRouter

__all__ = ["ScoreCalibrationSpline", "SparseLookupBlockV2", "SparseLookupFFNv2"]

NEAR = 0.1  # a raw value counts as ternary within this distance of -1, 0 or +1
MAX_ACTIVE = 0.3  # share of active dimensions up to which the sparsity loss is 0
MAX_COSINE = 0.5  # cosine of two raw signatures up to which the diversity loss is 0


class IslandStats(TypedDict):
    """What the signatures have become.

    ternary_fraction: share of raw values within 0.1 of -1, 0 or +1. sparsity: share of zeros in the signatures in force.
    mean_pairwise_similarity: mean cosine of the signatures in force, over pairs of tiles. diversity: 1 - that.
    """

    ternary_fraction: float
    sparsity: float
    mean_pairwise_similarity: float
    diversity: float


class SparseLookupFFNv2(SparseLookupFFN):
    """The winning tile adds its direction to the token, as far as its magnitude net and its score say.

    As :class:`SparseLookupFFN`, with explicit ternary signatures s_e instead of sign(direction_e), a perceptron
    2 -> grid_size -> 1 for each tile instead of the grid spline, and a gate in [0, 1] on the update: the calibrated score of
    the chosen tile. Through the gate the task's gradient reaches signatures and calibration; it never changes which tile is
    chosen.

    Args:
        use_score_calibration: learn the gate's curve; without it the gate is sigmoid(score).
        ternary_weight, sparsity_weight, diversity_weight: weights of the regularisers ``compute_*_loss``; 0 turns one off.
        All others: see SparseLookupFFN.

    Shape, Raises: as SparseLookupFFN.
    """

    calibration: ScoreCalibrationSpline | None

    def __init__(
        self,
        d_model: int = 128,
        num_tiles: int = 64,
        tiles_per_cluster: int = 8,
        grid_size: int = 16,
        *,
        compress_hidden: int | None = None,
        dropout: float = 0.1,
        use_score_calibration: bool = True,
        ternary_weight: float = 0.01,
        sparsity_weight: float = 0.01,
        diversity_weight: float = 0.01,
        balance_weight: float = 0.01,
        balance_rate: float = 0.0,
        num_classes: int | None = None,
        top_k: int = 1,
    ) -> None:
        super().__init__(
            d_model,
            num_tiles,
            tiles_per_cluster,
            grid_size,
            compress_hidden=compress_hidden,
            dropout=dropout,
            balance_weight=balance_weight,
            balance_rate=balance_rate,
            num_classes=num_classes,
            top_k=top_k,
        )
        check_weights(ternary_weight=ternary_weight, sparsity_weight=sparsity_weight, diversity_weight=diversity_weight)
        self.ternary_weight, self.sparsity_weight, self.diversity_weight = ternary_weight, sparsity_weight, diversity_weight
        self.calibration = ScoreCalibrationSpline() if use_score_calibration else None

    @property
    def signatures(self) -> Tensor:
        """The signatures in force, [E, D] in {-1, 0, +1}, with a straight-through gradient to those that are not frozen."""
        return self.router.signatures()

    @property
    def signatures_raw(self) -> nn.Parameter:
        """The values that the signatures are the ternary form of, [E, D]; may be written in place.

        Raises:
            ValueError: the layer is packed.
        """
        if self.router.raw_signatures is None or self.router.packed_signatures is not None:
            raise ValueError("the layer is packed: unpack it before changing its signatures")
        return self.router.raw_signatures

    @property
    def claim_matrix(self) -> Tensor:
        """How many labelled tokens of each class went to each tile since the last reset: int64 [E, C]."""
        return self.claims.count_EC

    @property
    def total_count(self) -> Tensor:
        """How many assignments of tokens to tiles training has counted since the last reset: int64 scalar."""
        return self.usage_E.sum()

    def _make_router(self, balance_rate: float, top_k: int) -> SignatureRouter:
        return SignatureRouter(self.d_model, self.num_tiles, top_k, balance_rate, "explicit")

    def _make_magnitude(self, grid_size: int, ternary_splines: bool) -> HingeSplines:
        del ternary_splines
        return HingeSplines(self.num_tiles, grid_size)

    def emergent_signatures(self) -> None:
        return None

    def _gate(self, score_TK: Tensor) -> Tensor:
        return score_TK.sigmoid() if self.calibration is None else self.calibration(score_TK)

    def _gate_curve(self) -> Tensor:
        if self.calibration is not None:
            return self.calibration.knots()
        dtype = torch.promote_types(self.output_scale.dtype, torch.float32)
        return self.output_scale.new_tensor([0.0, 1.0], dtype=dtype)  # the sigmoid itself

    def _aux_losses(self, score_TE: Tensor, tile_idx_TK: Tensor, mask: Tensor | None) -> AuxLosses:
        aux = super()._aux_losses(score_TE, tile_idx_TK, mask)
        if not self.training or self.router.packed_signatures is not None:
            return aux
        penalties = self._penalties(self.diversity_weight > 0)
        if self.ternary_weight > 0:
            aux["ternary"] = self.ternary_weight * penalties.ternary
        if self.sparsity_weight > 0:
            aux["sparsity"] = self.sparsity_weight * penalties.sparsity
        if self.diversity_weight > 0:
            aux["diversity"] = self.diversity_weight * penalties.diversity
        aux["total_aux"] = aux["balance"] + aux["ternary"] + aux["sparsity"] + aux["diversity"]
        return aux

    def _penalties(self, with_diversity: bool = True) -> SignaturePenalties:
        return signature_penalties(self.router.raw(), SIGNATURE_THRESHOLD, MAX_ACTIVE, MAX_COSINE, with_diversity)

    def compute_ternary_loss(self) -> Tensor:
        """Mean distance of the raw signature values to the nearest of {-1, 0, +1}: in [0, 0.5] for values in [-1.5, 1.5]."""
        return self._penalties().ternary

    def compute_sparsity_loss(self) -> Tensor:
        """mean_e relu(nnz_e - 0.3 D) / D with the smooth count nnz_e = sum_d (1 + c^2) v_ed^2 / (v_ed^2 + c^2), c = 0.3.

        The count is exact for v in {-1, 0, +1}, and its gradient is greatest near the threshold where a value becomes active.
        """
        return self._penalties().sparsity

    def compute_diversity_loss(self) -> Tensor:
        """Mean over pairs of tiles of relu(cosine of the raw signatures - 0.5): in [0, 0.5]; 0 for a single tile."""
        return self._penalties().diversity

    @torch.no_grad()
    def get_island_stats(self) -> IslandStats:
        raw_ED, signature_ED = self.get_raw_signatures(), self.get_tile_signatures()
        similarity = float(_mean_over_pairs(pairwise_cosine(signature_ED)))
        size_ED = raw_ED.abs()
        is_near_ED = torch.minimum(size_ED, (size_ED - 1.0).abs()) <= NEAR
        return {
            "ternary_fraction": float(is_near_ED.float().mean()),
            "sparsity": float((signature_ED == 0).float().mean()),
            "mean_pairwise_similarity": similarity,
            "diversity": 1.0 - similarity,
        }


def _mean_over_pairs(value_EE: Tensor) -> Tensor:
    """Mean above the diagonal; 0 for a single tile."""
    num_tiles = len(value_EE)
    return value_EE.triu(1).sum() / max(num_tiles * (num_tiles - 1) // 2, 1)


class SparseLookupBlockV2(LookupBlock):
    """A LookupBlock with :class:`SparseLookupFFNv2`; n_heads and context_length: see RotaryAttention, all others there."""

    ffn: SparseLookupFFNv2

    def __init__(
        self,
        d_model: int = 128,
        n_heads: int = 4,
        num_tiles: int = 64,
        *,
        tiles_per_cluster: int = 8,
        grid_size: int = 16,
        compress_hidden: int | None = None,
        dropout: float = 0.1,
        use_score_calibration: bool = True,
        ternary_weight: float = 0.01,
        sparsity_weight: float = 0.01,
        diversity_weight: float = 0.01,
        context_length: int = 1024,
        **ffn: Any,
    ) -> None:
        layer = SparseLookupFFNv2(
            d_model,
            num_tiles,
            tiles_per_cluster,
            grid_size,
            compress_hidden=compress_hidden,
            dropout=dropout,
            use_score_calibration=use_score_calibration,
            ternary_weight=ternary_weight,
            sparsity_weight=sparsity_weight,
            diversity_weight=diversity_weight,
            **ffn,
        )
        super().__init__(layer, n_heads, dropout, context_length)
