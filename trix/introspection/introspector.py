"""Read what a model's structure says: signatures, density, routing, and why a token went where it went."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from trix.functional.signatures import pairwise_cosine, redundant_pairs, signature_diversity
from trix.introspection import plots
from trix.introspection.capture import Capture, capture_routing
from trix.nn.ffn import TriXFFN
from trix.nn.routed_layer import RoutedLayer, routed_layers
from trix.nn.ternary_weight import TernaryWeight
from trix.outputs import Directions, RoutingDecision
from trix.routing.balance import tile_load


@dataclass(frozen=True)
class Explanation:
    """Why one token went to its tile.

    token_idx: place of the token in the flattened input. tile_idx: the best tile. chosen: all that it went to, best first (none
    for padding). runner_up_idx: the best that it did not go to (-1 where no other was to be had).
    score, runner_up_score: their scores with the balance bias, the figures that were compared; bias, runner_up_bias: what of
    them is bias. decisive_dims: the dimensions that spoke most for the winner over the runner-up, strongest first;
    contributions: how much each gave, in the unit of the scores. Over all dimensions, contributions and the difference of the
    biases sum to score - runner_up_score.
    """

    token_idx: int
    tile_idx: int
    chosen: list[int]
    runner_up_idx: int
    score: float
    runner_up_score: float
    bias: float
    runner_up_bias: float
    decisive_dims: list[int]
    contributions: list[float]


class TriXIntrospector:
    """Reads a model with routed layers; changes nothing in it.

    Every method takes ``layer``, the index of the routed layer in the order of the model (default 0). ``inputs`` are what the
    model takes, or a :meth:`capture`, so that many questions cost one run; methods that need no inputs read weights alone.

    Args:
        model: any module that holds TriXFFN or SparseLookupFFN layers, or is one. A sparse lookup layer has no perceptrons:
            ``weight_density_map`` and ``sparse_ratio`` do not apply to it.

    Raises:
        ValueError: the model has no routed layers; a layer that does not exist, or to which the question does not apply.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = routed_layers(model)
        if not self.layers:
            raise ValueError("number of routed layers in the model (0) must be >= 1")

    def tile_signatures(self, layer: int = 0) -> Tensor:
        """[E, D] in {-1, 0, +1}."""
        return self._layer(layer).get_tile_signatures()

    def signature_diversity(self, layer: int = 0) -> float:
        """Mean over pairs of tiles of the fraction of positions at which their signatures differ, in [0, 1]."""
        return float(signature_diversity(self.tile_signatures(layer)))

    def signature_similarity_matrix(self, layer: int = 0) -> Tensor:
        """Cosine of each pair of signatures, float [E, E]; 0 with a signature that is all 0."""
        return pairwise_cosine(self.tile_signatures(layer).float())

    def weight_density_map(self, layer: int = 0) -> Tensor:
        """density[e, d] = share of the rows of tile e's first matrix whose weight for input d is not 0: float [E, D]."""
        return self._ternary_weights(layer)[0].codes_and_scale()[0].ne(0).float().mean(dim=1)

    def sparse_ratio(self, layer: int = 0) -> float:
        """Share of zeros among all ternary weights of the layer's tiles, in [0, 1]."""
        codes = [weight.codes_and_scale()[0].flatten() for weight in self._ternary_weights(layer)]
        return float(torch.cat(codes).eq(0).float().mean())

    def consensus_features(self, layer: int = 0) -> Tensor:
        """Mean of the signatures over tiles, float [D] in [-1, 1]: near +-1 where all tiles want the same sign."""
        return self.tile_signatures(layer).float().mean(dim=0)

    def redundant_tiles(self, threshold: float = 0.95, layer: int = 0) -> list[tuple[int, int, float]]:
        """Pairs (i, j, cosine), i < j, of tiles in use whose signatures have a cosine >= threshold; most alike first."""
        return redundant_pairs(self.tile_signatures(layer), threshold, ~self.free_slots(layer))

    def free_slots(self, layer: int = 0) -> Tensor:
        """Which slots no token can go to, as a merger of two tiles left them: bool [E]; none where signatures do not route."""
        return self._layer(layer).free_slots()

    def routing_distribution(self, inputs: Any, layer: int = 0) -> Tensor:
        """Share of the assignments that each tile gets: float [E], sums to 1; those of weight 0 are not counted."""
        decision = self.decision(inputs, layer)
        return tile_load(decision.tile_idx, self._layer(layer).num_tiles, decision.weight)

    def routing_entropy(self, inputs: Any, layer: int = 0) -> float:
        """Entropy of :meth:`routing_distribution`, in nats: log E at equal load, 0 at collapse."""
        return float(torch.special.entr(self.routing_distribution(inputs, layer)).sum())

    @torch.no_grad()
    def routing_stability(self, inputs: Any, noise_level: float = 0.1, layer: int = 0, seed: int = 0) -> float:
        """Share of tokens that keep their best tile when the router's input gets Gaussian noise, in [0, 1]; 1 under a hash,
        NaN where no directions decide.

        Padding is left out; NaN where there is nothing else.

        Args:
            noise_level: deviation of the noise, in standard deviations of the router's input. seed: of the noise.

        Raises:
            ValueError: noise_level < 0.
        """
        if noise_level < 0:
            raise ValueError(f"noise_level ({noise_level}) must be >= 0")
        x_TD, decision = self._captured(inputs, layer)
        if not self._layer(layer).router.reads_stream:
            return 1.0
        directions = self._directions(layer)
        if directions is None:
            return math.nan
        is_counted_T = decision.weight[:, 0] != 0
        x_TD, tile_idx_T = x_TD[is_counted_T], decision.tile_idx[is_counted_T, 0]
        noise = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(seed)).to(x_TD)
        noisy_TE = (x_TD + noise_level * x_TD.std() * noise) @ directions.direction_ED.T + directions.bias_E
        return float((noisy_TE.argmax(dim=-1) == tile_idx_T).float().mean())

    def decision(self, inputs: Any, layer: int = 0) -> RoutingDecision:
        """What the layer's router decides when the model runs on the inputs, tokens flattened."""
        return self._captured(inputs, layer)[1]

    def capture(self, batches: Iterable[Any]) -> Capture:
        """Run the model once on each of the batches, for all layers and all questions; the tokens of the batches in a row.

        Raises:
            ValueError: no batches, or a layer that the model does not run.
        """
        return capture_routing(self.model, self.layers, batches)

    @torch.no_grad()
    def why(self, inputs: Any, layer: int = 0, num_dims: int = 5) -> list[Explanation]:
        """For each token its best tile and the runner-up, the best that it did not go to: their scores, and what decided.

        contribution[d] = x[d] * (s_win[d] / sqrt(nnz_win) - s_runner_up[d] / sqrt(nnz_runner_up))

        Raises:
            ValueError: num_dims < 1, or a layer in which no directions decide, as under a hash.
        """
        if num_dims < 1:
            raise ValueError(f"num_dims ({num_dims}) must be >= 1")
        x_TD, decision = self._captured(inputs, layer)
        directions = self._directions(layer)
        if directions is None:
            kind = type(self._layer(layer).router).__name__
            raise ValueError(f"layer ({layer}) is routed by a {kind}, which has no directions to explain a choice by")
        direction_ED, bias_E = directions
        num_tiles = direction_ED.shape[0]
        order = torch.sort(decision.score + bias_E, dim=-1, descending=True, stable=True)
        is_chosen_TK = decision.weight != 0
        num_chosen_T1 = is_chosen_TK.sum(dim=-1, keepdim=True).clamp_min(1)
        place_T1 = num_chosen_T1.clamp_max(num_tiles - 1)
        rival_score_T = order.values.gather(-1, place_T1).squeeze(-1)
        # Free slots, and what a hierarchical search did not visit, score -inf: they are no runners-up.
        is_alone_T = rival_score_T.isneginf() | (num_chosen_T1.squeeze(-1) == num_tiles)
        best = order.indices[:, 0]
        next_best = torch.where(is_alone_T, best, order.indices.gather(-1, place_T1).squeeze(-1))
        contribution_TD = x_TD * (direction_ED[best] - direction_ED[next_best])
        top = contribution_TD.topk(min(num_dims, x_TD.shape[-1]), dim=-1)
        return [
            Explanation(
                token_idx=t,
                tile_idx=int(best[t]),
                chosen=decision.tile_idx[t, is_chosen_TK[t]].tolist(),
                runner_up_idx=-1 if is_alone_T[t] else int(next_best[t]),
                score=float(order.values[t, 0]),
                runner_up_score=float("-inf") if is_alone_T[t] else float(rival_score_T[t]),
                bias=float(bias_E[best[t]]),
                runner_up_bias=0.0 if is_alone_T[t] else float(bias_E[next_best[t]]),
                decisive_dims=top.indices[t].tolist(),
                contributions=top.values[t].tolist(),
            )
            for t in range(x_TD.shape[0])
        ]

    def plot_signatures(self, layer: int = 0) -> Figure:
        """Tiles by dimensions, the three values in three colours."""
        return plots.signature_heatmap(self.tile_signatures(layer), f"Signatures of layer {layer}")

    def plot_routing_heatmap(self, inputs: Any, layer: int = 0, labels: list[str] | None = None) -> Figure:
        """Tokens by tiles: the softmax of the scores, the chosen tile marked. labels: one per token."""
        decision = self.decision(inputs, layer)
        return plots.routing_heatmap(decision.score.softmax(-1), decision.tile_idx, f"Routing of layer {layer}", labels)

    def _layer(self, layer: int) -> RoutedLayer:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer ({layer}) must be >= 0 and < number of routed layers ({len(self.layers)})")
        return self.layers[layer]

    def _ternary_weights(self, layer: int) -> list[TernaryWeight]:
        routed = self._layer(layer)
        weights = routed.tiles.ternary_weights() if isinstance(routed, TriXFFN) else []
        if not weights:
            raise ValueError(f"layer ({layer}) is a {type(routed).__name__}, whose tiles have no ternary weight matrices")
        return weights

    def _directions(self, layer: int) -> Directions | None:
        routed = self._layer(layer)
        return routed.router.explain(routed.emergent_signatures())

    def _captured(self, inputs: Any, layer: int) -> tuple[Tensor, RoutingDecision]:
        self._layer(layer)
        capture = inputs if isinstance(inputs, Capture) else self.capture([inputs])
        return capture.x_TD[layer], capture.decision[layer]
