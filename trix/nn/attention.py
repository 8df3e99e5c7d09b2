"""Self-attention with rotary positions, and with ternary projections by option."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.nn.linear import projection
from trix.nn.mixer import Mixer
from trix.outputs import State, StateSpec, TokenContext

ROTARY_BASE = 10000.0


class RotaryAttention(Mixer):
    """Multi-head scaled dot-product attention; positions enter by rotating queries and keys.

    Source: Su et al., 2021, RoFormer (arXiv:2104.09864), with the halves of a head, not neighbouring pairs, rotated together.

    Args:
        d_model: width; d_model / n_heads must be even. context_length: the longest sequence. ternary: projections are
            :class:`~trix.nn.linear.TriXLinear` instead of float.

    Shape:
        x_BTD: float, T <= context_length -> [B, T, D]. context: no token looks at padding, nor, where it is causal, at later
        tokens. state: keys, rotated to their positions, and values of the P tokens before x, both [B, H, P, W] with H heads
        of width W, P + T <= context_length; x's tokens look at these too. Returns them with x's own added. No phase.

    Raises:
        ValueError: d_model does not divide into heads of even width, P + T > context_length, or a state that comes with a
            mask, without is_causal, or for another batch.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, d_model: int, n_heads: int, context_length: int, ternary: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"d_model ({d_model}) must be divisible by 2 * n_heads ({2 * n_heads})")
        self.n_heads, self.context_length, self.dropout = n_heads, context_length, dropout
        self.qkv = projection(d_model, 3 * d_model, ternary)
        self.out = projection(d_model, d_model, ternary)
        width = d_model // n_heads
        frequency = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)
        cos, sin = angle.cos().to(torch.get_default_dtype()), angle.sin().to(torch.get_default_dtype())
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def state_specs(self) -> tuple[StateSpec, ...]:
        shape = ("batch", self.n_heads, "past", self.cos.shape[1])
        return StateSpec("key", shape), StateSpec("value", shape)

    def forward(
        self, x_BTD: Tensor, context: TokenContext = TokenContext(), state: State | None = None
    ) -> tuple[Tensor, State, None]:
        B, T, D = x_BTD.shape
        P = 0 if state is None else _checked_length(state, x_BTD, context)
        if P + T > self.context_length:
            after = f" after {P} before" if P else ""
            raise ValueError(f"sequence length ({T}{after}) must be <= context_length ({self.context_length})")
        # Queries and keys are rotated as one, and nothing is sliced: each operator counts where one token is generated.
        H = self.n_heads
        heads = self.qkv(x_BTD).reshape(B, T, 3 * H, D // H).transpose(1, 2)
        q_and_k, v = torch.split(heads, [2 * H, H], dim=1)
        q, k = torch.split(self._rotate(q_and_k, P), H, dim=1)
        dropout = self.dropout if self.training else 0.0
        if state is not None:
            k, v = (torch.cat([past.to(new.dtype), new], dim=2) for past, new in zip(state, (k, v), strict=True))
            y, state = _attend(q, k, v, dropout), (k, v)
        else:
            mask_B1TT = None if context.mask_BT is None else _attention_mask(context.mask_BT, context.is_causal)
            y = F.scaled_dot_product_attention(q, k, v, mask_B1TT, dropout, context.is_causal and mask_B1TT is None)
            state = ()
        return self.out(y.transpose(1, 2).reshape(B, T, D)), state, None

    def _rotate(self, x_BHTW: Tensor, start: int) -> Tensor:
        stop = start + x_BHTW.shape[-2]
        cos, sin = self.cos[start:stop].to(x_BHTW.dtype), self.sin[start:stop].to(x_BHTW.dtype)
        first, second = x_BHTW.chunk(2, dim=-1)
        return x_BHTW * cos + torch.cat([second, first], dim=-1) * sin


def _checked_length(state: State, x_BTD: Tensor, context: TokenContext) -> int:
    """P, the number of tokens before."""
    if not context.is_causal or context.mask_BT is not None:
        raise ValueError("with a state, is_causal must be True and mask_BT None")
    if state[0].shape[0] != x_BTD.shape[0]:
        raise ValueError(f"batch of the state ({state[0].shape[0]}) must be that of x ({x_BTD.shape[0]})")
    return state[0].shape[2]


def _attend(q_BHTW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, dropout: float) -> Tensor:
    """Causal attention of the last T of S tokens to all up to their own: [B, H, T, W].

    Written out, as torch's exporter would copy all keys twice for its own function: to transpose and to scale them.
    """
    T, S = q_BHTW.shape[2], k_BHSW.shape[2]
    position = torch.arange(S, device=q_BHTW.device)
    score_BHTS = (q_BHTW * q_BHTW.shape[3] ** -0.5) @ k_BHSW.mT
    score_BHTS = score_BHTS.masked_fill(position > position[S - T :, None], float("-inf"))
    return F.dropout(score_BHTS.softmax(dim=-1), dropout) @ v_BHSW


def _attention_mask(mask_BT: Tensor, is_causal: bool) -> Tensor:
    """bool [B, 1, T, T]: which token (row) looks at which other (column)."""
    T = mask_BT.shape[1]
    mask_B1TT = mask_BT[:, None, None, :].expand(-1, 1, T, T)
    return mask_B1TT.tril() if is_causal else mask_B1TT
