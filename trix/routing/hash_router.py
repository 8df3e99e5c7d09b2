"""Routing that looks at the token's id alone: the control that knows nothing of the activation."""

import torch
from torch import Tensor

from trix.outputs import RoutingDecision, RowContext
from trix.routing.base_router import Router
from trix.routing.router import UNHEEDED

PRIME = 2**31 - 1


class HashRouter(Router):
    """tile[t] = ((a * token[t] + b) mod p) mod E, p = 2^31 - 1, with a and b drawn from ``seed``: one tile, weight 1.

    Source: hash layers, Roller et al., 2021 (arXiv:2106.04426), with the universal hash of Carter and Wegman, 1979, instead of
    their random table, so that it needs no vocabulary size and has no state. Over the seeds two ids share a tile once in E; a
    single seed may still spread consecutive ids unevenly. Seed 0, the default, spreads them well for all E up to 64.

    Shape:
        x_TD float; of the context token_T, ids in [0, p) -> RoutingDecision; the score is 1 for the chosen tile and 0 for the
        others.

    Raises:
        ValueError: more than one tile per token is asked for; no token ids, or not one for each row of x.
    """

    reads = frozenset({"token"})
    reads_stream = False

    def __init__(
        self,
        d_model: int,
        num_tiles: int,
        seed: int = 0,
        *,
        top_k: int = 1,
        max_k: int | None = None,
        balance_rate: float = 0.0,
        confidence_threshold: float = 0.3,
    ) -> None:
        del balance_rate, confidence_threshold  # it neither balances nor hesitates
        if top_k != 1 or max_k is not None:
            raise ValueError(f"top_k ({top_k}) must be 1 and max_k ({max_k}) None under routing ('hash')")
        super().__init__(d_model, num_tiles, balance_rate=0.0)
        factors = torch.randint(1, PRIME, (2,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        self.factor, self.offset = int(factors[0]), int(factors[1])

    def describe(self) -> str:
        return f"A hash of the token's id chooses the tile; {UNHEEDED}"

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        del emergent_ED
        token_T = context.token_T
        self._check_width(x_TD)
        if token_T is None:
            raise ValueError("routing ('hash') needs the id of each token, got None")
        if token_T.shape != x_TD.shape[:1]:
            raise ValueError(f"token ids ({token_T.numel()}) must be one for each of the tokens ({x_TD.shape[0]})")
        tile_idx_TK = ((token_T * self.factor + self.offset) % PRIME % self.num_tiles).unsqueeze(-1)
        score_TE = x_TD.new_zeros(x_TD.shape[0], self.num_tiles).scatter(-1, tile_idx_TK, 1.0)
        return RoutingDecision(tile_idx_TK, score_TE.new_ones(tile_idx_TK.shape), score_TE)
