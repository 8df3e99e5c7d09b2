"""The frame of a mixer with a state of fixed size: short convolution, complex linear recurrence, skip, norm and gate."""

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.autocast import without_autocast
from trix.functional.resolvent import Pair
from trix.functional.resolvent_mix import resolvent_mix
from trix.nn.linear import projection
from trix.nn.mixer import Mixer
from trix.outputs import State, StateSpec, TokenContext

NORM_EPS = 1e-5


def softplus_spread(start: tuple[float, float], n_heads: int) -> Tensor:
    """b [H] with softplus(b_h) from start[0] to start[1], in equal ratios from head to head."""
    return torch.logspace(math.log10(start[0]), math.log10(start[1]), n_heads).expm1().log()


class Hops(NamedTuple):
    """The recurrence of each head: S_i = G_i (k_i (x) scale_in_i u_i - c_i S_{i-1}), y_i = scale_out_i Re(turn q_i S_i).

    G, c: [B, H, T]. scale_in, scale_out: float [B, H, T], scale_out None for 1. turn: [H, 1, 1], None for 1. state: what the
    next call needs of it besides S.
    """

    G: Pair
    c: Pair
    scale_in: Tensor
    scale_out: Tensor | None = None
    turn: Pair | None = None
    state: State = ()


class RecurrentMixer(Mixer):
    """W_o (norm(y + skip u) * silu(gate)), with u, q, k = silu(conv(W_i x)) and y of a recurrence over the tokens.

    y_i = Re sum_{j<=i} L_ij (q_i . k_j) u_j per head, L of :class:`Hops`; q and k are shared by the heads. The norm is an
    RMSNorm per head. Its state does not grow: reading a text costs O(T), writing the next token O(1).

    Source: the frame of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), with the norm per head and before the gate.

    Args:
        d_model: width, divisible by n_heads. context_length: not used, there is no longest sequence. ternary: W_i and W_o
            are :class:`~trix.nn.linear.TriXLinear`. dropout: not used.
        d_state: width of a query; 0 is the vector state, y_i = sum_j L_ij u_j, in which no query weighs the past.
        conv_width: tokens that the convolution sees, the token itself the last.
        expand: width of u over d_model, as in Mamba-2; there are expand * n_heads heads of width d_model / n_heads.

    Shape:
        x_BTD: float, T >= 1 -> [B, T, D]. context: padding on the left or right changes no other token; within a text,
        conv_width - 1 padding tokens in a row part it into two. state: see :meth:`state_specs`; complex parts have a last axis
        of real and imaginary part.

    Raises:
        ValueError: d_model not divisible by n_heads, d_state < 0, conv_width or expand < 1, no token, x of another width or
            dtype than the weights', or a state that comes with a mask or for another batch.
    """

    is_causal_only: ClassVar[bool] = True

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
        num_dynamics: int,
    ) -> None:
        super().__init__()
        del context_length, dropout
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model ({d_model}) must be divisible by n_heads ({n_heads})")
        if d_state < 0:
            raise ValueError(f"d_state ({d_state}) must be >= 0")
        if conv_width < 1:
            raise ValueError(f"conv_width ({conv_width}) must be >= 1")
        if expand < 1:
            raise ValueError(f"expand ({expand}) must be >= 1")
        self.d_model, self.d_state, self.conv_width = d_model, d_state, conv_width
        self.n_heads, self.d_inner = expand * n_heads, expand * d_model
        self.num_channels = self.d_inner + 2 * d_state
        self.in_proj = projection(d_model, self.d_inner + self.num_channels, ternary)
        self.conv = nn.Conv1d(self.num_channels, self.num_channels, conv_width, groups=self.num_channels)
        self.dynamics = nn.Linear(d_model, num_dynamics * self.n_heads)
        self.skip = nn.Parameter(torch.ones(self.n_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = projection(self.d_inner, d_model, ternary)

    @abstractmethod
    def hop_specs(self) -> tuple[StateSpec, ...]:
        """What :attr:`Hops.state` holds."""

    @abstractmethod
    def hops(self, dynamics_BHT: tuple[Tensor, ...], is_token_B1T: Tensor | None, state: State) -> Hops:
        """The recurrence for these dynamics, one tensor for each of num_dynamics. Where is_token is False, c is 0. state: what
        :meth:`hop_specs` names, or () before the first token."""

    def phase(self, hops: Hops) -> Tensor | None:  # noqa: ARG002
        """What a router may read of each token, [B, T]."""
        return None

    def state_specs(self) -> tuple[StateSpec, ...]:
        width = self.d_inner // self.n_heads
        carry = (width,) if self.d_state == 0 else (self.d_state, width)
        conv = StateSpec("conv", ("batch", self.num_channels, self.conv_width - 1))
        return conv, StateSpec("carry", ("batch", self.n_heads, *carry, 2)), *self.hop_specs()

    def forward(
        self, x_BTD: Tensor, context: TokenContext = TokenContext(), state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        mask_BT = context.mask_BT
        self._check_input(x_BTD)
        if state is not None:
            if mask_BT is not None:
                raise ValueError("with a state, mask_BT must be None")
            if state[0].shape[0] != x_BTD.shape[0]:
                raise ValueError(f"batch of the state ({state[0].shape[0]}) must be that of x ({x_BTD.shape[0]})")
        gate_BTI, channels_BTC = torch.split(self.in_proj(x_BTD), [self.d_inner, self.num_channels], dim=-1)
        is_token_BT1 = None if mask_BT is None else mask_BT[..., None]
        if is_token_BT1 is not None:
            channels_BTC = channels_BTC * is_token_BT1
        conv_state, carry, hop_state = (None, None, ()) if state is None else (state[0], state[1], state[2:])
        channels_BTC, conv_state = self._convolve(channels_BTC, conv_state)
        if is_token_BT1 is not None:
            channels_BTC = channels_BTC * is_token_BT1  # the convolution's bias
        with without_autocast(x_BTD):
            hops = self.read_hops(x_BTD, mask_BT, hop_state)
            y_BHTP, carry = self._recur(hops, channels_BTC.to(hops.scale_in.dtype), carry)
        y_BTI = y_BHTP.transpose(1, 2).reshape(gate_BTI.shape).to(gate_BTI.dtype) * self.norm_weight
        update_BTD = self.out_proj(y_BTI * F.silu(gate_BTI))
        return update_BTD, () if state is None else (conv_state, carry, *hops.state), self.phase(hops)

    def _check_input(self, x_BTD: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.d_model:
            raise ValueError(f"x {tuple(x_BTD.shape)} must be [batch, sequence, d_model ({self.d_model})]")
        if x_BTD.shape[1] == 0:
            raise ValueError(f"sequence length ({x_BTD.shape[1]}) must be >= 1")
        dtype = self.conv.weight.dtype
        # autocast makes one dtype of both, but not of float64
        is_cast = torch.is_autocast_enabled(x_BTD.device.type) and torch.float64 not in (x_BTD.dtype, dtype)
        if x_BTD.dtype != dtype and not (is_cast and x_BTD.is_floating_point()):
            raise ValueError(f"dtype of x ({x_BTD.dtype}) must be that of the weights ({dtype})")

    def read_hops(self, x_BTD: Tensor, mask_BT: Tensor | None = None, state: State = ()) -> Hops:
        """The recurrence that these tokens make, in at least float32: in 16 bits a decay of 0.999 is 1."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        dynamics_BTC = F.linear(x_BTD.to(dtype), self.dynamics.weight.to(dtype), self.dynamics.bias.to(dtype))
        dynamics_BHT = torch.split(dynamics_BTC.transpose(1, 2).contiguous(), self.n_heads, dim=1)
        return self.hops(dynamics_BHT, None if mask_BT is None else mask_BT[:, None], state)

    def _recur(self, hops: Hops, channels_BTC: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised answer of each head [B, H, T, P], and the new carry."""
        u_BHTP, q_B1TN, k_B1TN = self._split(channels_BTC)
        first = None if carry is None else Pair(*carry.to(u_BHTP.dtype).unbind(-1))
        y, last = resolvent_mix(hops.G, hops.c, u_BHTP * hops.scale_in[..., None], first, q=q_B1TN, k=k_B1TN)
        y_BHTP = y.re if hops.turn is None else y.re * hops.turn.re - y.im * hops.turn.im
        if hops.scale_out is not None:
            y_BHTP = y_BHTP * hops.scale_out[..., None]
        y_BHTP = F.rms_norm(y_BHTP + u_BHTP * self.skip[:, None, None], y_BHTP.shape[-1:], eps=NORM_EPS)
        return y_BHTP, torch.stack(last, dim=-1)

    def _convolve(self, channels_BTC: Tensor, before_BCW: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv) [B, T, C], and the last conv_width - 1 inputs [B, C, W]."""
        channels_BCT = channels_BTC.transpose(1, 2)
        if before_BCW is None:
            padded_BCS = F.pad(channels_BCT, (self.conv_width - 1, 0))
        else:
            padded_BCS = torch.cat([before_BCW.to(channels_BCT.dtype), channels_BCT], dim=-1)
        last_BCW = padded_BCS[..., padded_BCS.shape[-1] - self.conv_width + 1 :]
        return F.silu(self.conv(padded_BCS)).transpose(1, 2), last_BCW

    def _split(self, channels_BTC: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        B, T, _ = channels_BTC.shape
        u_BTI, q_BTN, k_BTN = torch.split(channels_BTC, [self.d_inner, self.d_state, self.d_state], dim=-1)
        u_BHTP = u_BTI.reshape(B, T, self.n_heads, self.d_inner // self.n_heads).transpose(1, 2)
        return (u_BHTP, q_BTN[:, None], k_BTN[:, None]) if self.d_state else (u_BHTP, None, None)
