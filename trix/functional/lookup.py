"""Adding to each token a multiple of a row that it chose, with as few arrays of tokens x width as it takes."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def add_rows(x: Tensor, size: Tensor, rows: Tensor, row_idx: Tensor, factors: Tensor | None = None) -> Tensor:
    """y[t] = x[t] + factors[t] * size[t] * rows[row_idx[t]].

    Args:
        x: float [T, D]. size: float [T]. rows: float [E, D]. row_idx: int64 [T] in [0, E). factors: [T, D] without gradient, such
            as those of dropout; None for 1.

    Returns:
        [T, D] in the dtype of x; the summand is computed in the promoted dtype of size and rows, and rounded to that of x.

    On a CPU a fresh array of this size costs more, in pages to be mapped, than the arithmetic on it: so what can be is done in
    place, and the chosen rows are looked up again in the backward pass.
    """
    return _AddRows.apply(x, size, rows, row_idx, factors)  # type: ignore[no-untyped-call]


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, size: Tensor, rows: Tensor, row_idx: Tensor, factors: Tensor | None) -> Tensor:
        update = _chosen(rows, row_idx, size).mul_(size.unsqueeze(-1))
        if factors is not None:
            update.mul_(factors)
        return update.add_(x) if update.dtype == x.dtype else x + update.to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        del output
        _, size, rows, row_idx, factors = inputs
        ctx.save_for_backward(size, rows, row_idx, factors)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        size, rows, row_idx, factors = ctx.saved_tensors  # type: ignore[attr-defined]
        buffer = _chosen(rows, row_idx, size)
        if factors is not None:
            buffer.mul_(factors)
        wide_grad = grad.to(buffer.dtype)
        grad_size = torch.linalg.vecdot(wide_grad, buffer)
        torch.mul(wide_grad, size.unsqueeze(-1), out=buffer)
        if factors is not None:
            buffer.mul_(factors)
        grad_rows = torch.zeros_like(rows, dtype=buffer.dtype).index_add_(0, row_idx, buffer)
        return grad, grad_size.to(size.dtype), grad_rows.to(rows.dtype), None, None


def _chosen(rows: Tensor, row_idx: Tensor, size: Tensor) -> Tensor:
    return rows.index_select(0, row_idx).to(torch.promote_types(rows.dtype, size.dtype))
