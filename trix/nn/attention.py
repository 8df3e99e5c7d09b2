"""Self-attention with rotary positions, and with ternary projections by option."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.nn.linear import TriXLinear

ROTARY_BASE = 10000.0


class RotaryAttention(nn.Module):
    """Multi-head scaled dot-product attention; positions enter by rotating queries and keys.

    Source: Su et al., 2021, RoFormer (arXiv:2104.09864), with the halves of a head, not neighbouring pairs, rotated together.

    Args:
        d_model: width; d_model / n_heads must be even. context_length: the longest sequence. ternary: projections are
            :class:`~trix.nn.linear.TriXLinear` instead of float.

    Shape:
        x_BTD: float, T <= context_length -> [B, T, D]. mask_BT: bool, False for padding, which no token looks at.

    Raises:
        ValueError: d_model does not divide into heads of even width, or T > context_length.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, d_model: int, n_heads: int, context_length: int, ternary: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"d_model ({d_model}) must be divisible by 2 * n_heads ({2 * n_heads})")
        self.n_heads, self.context_length, self.dropout = n_heads, context_length, dropout
        self.qkv = _projection(d_model, 3 * d_model, ternary)
        self.out = _projection(d_model, d_model, ternary)
        width = d_model // n_heads
        frequency = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x_BTD: Tensor, is_causal: bool = True, mask_BT: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        if T > self.context_length:
            raise ValueError(f"sequence length ({T}) must be <= context_length ({self.context_length})")
        q, k, v = self.qkv(x_BTD).reshape(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        q, k = self._rotate(q), self._rotate(k)
        dropout = self.dropout if self.training else 0.0
        mask_B1TT = None if mask_BT is None else _attention_mask(mask_BT, is_causal)
        is_causal = is_causal and mask_B1TT is None
        y = F.scaled_dot_product_attention(q, k, v, mask_B1TT, dropout, is_causal)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def _rotate(self, x_BHTW: Tensor) -> Tensor:
        T = x_BHTW.shape[-2]
        cos, sin = self.cos[:T].to(x_BHTW.dtype), self.sin[:T].to(x_BHTW.dtype)
        first, second = x_BHTW.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _attention_mask(mask_BT: Tensor, is_causal: bool) -> Tensor:
    """bool [B, 1, T, T]: which token (row) looks at which other (column)."""
    T = mask_BT.shape[1]
    mask_B1TT = mask_BT[:, None, None, :].expand(-1, 1, T, T)
    return mask_B1TT.tril() if is_causal else mask_B1TT


def _projection(d_in: int, d_out: int, ternary: bool) -> nn.Module:
    return TriXLinear(d_in, d_out, num_tiles=1) if ternary else nn.Linear(d_in, d_out, bias=False)
