"""Reading the row that each token chose, and what is done with it, in few arrays of tokens x width.

:func:`sparse_lookup` is a whole layer in one custom operator, for inference.

On a CPU a fresh array of that size, which is in no cache, takes longer than the arithmetic on it. So what can be is done in
place, and the rows are looked up again in the backward pass. Every function is differentiable once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trix.functional.gates import Gate
from trix.functional.tile_matmul import signature_route


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


def grid_rows(point: Tensor, rows: Tensor, row_idx: Tensor, grid_size: int) -> Tensor:
    """m[t]: the four corners of the cell of p[t] in rows[row_idx[t]], interpolated bilinearly.

    Args:
        point: float [T, 2] in [-1, 1]. rows: float [E, (G + 1)^2], the corners of G x G cells, row by row. row_idx: int64 [T]
            in [0, E). grid_size: G.

    Returns:
        [T] in the promoted dtype of point and rows.
    """
    position_T2 = (point + 1.0) * (0.5 * grid_size)
    cell_T2 = position_T2.detach().long().clamp(0, grid_size - 1)
    high_T2 = position_T2 - cell_T2
    low_T2 = 1.0 - high_T2
    corners = grid_size + 1
    first_T = row_idx * corners**2 + cell_T2[:, 0] * corners + cell_T2[:, 1]
    step_2 = torch.arange(2, device=first_T.device)
    index_T22 = first_T[:, None, None] + step_2[:, None] * corners + step_2
    value_T22 = rows.flatten()[index_T22]
    weight_T22 = torch.stack([low_T2, high_T2], dim=-1)  # [T, axis, low or high]
    return (weight_T22[:, 0, :, None] * weight_T22[:, 1, None, :] * value_T22).sum(dim=(1, 2))


@torch.library.custom_op("trix::sparse_lookup", mutates_args=())
def sparse_lookup(
    x: Tensor,
    routing_x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    packed: Tensor,
    bias: Tensor,
    gate_curve: Tensor,
    compress: Tensor,
    compress_bias: Tensor,
    point_weight: Tensor,
    point_bias: Tensor,
    splines: Tensor,
    direction: Tensor,
    top_k: int,
    grid_size: int,
    has_hinges: bool,
    route_on_norm: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y[t] = x[t] + sum_k gate(score[t, e]) * magnitude_e(p[t]) * direction_e with e = tile_idx[t, k]; inference only.

    h = layer_norm(x); tile_idx and score by :func:`trix.functional.tile_matmul.signature_route` from h, or from routing_x
    without route_on_norm; p = tanh(gelu(h compress + compress_bias) point_weight^T + point_bias); magnitude_e is
    :func:`hinge_rows` with has_hinges, :func:`grid_rows` without, over splines[e]; gate is the piecewise linear curve through
    (i / (N - 1), gate_curve[i]) at sigmoid(score[t, e]).

    Args:
        x, routing_x: float [T, D]. norm_weight, norm_bias: float [D]; epsilon: of the norm. packed: uint8 [E, ceil(D / 4)], the
            signatures. bias: float [E]. gate_curve: float [N], N >= 2. compress: float [D, H], compress_bias [H].
            point_weight: float [2, H], point_bias [2]. splines: float [E, S]. direction: float [E, D]. top_k: 1 <= top_k <= E.

    Returns:
        y [T, D] in the dtype of x, tile_idx int64 [T, top_k], score [T, E] in at least float32, and p [T, 2].
    """
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    routed = h if route_on_norm else routing_x
    routed = routed.to(torch.promote_types(routed.dtype, torch.float32))
    tile_idx, share_TK, score = signature_route(routed, packed, bias, torch.zeros_like(bias), top_k, Gate.SIGMOID, 0.0)
    point_T2 = F.linear(F.gelu(F.linear(h, compress.mT, compress_bias)), point_weight, point_bias).tanh()
    last = gate_curve.shape[0] - 1
    position_TK = share_TK.to(gate_curve.dtype) * last
    segment_TK = position_TK.long().clamp(0, last - 1)
    start_TK = gate_curve[segment_TK]
    gate_TK = start_TK + (gate_curve[segment_TK + 1] - start_TK) * (position_TK - segment_TK)
    y = x.clone()
    for gate_T, tile_idx_T in zip(gate_TK.unbind(-1), tile_idx.unbind(-1), strict=True):
        if has_hinges:
            magnitude_T = hinge_rows(point_T2, splines, tile_idx_T)
        else:
            magnitude_T = grid_rows(point_T2, splines, tile_idx_T, grid_size)
        y = add_rows(y, gate_T * magnitude_T, direction, tile_idx_T)
    return y, tile_idx, score, point_T2


@sparse_lookup.register_fake
def _(
    x: Tensor,
    routing_x: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    packed: Tensor,
    bias: Tensor,  # noqa: ARG001
    gate_curve: Tensor,  # noqa: ARG001
    compress: Tensor,  # noqa: ARG001
    compress_bias: Tensor,  # noqa: ARG001
    point_weight: Tensor,  # noqa: ARG001
    point_bias: Tensor,  # noqa: ARG001
    splines: Tensor,  # noqa: ARG001
    direction: Tensor,  # noqa: ARG001
    top_k: int,
    grid_size: int,  # noqa: ARG001
    has_hinges: bool,  # noqa: ARG001
    route_on_norm: bool,
    epsilon: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, score_dtype = x.shape[0], torch.promote_types((x if route_on_norm else routing_x).dtype, torch.float32)
    return (
        torch.empty_like(x),
        x.new_empty(num_tokens, top_k, dtype=torch.int64),
        x.new_empty(num_tokens, packed.shape[0], dtype=score_dtype),
        x.new_empty(num_tokens, 2),
    )


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
