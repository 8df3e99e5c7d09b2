"""Routing by the phase of the mixer's resolvent: no parameters, and edges that learn where the phases lie."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from trix.functional.phase import nearest_tiles, place_score
from trix.functional.tile_matmul import select_top_k
from trix.outputs import RoutingDecision, RowContext
from trix.routing.balance import summed_over_processes, tile_count
from trix.routing.base_router import Router
from trix.routing.facts import moved

EVEN_SHARE = 0.05  # of the counted tokens, spread over all bins, so that no bin is empty
EVEN_EDGES = 1e-3  # of an edge's target, from equal bins, so that no bin is narrower than this part of an equal one


class ScatteringRouter(Router):
    """Send each token to the K tiles next to its phase.

    The phase is cut into E bins by ``edge``, E - 1 inner edges between 0 and pi, equal ones at first. With the place
    u = bin + position within the bin in [0, 1], which is E * phase / pi for equal bins:
    score[t, e] = -(u_t - (e + 1/2))^2 / (2 * 0.75^2); the tiles are the K nearest to u; weight = softmax of their scores.

    Equal bins can collapse: phases that lie close together load K tiles of E. So the edges follow the quantiles of the phases:
    after each training batch they go ``edge_rate`` of the way to where linear interpolation of the batch's counts per bin puts
    equal loads. They are a buffer: stored, averaged with the weights, still in evaluation. Measured, with E = 8, K = 2 and
    phases of 1 / (v - i), v ~ N(0, .02): the entropy of the load is .33 of ln E for equal bins, .99 after 150 batches.

    Theorem: a token's tiles depend on its own phase alone. Measured: they are the same bits in every prefix and batch row, by
    operations that round alike in every place of a row. The gradient reaches the phase through the weights, with
    du/dphase = 1 / width of the bin, at most 1000 E / pi. With top_k = 1 the weight is 1, without a gradient.

    Args:
        edge_rate: step of the edges per training batch, in [0, 1]; 0 keeps equal bins.
        max_k, confidence_threshold: adaptive k by the gap of the scores, as in :class:`~trix.routing.base_router.Router`.
        balance_rate: ignored; the choice has no bias.

    Shape:
        x_TD float; of the context phase_T, radians in (0, pi) -> RoutingDecision in the dtype of the phase, at least float32.

    Raises:
        ValueError: edge_rate outside [0, 1]; no phases, or not one for each row of x; by load_state_dict, edges that do not
            rise from 0 to pi; and as Router.

    Source: the routing by arg G of ResNet-BK, with edges that are learned.
    """

    reads = frozenset({"phase"})
    edge: Tensor

    def __init__(
        self,
        d_model: int,
        num_tiles: int,
        top_k: int = 1,
        balance_rate: float = 0.0,
        *,
        edge_rate: float = 0.1,
        **settings: Any,
    ) -> None:
        del balance_rate
        super().__init__(d_model, num_tiles, top_k, balance_rate=0.0, **settings)
        if not 0.0 <= edge_rate <= 1.0:
            raise ValueError(f"edge_rate ({edge_rate}) must be >= 0 and <= 1")
        self.edge_rate = edge_rate
        self.register_buffer("edge", self._equal_edges().to(self.balance_bias.dtype))

    def _equal_edges(self) -> Tensor:
        return torch.arange(1, self.num_tiles, dtype=torch.float64) * (math.pi / self.num_tiles)

    def describe(self) -> str:
        return "The phase of the mixer's resolvent chooses the tiles, by edges that follow its quantiles in training."

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        del emergent_ED
        phase_T = context.phase_T
        self._check_width(x_TD)
        if phase_T is None:
            raise ValueError("routing ('scattering') needs the phase of each token, got None")
        if phase_T.shape != x_TD.shape[:1]:
            raise ValueError(f"phases ({phase_T.numel()}) must be one for each of the tokens ({x_TD.shape[0]})")
        place_T = self.place(phase_T.to(torch.promote_types(phase_T.dtype, torch.float32)))
        tile_idx_TK = nearest_tiles(place_T, self.num_tiles, self.top_k)
        order_TK = select_top_k(place_score(place_T.detach(), tile_idx_TK), self.top_k)  # best first
        score_TE = place_score(place_T, torch.arange(self.num_tiles, device=phase_T.device))
        return self._decide(score_TE, tile_idx_TK.gather(-1, order_TK))

    def place(self, phase_T: Tensor) -> Tensor:
        """u in [0, E] of phases in [0, pi]: the bin, and the position within it."""
        edge = self.edge.to(phase_T.dtype)
        bin_T = (phase_T.detach().unsqueeze(-1) >= edge).sum(dim=-1)
        bound = _with_ends(edge)
        low_T, high_T = bound[bin_T], bound[bin_T + 1]
        return bin_T + (phase_T - low_T) / (high_T - low_T)

    def _gate(self, score_TE: Tensor, tile_idx_TK: Tensor) -> Tensor:
        return score_TE.gather(-1, tile_idx_TK).softmax(dim=-1)

    @torch.no_grad()
    def _nudge(self, tile_idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor | None:
        """The tokens in each bin, which is that of their best tile: [E]."""
        if self.edge_rate == 0:
            return None
        best_weight_T = None if weight_TK is None else weight_TK[:, 0]
        return summed_over_processes(tile_count(tile_idx_TK[:, 0], self.num_tiles, best_weight_T))

    @torch.no_grad()
    def _after(self, num_batches: int, nudge_E: Tensor | None) -> dict[str, Tensor]:
        if nudge_E is None:
            return {}
        rate = 1.0 - (1.0 - self.edge_rate) ** num_batches
        return {"edge": self.edge + rate * (self._target(nudge_E) - self.edge)}

    def _target(self, count_E: Tensor) -> Tensor:
        """The edges that would give each bin the same count, if the phases lay evenly within the present bins: [E - 1]."""
        edge = self.edge
        share_E = count_E.to(edge.dtype)
        share_E = share_E + (EVEN_SHARE * share_E.sum() / self.num_tiles).clamp_min(1.0 / self.num_tiles)
        reached = torch.cat([share_E.new_zeros(1), share_E.cumsum(0) / share_E.sum()])
        aim = torch.arange(1, self.num_tiles, dtype=edge.dtype, device=edge.device) / self.num_tiles
        bin_idx = torch.searchsorted(reached, aim, right=True).clamp(1, self.num_tiles) - 1
        bound = _with_ends(edge)
        position = (aim - reached[bin_idx]) / (reached[bin_idx + 1] - reached[bin_idx])
        quantile = bound[bin_idx] + position * (bound[bin_idx + 1] - bound[bin_idx])
        return quantile + EVEN_EDGES * (self._equal_edges().to(edge) - quantile)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        edge = self.edge
        super()._apply(fn, recurse)
        self.edge = self.edge if edge.is_meta else moved(edge, self.edge)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        edge = state_dict.get(prefix + "edge")
        if edge is not None and not edge.is_meta and edge.shape == self.edge.shape:  # torch refuses another shape
            is_rising = _with_ends(edge.double()).diff() > 0  # which is false next to NaN
            if not bool(is_rising.all()):
                raise ValueError(f"edges ({edge.tolist()}) must rise from 0 to pi")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, edge_rate={self.edge_rate}"


def _with_ends(edge: Tensor) -> Tensor:
    """The bounds of all bins: 0, the inner edges, pi."""
    return torch.cat([edge.new_zeros(1), edge, edge.new_full((1,), math.pi)])
