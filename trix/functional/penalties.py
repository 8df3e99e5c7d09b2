"""What raw signatures are regularised by, all three at once, each with its gradient in closed form.

The values are small and the operations many: written with autograd, their dispatch takes longer than the lookup of all tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

PAIR_BLOCK = 256  # rows compared at once


class SignaturePenalties(NamedTuple):
    """Scalars; see :func:`signature_penalties`."""

    ternary: Tensor
    sparsity: Tensor
    diversity: Tensor


def signature_penalties(
    raw: Tensor, threshold: float, max_active: float, max_cosine: float, with_diversity: bool = True
) -> SignaturePenalties:
    """Of the raw signatures v, float [E, D]; differentiable once.

    ternary = mean distance of v_ed to the nearest of {-1, 0, +1};
    sparsity = mean_e relu(mean_d (1 + c^2) v_ed^2 / (v_ed^2 + c^2) - max_active), c = threshold;
    diversity = mean over pairs i < j of relu(cos(v_i, v_j) - max_cosine), 0 for a single one, or without ``with_diversity``.
    """
    values = _Penalties.apply(raw, threshold, max_active, max_cosine, with_diversity)  # type: ignore[no-untyped-call]
    return SignaturePenalties(*values.unbind())


class _Penalties(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, raw: Tensor, threshold: float, max_active: float, max_cosine: float, with_diversity: bool
    ) -> Tensor:
        grads = raw.new_zeros(3, *raw.shape)
        values = [
            _ternary(raw, grads[0]),
            _sparsity(raw, threshold**2, max_active, grads[1]),
            _diversity(raw, max_cosine, grads[2]) if with_diversity else raw.new_zeros(()),
        ]
        ctx.save_for_backward(grads)
        return torch.stack(values)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grads,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad @ grads.flatten(1)).reshape(grads.shape[1:]), None, None, None, None


def _ternary(raw: Tensor, grad: Tensor) -> Tensor:
    off = raw - raw.round().clamp_(-1.0, 1.0)
    torch.sign(off, out=grad).div_(raw.numel())
    return off.abs_().mean()


def _sparsity(raw: Tensor, width: float, max_active: float, grad: Tensor) -> Tensor:
    # (1 + w) v^2 / (v^2 + w) = (1 + w) (1 - inactive), inactive = w / (v^2 + w), whose slope is -2 v inactive^2 / w.
    inactive = width / raw.square().add_(width)
    excess = ((1.0 + width) * (1.0 - inactive.mean(dim=1, keepdim=True)) - max_active).clamp_min_(0.0)
    slope = excess.sign() * ((1.0 + width) * 2.0 / (width * raw.numel()))
    torch.mul(inactive.square_(), raw, out=grad).mul_(slope)
    return excess.mean()


def _diversity(raw: Tensor, max_cosine: float, grad: Tensor) -> Tensor:
    num_pairs = max(len(raw) * (len(raw) - 1) // 2, 1)
    norm = torch.linalg.vector_norm(raw, dim=1, keepdim=True).clamp_min_(torch.finfo(raw.dtype).tiny)
    unit = raw / norm
    total = _pair_excess(unit, max_cosine, grad)
    # Only what is at right angles to a row turns it.
    along = (grad * unit).sum(dim=1, keepdim=True)
    grad.addcmul_(unit, along, value=-1.0).div_(norm * num_pairs)
    return total / num_pairs


def _pair_excess(unit: Tensor, limit: float, grad: Tensor) -> Tensor:
    """sum_{i < j} relu(<u_i, u_j> - limit); its gradient is added to ``grad``.

    Block by block: no E x E matrix is built, most products below the diagonal are left out, and a block without a pair above
    the limit, as most are, costs nothing for the gradient.
    """
    total = unit.new_zeros(())
    for start in range(0, len(unit), PAIR_BLOCK):
        block, others = unit[start : start + PAIR_BLOCK], unit[start:]
        excess = (block @ others.T).sub_(limit).clamp_min_(0.0).triu_(1)
        block_total = excess.sum()
        if not torch.compiler.is_compiling() and block_total.device.type == "cpu" and block_total == 0:
            continue
        total += block_total
        is_above = excess.sign_()
        grad[start : start + PAIR_BLOCK] += is_above @ others
        grad[start:] += is_above.T @ block
    return total
