"""Reading the row that each token chose, and what is done with it, in few arrays of tokens x width.

On a CPU a fresh array of that size, which is in no cache, takes longer than the arithmetic on it. So what can be is done in
place, and the rows are looked up again in the backward pass. Every function is differentiable once.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def add_rows(x: Tensor, size: Tensor, rows: Tensor, row_idx: Tensor, mask: Tensor | None = None) -> Tensor:
    """y[t] = x[t] + size[t] * mask[t] * rows[row_idx[t]].

    Args:
        x: float [T, D]. size: float [T]. rows: float [E, D]. row_idx: int64 [T] in [0, E). mask: [T, D] of any dtype, without
            gradient; None for 1.

    Returns:
        [T, D] in the dtype of x; the summand is computed in the promoted dtype of size and rows, and rounded to that of x.
    """
    return _AddRows.apply(x, size, rows, row_idx, mask)  # type: ignore[no-untyped-call]


def hinge_rows(point: Tensor, rows: Tensor, row_idx: Tensor) -> Tensor:
    """m[t] = base + sum_g height_g relu(<slope_g, p[t]> + offset_g), all of them from rows[row_idx[t]].

    Args:
        point: float [T, 2]. rows: float [E, 4 G + 1], a row being G slopes along the first axis, G along the second, G offsets,
            G heights and the base. row_idx: int64 [T] in [0, E).

    Returns:
        [T] in the promoted dtype of point and rows.
    """
    dtype = torch.promote_types(point.dtype, rows.dtype)
    return _HingeRows.apply(point.to(dtype), rows.to(dtype), row_idx)  # type: ignore[no-untyped-call]


# A forward that takes ctx: with setup_context apart, every call inspects its signature, which takes as long as a lookup.
class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, size: Tensor, rows: Tensor, row_idx: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(size, rows, row_idx, mask)  # type: ignore[arg-type]  # None is kept as None
        update = _chosen(rows, row_idx, size).mul_(size.unsqueeze(-1))
        if mask is not None:
            update.mul_(mask)
        return update.add_(x) if update.dtype == x.dtype else x + update.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        size, rows, row_idx, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        buffer = _chosen(rows, row_idx, size).mul_(grad)
        if mask is not None:
            mask = mask.to(buffer.dtype)
            buffer.mul_(mask)
        grad_size = buffer.sum(dim=-1)
        torch.mul(grad.to(buffer.dtype), size.unsqueeze(-1), out=buffer)
        if mask is not None:
            buffer.mul_(mask)
        grad_rows = torch.zeros_like(rows, dtype=buffer.dtype).index_add_(0, row_idx, buffer)
        return grad, grad_size.to(size.dtype), grad_rows.to(rows.dtype), None, None


def _chosen(rows: Tensor, row_idx: Tensor, size: Tensor) -> Tensor:
    return rows.index_select(0, row_idx).to(torch.promote_types(rows.dtype, size.dtype))


class _HingeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, point: Tensor, rows: Tensor, row_idx: Tensor) -> Tensor:
        ctx.save_for_backward(point, rows, row_idx)
        crease, (_, _, _, height, base) = _creases(point, rows.index_select(0, row_idx))
        return crease.relu_().mul_(height).sum(dim=1).add_(base.squeeze(1))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        point, rows, row_idx = ctx.saved_tensors  # type: ignore[attr-defined]
        crease, (first, second, _, height, _) = _creases(point, rows.index_select(0, row_idx))
        grad = grad.unsqueeze(1)
        crease.relu_()
        grad_crease = crease.sign().mul_(height).mul_(grad)
        grad_point = torch.stack([(first * grad_crease).sum(dim=1), (second * grad_crease).sum(dim=1)], dim=1)
        grads = [grad_crease * point[:, :1], grad_crease * point[:, 1:], grad_crease, crease.mul_(grad), grad]
        return grad_point, torch.zeros_like(rows).index_add_(0, row_idx, torch.cat(grads, dim=1)), None


def _creases(point: Tensor, chosen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """<slope_g, p[t]> + offset_g: [T, G], and the five parts of the chosen rows, as views."""
    grid_size = chosen.shape[1] // 4
    parts = torch.split(chosen, [grid_size] * 4 + [1], dim=1)
    first, second, offset, _, _ = parts
    return torch.addcmul(offset, first, point[:, :1]).addcmul_(second, point[:, 1:]), parts
