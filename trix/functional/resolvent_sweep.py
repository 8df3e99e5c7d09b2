"""The sweep G_i = 1 / (alpha_i - w_i G_{i-1}) in chunks, its gradient, and the scan of logarithmic depth.

A token acts on G as a Moebius map, the matrix [[0, 1], [-w_i, alpha_i]] up to a factor; maps in a row compose by products of
matrices, divided by their largest entry each time. A sweep in chunks composes the maps of each chunk in a tree, finds G before
each chunk in a tree over the chunks, and runs the recurrence itself in all chunks at once. The chunks have a fixed size and the
trees are aligned to the first token, so a token's value does not depend on how many follow.

Only real additions, products, divisions and maxima are used: each is rounded correctly, so vector code and the rest of a row
agree to the last bit, and every prefix and every batch row gives the same bits.

Legend: N tokens, R rows, S steps of a chunk, K chunks. A leading 2 holds real and imaginary part; maps are
[2, 2, 2, ...]: row and column of the matrix, then the part.
"""

import torch
from torch import Tensor

from trix.functional.linear_recurrence import linear_recurrence, parts, unfilled

CHUNK = 32


@torch.library.custom_op("trix::resolvent_sweep", mutates_args=())
def resolvent_sweep(alpha_re: Tensor, alpha_im: Tensor, w: Tensor, first_re: Tensor, first_im: Tensor) -> tuple[Tensor, Tensor]:
    """G_i = 1 / (alpha_i - w_i G_{i-1}), G_{-1} = first. alpha, w [..., N], first [...] -> the two parts of G [..., N].

    The last G is the state: given as first with the tokens that follow, it continues the sweep.
    """
    num_chunks = -(-alpha_re.shape[-1] // CHUNK)
    alpha = torch.stack([_to_steps(alpha_re, 0.0), _to_steps(alpha_im, -1.0)])
    w_SKR = _to_steps(w, 0.0)
    first = torch.stack([first_re.reshape(-1), first_im.reshape(-1)])
    G = first.unsqueeze(1)
    if num_chunks > 1:
        has_resets = bool((w[..., 1:] == 0).any())
        maps = _reduce(_site_pairs(alpha[:, :, :-1], w_SKR[:, :-1], has_resets), has_resets)
        G = _starts(maps, G, has_resets)
    re, im = _recurrence(alpha, w_SKR, G)
    return _from_steps(re, alpha_re.shape), _from_steps(im, alpha_re.shape)


def _to_steps(x: Tensor, fill: float) -> Tensor:
    """[..., N] as [S, K, R], padded to whole chunks; fewer tokens than a chunk has are one chunk of their own."""
    x = x.reshape(-1, x.shape[-1])
    chunk = min(CHUNK, x.shape[1])
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % chunk), value=fill)
    return x.view(len(x), x.shape[1] // chunk, chunk).permute(2, 1, 0).contiguous()


def _from_steps(x_SKR: Tensor, shape: torch.Size) -> Tensor:
    x = x_SKR.permute(2, 1, 0).clone(memory_format=torch.contiguous_format).flatten(1)
    return x[:, : shape[-1]].contiguous().view(shape)


def _recurrence(alpha: Tensor, w: Tensor, G: Tensor) -> Tensor:
    """All chunks at once from the G before each: alpha [2, S, K, R], w [S, K, R], G [2, K, R] -> [2, S, K, R]."""
    conj, square = torch.empty_like(alpha), torch.empty_like(alpha[:, 0])
    square_re, square_im = square.unbind(0)
    signed_w = torch.stack([w, -w])
    previous = torch.stack([G[0], -G[1]])
    denominator, norm = torch.empty_like(square), torch.empty_like(square_re)
    # 1 / d = conj(d) / |d|^2: its conjugate needs no change of sign within the loop.
    for alpha_i, w_i, conj_i in zip(alpha.unbind(1), signed_w.unbind(1), conj.unbind(1), strict=True):
        torch.mul(w_i, previous, out=denominator)
        torch.sub(alpha_i, denominator, out=denominator)
        torch.mul(denominator, denominator, out=square)
        torch.add(square_re, square_im, out=norm)
        previous = torch.div(denominator, norm, out=conj_i)
    conj[1].neg_()
    return conj


def _site_pairs(alpha: Tensor, w: Tensor, has_resets: bool) -> Tensor:
    """The maps of two tokens in a row: alpha [2, S, ...], w [S, ...] -> [2, 2, 2, S / 2, ...]."""
    a, b, w_a, w_b = alpha[:, 0::2], alpha[:, 1::2], w[0::2], w[1::2]
    maps = torch.zeros(2, 2, *a.shape, dtype=w.dtype, device=w.device)
    torch.neg(w_a, out=maps[0, 0, 0])
    maps[0, 1] = a
    torch.mul(b, maps[0, 0, 0], out=maps[1, 0])
    torch.sub(a[0] * b[0] - a[1] * b[1], w_b, out=maps[1, 1, 0])
    torch.add(a[0] * b[1], a[1] * b[0], out=maps[1, 1, 1])
    if has_resets:
        is_reset = w_b == 0
        maps[:, 0].masked_fill_(is_reset, 0.0)
        maps[0, 1, 0].masked_fill_(is_reset, 1.0)
        maps[0, 1, 1].masked_fill_(is_reset, 0.0)
        maps[1, 1] = torch.where(is_reset, b, maps[1, 1])
    return maps.div_(maps.abs().amax((0, 1, 2)))


def _compose(after: Tensor, before: Tensor, has_resets: bool) -> Tensor:
    """The product of two maps [2, 2, 2, ...], up to a positive factor."""
    after_re, after_im = after.unsqueeze(2).unbind(3)  # [2, 2, 1, ...]
    before_re, before_im = before.unbind(2)
    re = after_re * before_re - after_im * before_im
    im = after_re * before_im + after_im * before_re
    product = torch.stack([re[:, 0] + re[:, 1], im[:, 0] + im[:, 1]], dim=2)
    product = product / product.abs().amax((0, 1, 2))
    if not has_resets:
        return product
    # A reset within after makes it constant: what stood before must then not even change the rounding.
    is_constant = after[:, 0].abs().amax((0, 1)) == 0
    return torch.where(is_constant, after, product)


def _transform(maps: Tensor, G: Tensor) -> Tensor:
    """(m_00 G + m_01) / (m_10 G + m_11): maps [2, 2, 2, ...], G [2, ...]."""
    (m_re, m_im), (b_re, b_im) = maps[:, 0].unbind(1), maps[:, 1].unbind(1)
    re = m_re * G[0] - m_im * G[1] + b_re
    im = m_re * G[1] + m_im * G[0] + b_im
    (above_re, below_re), (above_im, below_im) = re, im
    norm = below_re * below_re + below_im * below_im
    return torch.stack([(above_re * below_re + above_im * below_im) / norm, (above_im * below_re - above_re * below_im) / norm])


def _reduce(maps: Tensor, has_resets: bool) -> Tensor:
    """The maps of the steps of each chunk [..., S, K, R] in one: [..., K, R]."""
    while maps.shape[-3] > 1:
        maps = _compose(maps[..., 1::2, :, :], maps[..., 0::2, :, :], has_resets)
    return maps[..., 0, :, :]


def _starts(maps: Tensor, first: Tensor, has_resets: bool) -> Tensor:
    """The state before each of K chunks, from the maps of all but the last [..., K - 1, R] and the first of them [2, 1, R]."""
    num_maps = maps.shape[-2]
    if num_maps == 0:
        return first
    before, after = maps[..., 0::2, :], maps[..., 1::2, :]
    even = _starts(_compose(after, before[..., : after.shape[-2], :], has_resets), first, has_resets)
    starts = first.new_empty(2, num_maps + 1, first.shape[-1])
    starts[:, 0::2] = even
    starts[:, 1::2] = _transform(before, even[:, : before.shape[-2]])
    return starts


@torch.library.custom_op("trix::resolvent_sweep_backward", mutates_args=())
def _sweep_backward(
    grad_re: Tensor, grad_im: Tensor, G_re: Tensor, G_im: Tensor, w: Tensor, first_re: Tensor, first_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of alpha, w and first, as real and imaginary parts.

    With d_i = 1 / G_i, the gradient of d_i, which is that of alpha_i, is e_i = conj(G_i^2) (w_{i+1} e_{i+1} - grad_i): a linear
    recurrence from the last token to the first. That of w_i is -Re(e_i conj G_{i-1}), and that of first -w_0 e_0.
    """
    square = torch.complex(G_re, -G_im).square().reshape(-1, w.shape[-1])  # [R, N]
    decay = square * torch.nn.functional.pad(w[..., 1:], (0, 1)).reshape(square.shape)
    drive = -square * torch.complex(grad_re, grad_im).reshape(square.shape)
    e = linear_recurrence(decay, drive.unsqueeze(-1), drive.new_zeros(len(drive), 1), is_reversed=True).reshape(w.shape)
    e_re, e_im = parts(e)
    previous_re, previous_im = (
        torch.cat([first.unsqueeze(-1), G[..., :-1]], dim=-1) for first, G in ((first_re, G_re), (first_im, G_im))
    )
    grad_w = -(e_re * previous_re + e_im * previous_im)
    return e_re, e_im, grad_w, -w[..., 0] * e_re[..., 0], -w[..., 0] * e_im[..., 0]


@resolvent_sweep.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    return unfilled(inputs[0]), unfilled(inputs[1])


@_sweep_backward.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    *_, w, first_re, first_im = inputs
    return tuple(map(unfilled, (w, w, w, first_re, first_im)))


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> None:
    _, _, w, first_re, first_im = inputs
    ctx.save_for_backward(*output, w, first_re, first_im)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_re: Tensor, grad_im: Tensor) -> tuple[Tensor, ...]:
    return _sweep_backward(grad_re, grad_im, *ctx.saved_tensors)  # type: ignore[attr-defined]


resolvent_sweep.register_autograd(_backward, setup_context=_save_for_backward)


def _scan(alpha_re: Tensor, alpha_im: Tensor, w: Tensor, first_re: Tensor, first_im: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(w)
    above = torch.stack([torch.stack([zero, zero]), torch.stack([torch.ones_like(w), zero])])
    below = torch.stack([torch.stack([-w, zero]), torch.stack([alpha_re, alpha_im])])
    maps, distance = torch.stack([above, below]), 1
    while distance < w.shape[-1]:
        maps = torch.cat([maps[..., :distance], _compose(maps[..., distance:], maps[..., :-distance], True)], dim=-1)
        distance *= 2
    re, im = _transform(maps, torch.stack([first_re, first_im]).unsqueeze(-1))
    return re, im


class _Scan(torch.autograd.Function):
    forward = staticmethod(_scan)
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)


def scan_pivots(alpha_re: Tensor, alpha_im: Tensor, w: Tensor, first_re: Tensor, first_im: Tensor) -> tuple[Tensor, Tensor]:
    """G as of :func:`resolvent_sweep`, by a scan of depth log2 N over the maps of the tokens."""
    return _Scan.apply(alpha_re, alpha_im, w, first_re, first_im)  # type: ignore[no-untyped-call]
