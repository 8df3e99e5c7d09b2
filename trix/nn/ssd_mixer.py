"""The recurrence of Mamba-2, in the frame of the resolvent mixer: its baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.resolvent import Pair
from trix.nn.recurrent_mixer import Hops, RecurrentMixer, softplus_spread
from trix.outputs import State, StateSpec

STEP_START = (1e-3, 1e-1)  # of the heads' Delta, as in Mamba-2
RATE_START = (1.0, 16.0)  # of the heads' a, as in Mamba-2


class SSDMixer(RecurrentMixer):
    """S_i = exp(-Delta_i a) S_{i-1} + k_i (x) Delta_i u_i, y_i = q_i S_i, with Delta_i = softplus(.).

    Source: Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060). It is the resolvent's one-way member with alpha = 1 and
    c_i = -exp(-Delta_i a), so G = 1.

    Args, shapes and errors: see :class:`~trix.nn.recurrent_mixer.RecurrentMixer`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        context_length: int | None = None,
        ternary: bool = False,
        dropout: float = 0.0,
        *,
        d_state: int = 16,
        conv_width: int = 4,
        expand: int = 1,
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            context_length,
            ternary,
            dropout,
            d_state=d_state,
            conv_width=conv_width,
            expand=expand,
            num_dynamics=1,
        )
        self.log_rate = nn.Parameter(torch.linspace(RATE_START[0], RATE_START[1], self.n_heads).log())
        with torch.no_grad():
            self.dynamics.bias.copy_(softplus_spread(STEP_START, self.n_heads))

    def hop_specs(self) -> tuple[StateSpec, ...]:
        return ()

    def hops(self, dynamics_BHT: tuple[Tensor, ...], is_token_B1T: Tensor | None, state: State) -> Hops:
        del state
        step = F.softplus(dynamics_BHT[0])
        decay = torch.exp(-step * self.log_rate.to(step.dtype).exp()[:, None])
        if is_token_B1T is not None:
            decay = decay * is_token_B1T
        zero = torch.zeros_like(step)
        return Hops(Pair(torch.ones_like(step), zero), Pair(-decay, zero), step)
