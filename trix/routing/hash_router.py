"""Routing that looks at the token's id alone: the control that knows nothing of the activation."""

import torch
from torch import Tensor

from trix.outputs import RoutingDecision
from trix.routing.base_router import Router

PRIME = 2**31 - 1


class HashRouter(Router):
    """tile[t] = ((a * token[t] + b) mod p) mod E, p = 2^31 - 1, with a and b drawn from ``seed``: one tile, weight 1.

    Source: hash layers, Roller et al., 2021 (arXiv:2106.04426), with the universal hash of Carter and Wegman, 1979, instead of
    their random table, so that it needs no vocabulary size and has no state.

    Shape:
        x_TD float, token_T int64 (ids in [0, p)) -> RoutingDecision; the score is 1 for the chosen tile and 0 for the others.

    Raises:
        ValueError: no token ids, or not one for each row of x.
    """

    def __init__(self, d_model: int, num_tiles: int, seed: int = 0) -> None:
        super().__init__(d_model, num_tiles, top_k=1, balance_rate=0.0)
        factors = torch.randint(1, PRIME, (2,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        self.factor, self.offset = int(factors[0]), int(factors[1])

    def forward(self, x_TD: Tensor, token_T: Tensor | None) -> RoutingDecision:
        self._check_width(x_TD)
        if token_T is None:
            raise ValueError("routing ('hash') needs the id of each token, got None")
        if token_T.shape != x_TD.shape[:1]:
            raise ValueError(f"token ids ({token_T.numel()}) must be one for each of the tokens ({x_TD.shape[0]})")
        tile_idx_TK = ((token_T * self.factor + self.offset) % PRIME % self.num_tiles).unsqueeze(-1)
        score_TE = x_TD.new_zeros(x_TD.shape[0], self.num_tiles).scatter(-1, tile_idx_TK, 1.0)
        return RoutingDecision(tile_idx_TK, score_TE.new_ones(tile_idx_TK.shape), score_TE)
