"""The mixer of the ResNet-BK language model: a resolvent with a potential that depends on the position."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trix.nn.recurrent_mixer import Hops
from trix.nn.resolvent_mixer import ETA_MIN, ResolventMixer
from trix.outputs import State, StateSpec
from trix.resnet_bk.potential import PrimeBumpPotential

MAX_ETA_FLOOR = 0.1


@lru_cache(maxsize=8)
def _bump(n_seq: int, epsilon: float, k_max: int) -> Tensor:
    """The fixed potential, which all layers share."""
    with torch.device("cpu"):
        return PrimeBumpPotential(n_seq, epsilon, k_max).values()


class BirmanSchwingerMixer(ResolventMixer):
    """:class:`~trix.nn.ResolventMixer` with a fixed potential, a limit on all potentials, and a floor under eta, by option.

    Args:
        context_length: longest sequence, n_seq below.
        prime_bump_scale: factor of :class:`~trix.resnet_bk.PrimeBumpPotential`, added to each token's energy by its position;
            0: none. epsilon, k_max: see there.
        schatten_threshold: |v_i| <= schatten_threshold * eta_i / n_seq for the potential v_i of each token, its energy less the
            mean one: then the trace norm of the Birman-Schwinger operator of n_seq tokens is at most schatten_threshold
            [theorem]. Causal, for it is one rule per token. None: no limit.
        use_lap: eta_min is at least epsilon / n_seq (up to 0.1): the limiting absorption principle speaks of an eta above the
            distance of the levels, which is of the order of 1 / n_seq.
        mixer: all others of ResolventMixer.

    Raises:
        ValueError: no context_length, schatten_threshold <= 0 or infinite, and as PrimeBumpPotential and ResolventMixer; by a
            forward, more than n_seq tokens.
    """

    bump_N: Tensor

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        context_length: int | None = None,
        ternary: bool = False,
        dropout: float = 0.0,
        *,
        prime_bump_scale: float = 0.0,
        epsilon: float = 1.0,
        k_max: int = 3,
        schatten_threshold: float | None = None,
        use_lap: bool = False,
        **mixer: Any,
    ) -> None:
        if context_length is None:
            raise ValueError("context_length (None) must be given: the potential and the limits on it depend on it")
        if schatten_threshold is not None and not 0 < schatten_threshold < math.inf:
            raise ValueError(f"schatten_threshold ({schatten_threshold}) must be > 0 and finite, or None for no limit")
        if use_lap:
            mixer["eta_min"] = max(mixer.get("eta_min", ETA_MIN), min(epsilon / context_length, MAX_ETA_FLOOR))
        super().__init__(d_model, n_heads, context_length, ternary, dropout, **mixer)
        self.context_length, self.schatten_threshold = context_length, schatten_threshold
        bump_N = torch.zeros(context_length)
        if prime_bump_scale:
            bump_N = bump_N + prime_bump_scale * _bump(context_length, epsilon, k_max).to(bump_N)
        self.register_buffer("bump_N", bump_N, persistent=False)

    def hop_specs(self) -> tuple[StateSpec, ...]:
        """Those of ResolventMixer, and the number of tokens before."""
        return *super().hop_specs(), StateSpec("position", ("batch", 1))

    def hops(self, dynamics_BHT: tuple[Tensor, ...], is_token_B1T: Tensor | None, state: State) -> Hops:
        energy, eta, hop = dynamics_BHT
        position_BT = self._positions(energy, is_token_B1T)
        if state:
            position_BT = position_BT + state[-1].to(torch.int64)
        self._check_length(position_BT, bool(state))
        bump_BT = self.bump_N.to(energy.dtype)[position_BT]
        if self.schatten_threshold is not None:
            mean = torch.split(self.dynamics.bias.to(energy.dtype), self.n_heads)[0][:, None]
            limit = self.schatten_threshold / self.context_length * self._operator(energy, eta, hop)[1]
            energy = mean + torch.clamp(energy - mean + bump_BT[:, None], -limit, limit)
        else:
            energy = energy + bump_BT[:, None]
        hops = super().hops((energy, eta, hop), is_token_B1T, state[:-1])
        return hops._replace(state=(*hops.state, (position_BT[:, -1:] + 1).to(energy.dtype)))

    def _check_length(self, position_BT: Tensor, is_later: bool) -> None:
        length = position_BT.shape[1]
        if is_later and not torch.compiler.is_compiling() and position_BT.numel():
            length = int(position_BT.max()) + 1
        if length > self.context_length:
            raise ValueError(f"sequence length ({length}) must be <= context_length ({self.context_length})")

    def _positions(self, like_BHT: Tensor, is_token_B1T: Tensor | None) -> Tensor:
        """The place of each token in its text: int64 [B, T]."""
        if is_token_B1T is not None:
            return (is_token_B1T[:, 0].cumsum(-1) - 1).clamp_min(0)
        B, _, T = like_BHT.shape
        return torch.arange(T, device=like_BHT.device).expand(B, T)
