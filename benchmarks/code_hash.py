"""The hash of the last few characters: the control that partitions contexts without looking at what they are made of."""

import torch
from torch import Tensor

from trix.outputs import RoutingDecision, RowContext
from trix.routing.base_router import Router
from trix.routing.hash_router import HashRouter


class CodeHash(Router):
    """The hash of HashRouter, of a code in place of an id: the 32 bits of the code's first number, which no other code has.

    With ``route_on: context`` and two tokens that is a hash of the pair.

    Shape:
        x_TD: float32 -> RoutingDecision of one tile, weight 1; the score is 1 for it and 0 for the others.
    """

    def __init__(self, d_model: int, num_tiles: int, **settings: object) -> None:
        super().__init__(d_model, num_tiles, balance_rate=0.0)
        self.hash = HashRouter(d_model, num_tiles)
        del settings

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        bits_T = x_TD[:, 0].contiguous().view(torch.int32).long() & 0x7FFFFFFF
        return self.hash(x_TD, context._replace(token_T=bits_T), emergent_ED)
