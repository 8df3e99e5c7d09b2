"""Products in which every token meets the matrix of its own tile.

Tokens are sorted by tile once, and each product then runs over contiguous groups. In training the weights are float
(:func:`grouped_linear`); a packed layer calls ``trix::ternary_ffn``, ``trix::ternary_tile_matmul``, its form in 8 bits and
``trix::signature_route``, custom operators that the exporter translates one to one into the onnxruntime operators of the same
meaning.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional.gates import Gate, adaptive_weight, softmax_weight
from trix.functional.packing import unpack_ternary
from trix.functional.signatures import signature_scores

BLOCK_ROWS = 24  # a multiple of the rows that BLAS kernels take at once, so that all rows of a block are computed alike
BLOCK_COLUMNS = 16  # a multiple of the floats of a vector register


class TokenGroups(NamedTuple):
    """Tokens sorted by tile: ``order`` [S] sorts, ``inverse`` [S] undoes it, group e ends before row ``ends[e]`` (int32)."""

    order: Tensor
    inverse: Tensor
    ends: Tensor


def group_tokens(tile_idx: Tensor, num_tiles: int) -> TokenGroups:
    """Sort assignments by tile, stably. tile_idx: int64 [S] in [0, num_tiles)."""
    sorted_idx, order = torch.sort(tile_idx, stable=True)
    tiles = torch.arange(num_tiles, device=tile_idx.device)
    ends = torch.searchsorted(sorted_idx, tiles, right=True).to(torch.int32)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return TokenGroups(order, inverse, ends)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, has_rest: bool = False, in_blocks: bool = False) -> Tensor:
    """y[s] = weight[e] @ x[s] for the rows s of group e.

    Args:
        x: float [S, K], sorted by tile. weight: float [E, N, K]. ends: int32 [E], the row at which each group ends.
        has_rest: rows may follow the last group: no product is computed for them. Without it, ends[-1] must be S.
        in_blocks: where no gradient is wanted, on a CPU, all products have BLOCK_ROWS rows. BLAS libraries add up in another
            order where a product has more or fewer rows; so a row's answer is the same to the last bit whatever stands in the
            others, and no later token moves that of an earlier one by sharing its tile. On a CPU with
            AVX-512, width 128, it takes 2 to 3.5 times the time: most where few tiles have many rows.

    Returns:
        [S, N] in the dtype of x, or in autocast's where it is enabled; 0 in the rows after the last group.

    It is a custom operator because torch 2.13 can run ``torch.nn.functional.grouped_mm`` in float32 on a CPU but not trace it.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if in_blocks and device_type == "cpu" and not wants_gradient:
        return _grouped_linear_in_blocks(x, weight, ends)
    return _grouped_linear(x, weight, ends, has_rest)


def _grouped_mm_takes(*matrices: Tensor) -> bool:
    # torch's grouped product: three dtypes, and rows that start at multiples of 16 bytes.
    return all(
        m.dtype in (torch.float32, torch.bfloat16, torch.float16) and m.shape[-1] * m.element_size() % 16 == 0 for m in matrices
    )


def _group_bounds(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


@torch.library.custom_op("trix::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, has_rest: bool) -> Tensor:
    if _grouped_mm_takes(x, weight, weight.mT):
        y = F.grouped_mm(x.contiguous(), weight.mT, offs=ends)
    else:
        y = x.new_empty(x.shape[0], weight.shape[1])
        for (start, stop), matrix_NK in zip(_group_bounds(ends), weight, strict=True):
            torch.mm(x[start:stop], matrix_NK.T, out=y[start:stop])
    if has_rest:  # what no group wrote is whatever the memory held
        y.masked_fill_((torch.arange(y.shape[0], device=y.device) >= ends[-1]).unsqueeze(-1), 0.0)
    return y


@torch.library.custom_op("trix::grouped_linear_in_blocks", mutates_args=())
def _grouped_linear_in_blocks(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    size = ends.diff(prepend=ends.new_zeros(1))
    num_blocks = (size + BLOCK_ROWS - 1) // BLOCK_ROWS
    padded_ends = (num_blocks * BLOCK_ROWS).cumsum(0)
    shift = (padded_ends - num_blocks * BLOCK_ROWS) - (ends - size)  # of the starts of the groups
    place_S = torch.arange(int(ends[-1])) + shift.repeat_interleave(size)
    tile_of_block = torch.arange(len(ends)).repeat_interleave(num_blocks).tolist()
    # The order of summation also depends on how a row is aligned: with whole vector registers, all rows are aligned alike.
    if x.shape[1] % BLOCK_COLUMNS:  # a pad of 0 would copy the weights of all tiles
        weight = F.pad(weight, (0, -x.shape[1] % BLOCK_COLUMNS))
    rows = x.new_zeros(len(tile_of_block) * BLOCK_ROWS, weight.shape[2])
    rows[place_S, : x.shape[1]] = x[: len(place_S)]
    product = x.new_empty(len(rows), weight.shape[1])
    for block, tile in enumerate(tile_of_block):
        of_block = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        torch.mm(rows[of_block], weight[tile].T, out=product[of_block])
    y = x.new_zeros(x.shape[0], weight.shape[1])
    y[: len(place_S)] = product[place_S]
    return y


@torch.library.custom_op("trix::grouped_linear_weight_grad", mutates_args=())
def _grouped_linear_weight_grad(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    # One product per tile, from the rows of its group: [N, S_e] @ [S_e, K].
    if x.device.type == "cpu" and _grouped_mm_takes(grad, x):  # on a GPU torch's wants the groups themselves aligned
        return F.grouped_mm(grad.T, x, offs=ends)
    weight_grad = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    for (start, stop), matrix_NK in zip(_group_bounds(ends), weight_grad, strict=True):
        torch.mm(grad[start:stop].T, x[start:stop], out=matrix_NK)
    return weight_grad


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, has_rest: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_in_blocks.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor
) -> None:
    del output
    x, weight, ends, ctx.has_rest = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(x, weight, ends)


def _grouped_linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    grad = grad.contiguous()
    grad_x = _grouped_linear(grad, weight.mT, ends, ctx.has_rest)  # type: ignore[attr-defined]
    return grad_x, _grouped_linear_weight_grad(grad, x, ends), None, None


_grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_for_backward)


@torch.library.custom_op("trix::ternary_tile_matmul", mutates_args=())
def ternary_tile_matmul(x: Tensor, packed: Tensor, row_scale: Tensor, tile_idx: Tensor) -> Tensor:
    """y[t, n] = row_scale[e, n] * sum_k code[e, n, k] * x[t, k] with e = tile_idx[t]. Inference only: no gradient.

    Args:
        x: float [T, K]. packed: uint8 [E, N, ceil(K / 4)]. row_scale: float [E, N]. tile_idx: int64 [T].

    Returns:
        [T, N] in the dtype of x.
    """
    codes = unpack_ternary(packed, x.shape[-1]).to(x.dtype)
    if packed.shape[0] == 1:
        return (x @ codes[0].T).to(x.dtype) * row_scale[0].to(x.dtype)
    groups = group_tokens(tile_idx, packed.shape[0])
    y = grouped_linear(x[groups.order], codes, groups.ends, in_blocks=True)[groups.inverse]
    return y.to(x.dtype) * row_scale[tile_idx].to(x.dtype)


@ternary_tile_matmul.register_fake
def _(x: Tensor, packed: Tensor, row_scale: Tensor, tile_idx: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], packed.shape[1])


def in_8bit_steps(x: Tensor, min_magnitude: float) -> tuple[Tensor, Tensor]:
    """x * (127 / m) [..., K] and the step m / 127 [..., 1], with m = max(max |x|, min_magnitude), in float32.

    min_magnitude: > 0, so that zeros have a step, too.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(min_magnitude)
    return x * (127 / largest), largest / 127


@torch.library.custom_op("trix::ternary_tile_matmul_8bit", mutates_args=())
def ternary_tile_matmul_8bit(x: Tensor, packed: Tensor, row_scale: Tensor, tile_idx: Tensor, min_magnitude: float) -> Tensor:
    """:func:`ternary_tile_matmul` of x rounded to 8-bit steps, ties to even, in float32. Inference only: no gradient.

    Args:
        x, packed, row_scale, tile_idx: as there. min_magnitude: as in :func:`in_8bit_steps`.

    Returns:
        [T, N] in the dtype of x.
    """
    steps_TK, step_T1 = in_8bit_steps(x, min_magnitude)
    return (ternary_tile_matmul(steps_TK.round(), packed, row_scale, tile_idx) * step_T1).to(x.dtype)


@ternary_tile_matmul_8bit.register_fake
def _(x: Tensor, packed: Tensor, row_scale: Tensor, tile_idx: Tensor, min_magnitude: float) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], packed.shape[1])


@torch.library.custom_op("trix::ternary_ffn", mutates_args=())
def ternary_ffn(
    x: Tensor, tile_idx: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """y[t] = sum_k weight[t, k] * down_e relu(up_e x[t])^2 with e = tile_idx[t, k]. Inference only: no gradient.

    Args:
        x: float [T, D]. tile_idx: int64 [T, K]. weight: float [T, K]. up: uint8 [E, H, ceil(D / 4)]. up_scale: float [E, H].
        down: uint8 [E, D, ceil(H / 4)]. down_scale: float [E, D].

    Returns:
        [T, D] in the dtype of x.
    """
    top_k = tile_idx.shape[1]
    tile_idx_S = tile_idx.reshape(-1)  # S = T * K assignments
    x_SD = x if top_k == 1 else x.repeat_interleave(top_k, dim=0)
    hidden_SH = F.relu(ternary_tile_matmul(x_SD, up, up_scale, tile_idx_S)).square()
    y_SD = ternary_tile_matmul(hidden_SH, down, down_scale, tile_idx_S)
    y_TKD = y_SD.reshape(*tile_idx.shape, x.shape[-1]) * weight.unsqueeze(-1).to(y_SD.dtype)
    return y_TKD.sum(dim=1)


@ternary_ffn.register_fake
def _(
    x: Tensor,
    tile_idx: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    up: Tensor,  # noqa: ARG001
    up_scale: Tensor,  # noqa: ARG001
    down: Tensor,  # noqa: ARG001
    down_scale: Tensor,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("trix::signature_route", mutates_args=())
def signature_route(
    x: Tensor, packed: Tensor, bias: Tensor, log_mass: Tensor, top_k: int, gate: int, confidence_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The top_k tiles of each token by signature score + bias, best first, ties to the lowest index; and how much they count.

    With e = tile_idx[t, k] and s = score[t, :], where tiles of bias -inf, free slots, are no part of the sums, by gate:
    SIGMOID sigmoid(s_e); SOFTMAX exp(s_e) / sum_f exp(log_mass_f + s_f) * sqrt(E); ADAPTIVE
    :func:`~trix.functional.gates.adaptive_weight`.
    A free slot has weight 0; all weights of a token are NaN where its scores are, or where all slots are free, except under
    SIGMOID.

    Args:
        x: float [T, D]. packed: uint8 [E, ceil(D / 4)], the signatures. bias, log_mass: float [E]. top_k: 1 <= top_k <= E.
        gate: a :class:`~trix.functional.gates.Gate`. confidence_threshold: of ADAPTIVE.

    Returns:
        tile_idx int64 [T, top_k], weight [T, top_k], and score [T, E] without the bias.
    """
    score = signature_scores(x, unpack_ternary(packed, x.shape[-1]).to(x.dtype))
    bias, log_mass = bias.to(score.dtype), log_mass.to(score.dtype)
    tile_idx = select_top_k(score + bias, top_k)
    score_in_use = score + torch.zeros_like(bias).masked_fill(bias.isneginf(), -torch.inf)
    if gate == Gate.SIGMOID:
        weight = score_in_use.gather(-1, tile_idx).sigmoid()
    elif gate == Gate.SOFTMAX:
        weight = softmax_weight(score_in_use, tile_idx, log_mass)
    else:
        weight = adaptive_weight(score_in_use, tile_idx, confidence_threshold)
    return tile_idx, weight, score


@signature_route.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,  # noqa: ARG001
    log_mass: Tensor,  # noqa: ARG001
    top_k: int,
    gate: int,  # noqa: ARG001
    confidence_threshold: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    tile_idx = x.new_empty(x.shape[0], top_k, dtype=torch.int64)
    return tile_idx, x.new_empty(x.shape[0], top_k), x.new_empty(x.shape[0], packed.shape[0])


def select_top_k(score: Tensor, top_k: int) -> Tensor:
    """Indices of the top_k largest of score [..., E], best first, ties to the lowest index: int64 [..., top_k].

    torch.topk leaves the order of ties open; a stable sort does not.
    """
    if top_k == 1:
        return _argmax(score)
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()


def _argmax(score: Tensor) -> Tensor:
    """score.argmax(dim=-1, keepdim=True), ties to the lowest index.

    On a CPU torch goes through a row number by number, numpy by vectors: three to eight times faster from 64 columns on.
    """
    is_plain = type(score) is Tensor and score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or not is_plain or score.shape[-1] == 0:
        return score.argmax(dim=-1, keepdim=True)
    return torch.from_numpy(score.detach().numpy().argmax(axis=-1, keepdims=True))
